"""Tests of the checks of XLA_FLAGS."""

import pytest

from piperjax.doctor.flags import harmful_flags, known_flags
from piperjax.runtime.bounded_process import Ended


def test_ours_are_added(machine, told):
    assert told(known_flags(machine.rocm())) == [
        (
            "ok",
            "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_experimental_parallel_collective_overlap_limit=1 "
            "--xla_gpu_enable_command_buffer= added to XLA_FLAGS for rocm",
        )
    ]


def test_a_flag_that_is_gone(machine, told):
    refused = Ended(
        returncode=-6, stderr="F] Unknown flag in XLA_FLAGS: --xla_gpu_enable_async_collectives=true"
    )
    environ = {"XLA_FLAGS": "--xla_gpu_enable_async_collectives=true"}
    assert told(known_flags(machine(environ=environ, trial=refused))) == [
        (
            "error",
            "XLA_FLAGS has --xla_gpu_enable_async_collectives=true, which was removed from XLA and would end the "
            "process; take it out",
        )
    ]


def test_nothing_can_be_tried(machine, told):
    (finding,) = known_flags(machine(trial=Ended(returncode=None)))
    assert finding.level == "note" and "did not end in time" in finding.sentence


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (
            "--xla_gpu_enable_latency_hiding_scheduler=false",
            "keeps all-to-alls and products apart; take it out",
        ),
        ("--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops=true turns every scatter into a loop"),
        (
            "--xla_gpu_disable_async_collectives=ALLTOALL",
            "makes collectives wait for themselves; take it out",
        ),
        (
            "--xla_gpu_enable_command_buffer=FUSION",
            "graphs of commands, which broke on ROCm in jax 0.8.2; set it to",
        ),
    ],
)
def test_flags_that_work_against_ours(machine, flag, words):
    (finding,) = harmful_flags(machine.rocm(environ={"XLA_FLAGS": flag}))
    assert finding.level == "warning" and words in finding.sentence


def test_flags_that_do_no_harm(machine, told):
    good = "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_deterministic_ops=false --xla_dump_to=/tmp/a"
    assert harmful_flags(machine.rocm(environ={"XLA_FLAGS": good})) == []
    assert harmful_flags(machine(environ={"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"})) == []  # on a CPU
    assert harmful_flags(machine(environ={"XLA_FLAGS": "missing-file"})) == []
    (finding,) = harmful_flags(machine(environ={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}))
    assert finding.level == "note" and "simulates 8 devices" in finding.sentence
