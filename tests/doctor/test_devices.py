"""Tests of the checks of devices."""

import pytest

from meshes.platform import load_platform
from piperjax.doctor.devices import exchange, expected_platform, found_devices, preallocation, visible_devices
from piperjax.runtime.bounded_process import Ended


def test_devices_that_are_there(machine, told):
    assert told(found_devices(machine(cpus=frozenset({0, 1})))) == [
        ("ok", "no GPU: JAX simulates devices on 2 processor cores (train.py --devices N)")
    ]
    assert told(found_devices(machine.rocm())) == [
        ("ok", "8 x AMD Instinct MI250X/MI250 (rocm) of 60.0 GiB for JAX")
    ]


def test_jax_that_does_not_start(machine, told):
    probe = machine.answer({"problem": "Unable to initialize backend 'rocm': no device"}, returncode=1)
    assert told(found_devices(machine.rocm(probe=probe))) == [
        (
            "error",
            "JAX does not start: Unable to initialize backend 'rocm': no device; see whether rocminfo lists them, "
            "and what AMD_LOG_LEVEL=1 says",
        )
    ]
    (finding,) = found_devices(machine(probe=probe, environ={"JAX_PLATFORMS": "rocm"}))
    assert (
        finding.advice == "make install EXTRA=rocm brings a plugin, and JAX_PLATFORMS=cpu uses the processor"
    )
    (finding,) = found_devices(machine(probe=Ended(returncode=None)))
    assert finding.level == "error" and "nothing happened for 90 s" in finding.sentence
    probe = machine.answer(
        {"problem": "XLA_FLAGS has --a=1, which would end the process; take it out"}, returncode=1
    )
    (finding,) = found_devices(machine.rocm(probe=probe))
    assert finding.sentence.endswith("would end the process; correct XLA_FLAGS")


def test_a_plugin_that_fell_back_to_the_cpu(machine):
    cpu = {"backend": "cpu", "kinds": ["cpu", "cpu"]}
    probe = machine.answer(cpu, stderr="W: Jax plugin version mismatch\n")
    (finding,) = found_devices(machine.rocm(probe=probe))
    assert (
        finding.level == "error"
        and "fell back to the CPU: W: Jax plugin version mismatch" in finding.sentence
    )
    (finding,) = found_devices(machine.rocm(probe=machine.answer(cpu), environ={"JAX_PLATFORMS": "cpu"}))
    assert finding.level == "note" and finding.found == "JAX_PLATFORMS=cpu hides the GPUs"


def test_the_exchange(machine, told):
    assert told(exchange(machine())) == [("ok", "two simulated devices exchanged 1 MiB each in 1 ms")]
    assert told(exchange(machine.rocm())) == [("ok", "two rocm devices exchanged 1 MiB each in 2 ms")]
    (finding,) = exchange(machine.rocm(count=1))
    assert finding.level == "note" and "sees one device" in finding.found
    hung = machine.answer({"backend": "rocm", "kinds": ["a", "b"]}, returncode=None)
    (finding,) = exchange(machine.rocm(probe=hung))
    assert (
        finding.level == "error"
        and "while two devices exchanged data; set NCCL_DEBUG=INFO" in finding.sentence
    )
    assert exchange(machine(probe=Ended(returncode=1))) == []  # found_devices tells it.


def test_the_platform_that_was_named(machine, told):
    frontier = load_platform("frontier")
    assert told(expected_platform(machine.rocm(expected=frontier)))[0][0] == "ok"
    assert told(expected_platform(machine.rocm(expected=frontier, count=1)))[0][0] == "ok"
    (finding,) = expected_platform(machine.rocm(expected=frontier, count=4))
    assert finding.found == "a node of frontier has 8 devices, but this process sees 4"
    (finding,) = expected_platform(machine(expected=frontier))
    assert finding.found == "frontier has accelerators, but JAX found only the CPU"
    large = machine.answer({"backend": "rocm", "kinds": ["a"] * 8, "memory_bytes": 180 * 2**30})
    (finding,) = expected_platform(machine.rocm(expected=frontier, probe=large))
    assert finding.found == "a device of frontier has 64 GiB, but JAX was given 180"
    assert (
        expected_platform(machine(expected=load_platform("laptop")))
        == []
        == expected_platform(machine.rocm())
    )


@pytest.mark.parametrize(
    ("environ", "level", "words"),
    [
        ({}, "ok", "runs let JAX take 93%"),
        ({"XLA_CLIENT_MEM_FRACTION": ".9"}, "ok", "90%"),
        (
            {"XLA_CLIENT_MEM_FRACTION": ".9", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"},
            "error",
            "unset XLA_PYTHON_CLIENT_MEM_FRACTION",
        ),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".93"}, "ok", "93%"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "1.0"}, "warning", "=1.0 is unusual"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "all"}, "error", "=all is not a number"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, "warning", "unset it for training"),
    ],
)
def test_memory_that_jax_takes(machine, environ, level, words):
    (finding,) = preallocation(machine.rocm(environ=environ))
    assert finding.level == level and words in finding.sentence
    assert preallocation(machine(environ=environ)) == []


@pytest.mark.parametrize(
    ("environ", "level", "words"),
    [
        ({"ROCR_VISIBLE_DEVICES": "0,1"}, "note", "ROCR_VISIBLE_DEVICES=0,1"),
        ({"HIP_VISIBLE_DEVICES": "-1"}, "error", "HIP_VISIBLE_DEVICES=-1 hides every GPU"),
        (
            {"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "4,5"},
            "error",
            "HIP_VISIBLE_DEVICES=4,5 counts within the 2 that ROCR_VISIBLE_DEVICES=4,5 leaves; set only one",
        ),
        ({"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "0,1"}, "note", "HIP_VISIBLE_DEVICES=0,1"),
    ],
)
def test_gpus_that_are_hidden(machine, environ, level, words):
    (finding,) = visible_devices(machine.rocm(environ=environ))
    assert finding.level == level and words in finding.sentence
    assert visible_devices(machine(environ=environ)) == [] == visible_devices(machine.rocm())
