"""This file is the checks of the host: where this process runs, what it may use, and what room there is."""

from dataclasses import dataclass

from piperjax.doctor.environment import Environment
from piperjax.doctor.finding import Finding, error, note, ok, warning

GIB = 2**30
# Vendors and classes of PCI devices that are GPUs: display controllers 03.., processing accelerators 12...
VENDORS = ("0x1002", "0x10de")
CLASSES = ("0x03", "0x12")

FEW_FILES = 4096
FULL_BYTES = GIB
SCARCE_BYTES = 20 * GIB


@dataclass(frozen=True, kw_only=True)
class PciDevice:
    """A GPU on the bus.

    Attributes:
      address: such as 0000:c1:00.0.
      numa_node: the memory it is beside, "" if unknown.
      cpus: those beside it.
    """

    address: str
    numa_node: str
    cpus: frozenset[int]


def gpus(env: Environment) -> list[PciDevice]:
    """Returns the GPUs of the host in order of the bus, which is how ROCm and CUDA_DEVICE_ORDER=PCI_BUS_ID count."""
    found = []
    for address in env.names("sys/bus/pci/devices"):
        folder = f"sys/bus/pci/devices/{address}"
        if env.text(f"{folder}/vendor") in VENDORS and env.text(f"{folder}/class").startswith(CLASSES):
            node = env.text(f"{folder}/numa_node")
            cpus = cpu_list(env.text(f"{folder}/local_cpulist"))
            found.append(PciDevice(address=address, numa_node="" if node == "-1" else node, cpus=cpus))
    return found


def cpu_list(text: str) -> frozenset[int]:
    """Returns the numbers in a list such as "1-7,17"."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            numbers |= set(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def affinity(env: Environment) -> list[Finding]:
    """Whether this process runs on processor cores beside its GPU; process i of a node takes GPU i."""
    present, local = gpus(env), env.number("SLURM_LOCALID")
    online = cpu_list(env.text("sys/devices/system/cpu/online"))
    if not present or env.backend == "cpu":
        return []
    several = (env.number("SLURM_STEP_NUM_TASKS") or 1) > env.num_nodes
    if local is None or not several:
        return [
            ok(
                "affinity",
                f"{len(present)} GPUs, this process may use {len(env.cpus)} of {len(online)} cores",
            )
        ]
    if env.cpus >= online:
        advice = "bind them with srun --cpu-bind, as launch/frontier.sbatch does"
        return [warning("affinity", "processes are not bound to cores, and wander over the node", advice)]
    if local >= len(present):
        return []  # slurm.py tells it.
    gpu = present[local]
    if gpu.cpus and not gpu.cpus & env.cpus:
        beside = f"cores {_ranges(gpu.cpus)}" + (f" of NUMA node {gpu.numa_node}" if gpu.numa_node else "")
        cores = _ranges(env.cpus)
        found = f"process {local} of this node runs on cores {cores}, but its GPU {gpu.address} is beside {beside}"
        return [warning("affinity", found, "give srun --cpu-bind masks in the order of the GPUs")]
    return [
        ok("affinity", f"process {local} runs on cores {_ranges(env.cpus)}, beside its GPU {gpu.address}")
    ]


def _ranges(cpus: frozenset[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(cpus):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def numa_balancing(env: Environment) -> list[Finding]:
    """Linux moving pages about; AMD has it off (ROCm documentation, "Prerequisite system validation")."""
    if env.backend != "cpu" and env.text("proc/sys/kernel/numa_balancing") == "1":
        advice = "an administrator can turn it off: echo 0 > /proc/sys/kernel/numa_balancing"
        return [
            note(
                "affinity",
                "Linux balances memory between NUMA nodes by itself, which costs bandwidth",
                advice,
            )
        ]
    return []


def limits(env: Environment) -> list[Finding]:
    """Open files, and memory that may be locked, which RDMA needs."""
    findings = []
    files = env.limits.get("nofile", None)
    if files is not None and files < FEW_FILES:
        # Gloo and RCCL hold a socket for each peer, and checkpoints a file for each array.
        found = f"only {files} files may be open at once"
        findings.append(warning("limits", found, f"ulimit -n {FEW_FILES * 16}, or as much as it lets you"))
    locked = env.limits.get("memlock", None)
    rdma = env.names("sys/class/infiniband") or env.names("sys/class/cxi")
    if locked is not None and rdma and env.backend != "cpu" and locked < GIB:
        found = f"only {locked / 2**20:.0f} MiB of memory may be locked, but RDMA registers its buffers"
        findings.append(warning("limits", found, "ulimit -l unlimited, in a container --ulimit memlock=-1"))
    return findings or [ok("limits", f"{files or 'unlimited'} open files")]


def shared_memory(env: Environment) -> list[Finding]:
    """/dev/shm, through which RCCL and NCCL join the processes of a node."""
    if env.backend == "cpu":
        return []
    free = env.free_bytes.get("/dev/shm")
    if free is None:
        return [
            note("limits", "nothing is known of /dev/shm", "RCCL needs it between the processes of a node")
        ]
    if free < GIB:
        found = f"/dev/shm has {free / 2**20:.0f} MiB free, but RCCL joins the processes of a node through it"
        return [warning("limits", found, "in a container, --shm-size=16g or --ipc=host")]
    return [ok("limits", f"/dev/shm has {free / GIB:.1f} GiB free")]


def disk(env: Environment) -> list[Finding]:
    """Room for checkpoints."""
    where = str(env.out)
    free = env.free_bytes.get(where)
    if not env.may_write:
        return [error("disk", f"this user may not write into {where}", "choose another --out")]
    if free is None:
        return [warning("disk", f"the file system of {where} does not answer", "choose another --out")]
    advice = "a checkpoint has 12 bytes per parameter; choose another --out, or keep fewer (checkpoint.keep)"
    if free < FULL_BYTES:
        return [error("disk", f"{free / 2**20:.0f} MiB free for {where}", advice)]
    if free < SCARCE_BYTES:
        return [note("disk", f"{free / GIB:.1f} GiB free for {where}", advice)]
    return [ok("disk", f"{free / GIB:,.0f} GiB free for {where}")]


def memory(env: Environment) -> list[Finding]:
    """Memory of the host; simulated devices share it, checkpoints pass through it."""
    if env.memory_bytes is None:
        return []
    text = f"{env.memory_bytes / GIB:.1f} GiB of host memory"
    if env.memory_bytes < 2 * GIB:
        return [warning("memory", text, "little for JAX and a compiler: give the container or the job more")]
    return [ok("memory", text)]


CHECKS = (affinity, numa_balancing, memory, limits, shared_memory, disk)
