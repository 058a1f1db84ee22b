"""Tests of the machine as checks see it."""

from meshes.platform import load_platform
from piperjax.doctor.environment import DEVICES_SECONDS, Devices, read_devices
from piperjax.runtime.bounded_process import Ended


def test_jax_is_started_once_with_our_sources_and_without_taking_memory(machine):
    env = machine(environ={"PYTHONPATH": "/mine"})
    assert env.devices.kinds == ("cpu", "cpu") and env.devices.exchange_seconds == 0.001
    assert env.devices is env.devices and len(machine.asked) == 1


def test_devices_that_answered(machine):
    ended = machine.answer(
        {"backend": "rocm", "kinds": ["a"], "memory_bytes": 7}, stderr="W0 slow\n\nW1 slower\n"
    )
    expected = Devices(backend="rocm", kinds=("a",), memory_bytes=7, warnings=("W0 slow", "W1 slower"))
    assert read_devices(ended) == expected


def test_how_far_it_came_before_it_hung(machine):
    start = read_devices(Ended(returncode=None))
    assert start.problem == f"nothing happened for {DEVICES_SECONDS} s while JAX started its devices"
    later = read_devices(machine.answer({"backend": "cuda", "kinds": ["a", "b"]}, returncode=None))
    assert later.problem == f"nothing happened for {DEVICES_SECONDS} s while two devices exchanged data"
    assert later.kinds == ("a", "b")


def test_how_it_crashed(machine):
    told = read_devices(
        Ended(returncode=-6, stderr="F1 parse_flags.cc] Unknown flag in XLA_FLAGS: --xla_a\n")
    )
    assert told.problem == "F1 parse_flags.cc] Unknown flag in XLA_FLAGS: --xla_a"
    assert read_devices(Ended(returncode=-11)).problem == "the process ended with code -11"
    said = read_devices(machine.answer({"problem": "no\n  device"}, returncode=1, stderr="noise"))
    assert said.problem == "no device"
    assert read_devices(Ended(returncode=0, stdout="hello\n[1]\n{")) == Devices()


def test_the_platform_is_named_or_recognised(machine):
    assert machine().platform is None
    assert machine.rocm().platform == load_platform("frontier")
    assert machine.rocm(kind="AMD Instinct MI300X").platform.name == "mi300x_node"
    assert machine.rocm(kind="AMD Radeon").platform is None
    assert machine(expected=load_platform("lumi_g")).platform.name == "lumi_g"


def test_backends_and_plugins(machine):
    assert (machine().backend, machine().plugin, machine().has_gpu) == ("cpu", "", False)
    env = machine.rocm()
    assert (env.backend, env.plugin, env.has_gpu) == ("rocm", "jax-rocm7-plugin", True)
    hidden = machine.rocm(environ={"JAX_PLATFORMS": "cpu"})
    assert (hidden.backend, hidden.has_gpu) == ("cpu", True)


def test_files_and_numbers(machine):
    env = machine(files={"a/b": " text \n"}, environ={"N": "3", "M": "x", "SLURM_NNODES": "4"})
    assert (env.text("a/b"), env.text("a/c"), env.names("a"), env.names("z")) == ("text", "", ["b"], [])
    assert (env.number("N"), env.number("M"), env.number("L"), env.num_nodes) == (3, None, None, 4)


def test_libraries_are_found_where_the_linker_looks(machine):
    env = machine(files=["opt/net/lib/librccl-net.so", "usr/lib64/librccl.so.1"])
    assert env.library("librccl.so").name == "librccl.so.1"
    assert env.library("librccl-net.so") is None
    env = machine(environ={"LD_LIBRARY_PATH": ":/none:/opt/net/lib"})
    assert env.library("libnccl-net.so", "librccl-net.so").name == "librccl-net.so"
    env = machine(files=["r/lib/libamdhip64.so.7"], environ={"ROCM_PATH": "/r"})
    assert env.library("libamdhip64.so").name == "libamdhip64.so.7"
