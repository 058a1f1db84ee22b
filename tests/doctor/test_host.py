"""Tests of the checks of the host: cores beside GPUs, limits, room."""

import pytest

from piperjax.doctor.host import (
    affinity,
    cpu_list,
    disk,
    gpus,
    limits,
    memory,
    numa_balancing,
    shared_memory,
)

GIB = 2**30
# Two GPUs, and a network card that is none.
BUS = {
    f"sys/bus/pci/devices/{address}/{name}": text
    for address, numbers in {
        "0000:c1:00.0": ("0x1002", "0x038000", "3", "48-55"),
        "0000:c6:00.0": ("0x1002", "0x120000", "-1", "56-63"),
        "0000:d1:00.0": ("0x17db", "0x020000", "3", "48-63"),
    }.items()
    for name, text in zip(("vendor", "class", "numa_node", "local_cpulist"), numbers, strict=True)
} | {"sys/devices/system/cpu/online": "0-63"}
STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}


def test_gpus_on_the_bus(machine):
    first, second = gpus(machine(files=BUS))
    assert (first.address, first.numa_node, first.cpus) == ("0000:c1:00.0", "3", frozenset(range(48, 56)))
    assert (second.address, second.numa_node) == ("0000:c6:00.0", "")
    assert cpu_list("1-3,7,x,") == {1, 2, 3, 7}


@pytest.mark.parametrize(
    ("cpus", "environ", "level", "words"),
    [
        (range(49, 56), STEP, "ok", "process 0 runs on cores 49-55, beside its GPU 0000:c1:00.0"),
        (
            [1, 2, 3, 9],
            STEP,
            "warning",
            "process 0 of this node runs on cores 1-3,9, but its GPU 0000:c1:00.0 is beside cores 48-55 of NUMA node "
            "3; give srun --cpu-bind masks in the order of the GPUs",
        ),
        (range(64), STEP, "warning", "processes are not bound to cores, and wander over the node; bind them"),
        (range(64), {}, "ok", "2 GPUs, this process may use 64 of 64 cores"),
    ],
)
def test_cores_beside_the_gpu(machine, cpus, environ, level, words):
    (finding,) = affinity(machine.rocm(files=BUS, cpus=frozenset(cpus), environ=environ))
    assert finding.level == level and words in finding.sentence
    assert affinity(machine(cpus=frozenset(cpus), environ={**environ, "JAX_PLATFORMS": "cpu"})) == []


def test_numa_balancing(machine):
    files = {"proc/sys/kernel/numa_balancing": "1\n"}
    (finding,) = numa_balancing(machine.rocm(files=files))
    assert finding.level == "note"
    assert numa_balancing(machine.rocm(files={"proc/sys/kernel/numa_balancing": "0\n"})) == []


def test_limits(machine, told):
    assert told(limits(machine(limits={"nofile": 20000, "memlock": 8 * 2**20}))) == [
        ("ok", "20000 open files")
    ]
    assert told(limits(machine(limits={"nofile": None}))) == [("ok", "unlimited open files")]
    (finding,) = limits(machine(limits={"nofile": 1024}))
    assert (
        finding.sentence == "only 1024 files may be open at once; ulimit -n 65536, or as much as it lets you"
    )
    (finding,) = limits(machine.rocm(files=["sys/class/cxi/cxi0/x"], limits={"memlock": 8 * 2**20}))
    assert finding.level == "warning" and finding.found.startswith("only 8 MiB of memory may be locked")


def test_shared_memory(machine):
    assert shared_memory(machine()) == []
    for free, level in ((64 * 2**20, "warning"), (8 * GIB, "ok"), (None, "note")):
        (finding,) = shared_memory(machine.rocm(free_bytes={"/dev/shm": free}))
        assert finding.level == level


def test_room_for_checkpoints(machine):
    for free, level in ((2**20, "error"), (5 * GIB, "note"), (2000 * GIB, "ok"), (None, "warning")):
        (finding,) = disk(machine(free_bytes={"runs": free}))
        assert finding.level == level
    (finding,) = disk(machine(free_bytes={"runs": 2000 * GIB}, may_write=False))
    assert finding.level == "error" and finding.found == "this user may not write into runs"
    assert disk(machine(free_bytes={"runs": 2000 * GIB}))[0].found == "2,000 GiB free for runs"


def test_memory_of_the_host(machine):
    assert memory(machine()) == []
    assert [finding.level for size in (GIB, 64 * GIB) for finding in memory(machine(memory_bytes=size))] == [
        "warning",
        "ok",
    ]
