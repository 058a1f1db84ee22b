"""This file is the checks of the network between devices: environment of RCCL, NCCL and libfabric, and names of hosts.

Sources of what each variable does and should be:
  [olcf]   OLCF user documentation, "PyTorch on Frontier", sections "RCCL Network Plugin" to "Manual ... Configuration".
  [hpe]    HewlettPackard/shs-ccl-docs, rccl/rccl_tuning_guide.md: RCCL over Slingshot.
  [cscs]   eth-cscs/cscs-docs, docs/software/communication/nccl.md: NCCL over Slingshot.
  [nccl]   NVIDIA NCCL user guide, "Environment Variables".
  [rccl]   RCCL, src/init.cc: checkHsaEnvSetting.
  [amd]    AMD-AGI/maxtext-slurm, train_env.sh: MaxText on MI300X and MI355X.
  [primus] AMD-AGI/Primus, runner/helpers/envs/MI355X.sh, and pull request 1178.
"""

import ipaddress

from piperjax.doctor.environment import Environment
from piperjax.doctor.finding import Finding, error, note, ok, warning

# Slingshot's variables, the values that do, and what the first of them is for. [olcf] [hpe] [cscs]
SLINGSHOT = {
    "FI_CXI_DISABLE_HOST_REGISTER": (("1",), "registering host memory can deadlock RCCL"),
    "FI_CXI_DEFAULT_CQ_SIZE": (("131072",), "all-to-alls overflow the default completion queue"),
    "FI_CXI_RX_MATCH_MODE": (
        ("hybrid", "software"),
        "goes on in software when the hardware's lists are full",
    ),
    "FI_CXI_RDZV_PROTO": (("alt_read",), "the rendezvous protocol for traffic of RCCL"),
    "FI_CXI_RDZV_EAGER_SIZE": (("0",), "nothing is sent before the receiver is ready"),
    "FI_CXI_RDZV_THRESHOLD": (("0",), "every message goes by rendezvous"),
    "FI_CXI_RDZV_GET_MIN": (("0",), "belongs to alt_read"),
    "FI_CXI_DEFAULT_TX_SIZE": (("2048", "32768"), "large jobs have many messages under way"),
    "NCCL_CROSS_NIC": (("1",), "faster on many nodes"),
    "NCCL_NET_GDR_LEVEL": (("PHB", "3"), "interfaces read device memory directly"),
}
ROCM_SLINGSHOT = {"HSA_FORCE_FINE_GRAIN_PCIE": (("1",), "interfaces and GPUs read each other's memory")}
CUDA_SLINGSHOT = {"NCCL_PROTO": (("^LL128",), "the protocol LL128 is slower on Slingshot")}  # [cscs]
PLUGIN_LIBRARIES = ("librccl-net.so", "libnccl-net.so")


def has_slingshot(env: Environment) -> bool:
    """Whether this is a node on HPE Slingshot, by its interfaces or by the platform that was named."""
    named = env.expected is not None and env.expected.network == "slingshot"
    return named or bool(env.names("sys/class/cxi"))


def collective_library(env: Environment) -> str:
    """The library of the GPUs that are here, NCCL or RCCL; where none is, of the platform that was named."""
    gpu = env.expected.device.gpu if env.expected else ""
    named = env.backend == "cpu" and gpu != "" and not gpu.startswith("mi")
    return "NCCL" if env.backend == "cuda" or named else "RCCL"


def slingshot_variables(env: Environment) -> list[Finding]:
    """Variables that the operators of Slingshot machines set for collective libraries."""
    if not has_slingshot(env):
        return []
    library = collective_library(env)
    table = SLINGSHOT | (CUDA_SLINGSHOT if library == "NCCL" else ROCM_SLINGSHOT)
    findings = []
    monitor = env.environ.get("FI_MR_CACHE_MONITOR")
    if monitor == "memhooks":
        advice = "export FI_MR_CACHE_MONITOR=userfaultfd (or kdreg2)"
        findings.append(
            error("slingshot", f"FI_MR_CACHE_MONITOR=memhooks deadlocks with {library}'s plugin", advice)
        )
    elif monitor not in ("userfaultfd", "kdreg2"):
        found = f"FI_MR_CACHE_MONITOR={monitor}" if monitor else "FI_MR_CACHE_MONITOR is not set"
        advice = "export FI_MR_CACHE_MONITOR=userfaultfd: the default of some releases, memhooks, deadlocks"
        findings.append(warning("slingshot", found, advice))
    missing = [name for name in table if name not in env.environ]
    if missing:
        values = " ".join(f"{name}={table[name][0][0]}" for name in missing)
        found = f"{len(missing)} variables that {library} needs on Slingshot are not set"
        module = "load rccl-net-plugin, as launch/frontier.sbatch does, or " if library == "RCCL" else ""
        advice = f"{module}export {values}"
        findings.append(warning("slingshot", found, advice))
    for name, (values, reason) in table.items():
        if name in env.environ and env.environ[name] not in values:
            advice = f"{values[0]} is recommended: {reason}"
            findings.append(warning("slingshot", f"{name}={env.environ[name]}", advice))
    if env.environ.get("FI_CXI_RDZV_PROTO") == "alt_read" and "rdzv" not in env.environ.get(
        "SLURM_NETWORK", ""
    ):
        advice = "ask for the job with --network=disable_rdzv_get"
        findings.append(
            note("slingshot", "FI_CXI_RDZV_PROTO=alt_read works in jobs whose network allows it", advice)
        )
    return findings or [
        ok("slingshot", f"libfabric and {library} are set up as operators of Slingshot recommend")
    ]


def network_plugin(env: Environment) -> list[Finding]:
    """The plugin through which RCCL and NCCL reach Slingshot; without it they use TCP [olcf] [hpe]."""
    if not has_slingshot(env):
        return []
    name = collective_library(env)
    module = "rccl-net-plugin" if name == "RCCL" else "aws-ofi-nccl"
    named = env.environ.get("NCCL_NET_PLUGIN", "")
    if "/" in named:
        if not (env.root / named.lstrip("/")).exists():
            found = f"NCCL_NET_PLUGIN names {named}, which does not exist"
            return [error("slingshot", found, f"correct it, or load the module {module}")]
        return [ok("slingshot", f"{name}'s network plugin is {named}"), *_forced_network(env)]
    library = env.library(*PLUGIN_LIBRARIES)
    if library is None:
        found = f"neither NCCL_NET_PLUGIN nor LD_LIBRARY_PATH leads to {' or '.join(PLUGIN_LIBRARIES)}"
        advice = (
            f"load the module {module}, or build aws-ofi-nccl and export NCCL_NET_PLUGIN=.../lib{name.lower()}-net.so: "
            f"without it {name} uses TCP between nodes, many times slower"
        )
        return [warning("slingshot", found, advice), *_forced_network(env)]
    return [ok("slingshot", f"{name}'s network plugin is {library}"), *_forced_network(env)]


def _forced_network(env: Environment) -> list[Finding]:
    network = env.environ.get("NCCL_NET")
    if network in ("OFI", "AWS Libfabric") and env.num_nodes == 1:
        advice = "unset it in jobs of one node, whose network is not configured: the plugin would not start"
        return [warning("slingshot", f"NCCL_NET={network} with one node", advice)]
    if network is None and env.num_nodes > 1:
        value = "OFI" if collective_library(env) == "RCCL" else '"AWS Libfabric"'  # [cscs]
        advice = (
            f"export NCCL_NET={value}, so that a plugin that does not load ends the run instead of slowing it"
        )
        return [note("slingshot", "NCCL_NET is not set", advice)]
    return []


def socket_interfaces(env: Environment) -> list[Finding]:
    """NCCL_SOCKET_IFNAME: prefixes of interfaces, `=` before exact names, `^` before those to avoid [nccl]."""
    given, there = env.environ.get("NCCL_SOCKET_IFNAME"), env.names("sys/class/net")
    if given is None:
        fast = [name for name in there if name.startswith("hsn")]
        if fast:
            advice = f"export NCCL_SOCKET_IFNAME={','.join(fast)} (only {fast[0]} where it hangs)"
            found = "NCCL_SOCKET_IFNAME is not set, so RCCL may meet on the management network"
            return [warning("interfaces", found, advice)]
        return []
    if not there or given.startswith("^"):
        return []
    exact, names = given.startswith("="), [name for name in given.lstrip("=").split(",") if name]
    chosen = [
        name for name in there for want in names if name == want or (not exact and name.startswith(want))
    ]
    if not chosen:
        found = f"NCCL_SOCKET_IFNAME={given} matches none of {', '.join(there)}"
        return [error("interfaces", found, "name an interface that joins the nodes, or unset it")]
    if set(chosen) == {"lo"} and env.num_nodes > 1:
        found = f"NCCL_SOCKET_IFNAME={given} is the loopback interface"
        return [error("interfaces", found, "name an interface that joins the nodes")]
    return [ok("interfaces", f"NCCL_SOCKET_IFNAME={given}: {', '.join(dict.fromkeys(chosen))}")]


def debugging_switches(env: Environment) -> list[Finding]:
    """Transports that are turned off, which is for finding faults [nccl]."""
    switches = {
        "NCCL_P2P_DISABLE": "GPUs of a node then talk through host memory",
        "NCCL_SHM_DISABLE": "processes of a node then talk through the network",
        "NCCL_IB_DISABLE": "nodes then talk through TCP",
    }
    return [
        warning("network", f"{name}=1: {effect}", "unset it unless you look for a fault")
        for name, effect in switches.items()
        if env.environ.get(name, "0") not in ("0", "")
    ]


def gpu_aware_mpi(env: Environment) -> list[Finding]:
    """MPI that moves device memory while the collective library does; nothing here calls MPI [cscs]."""
    if env.environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1" and env.backend != "cpu":
        advice = "export MPICH_GPU_SUPPORT_ENABLED=0 unless code of yours needs it"
        found = "MPICH_GPU_SUPPORT_ENABLED=1: GPU-aware MPI beside NCCL or RCCL can deadlock"
        return [note("network", found, advice)]
    return []


def instinct_variables(env: Environment) -> list[Finding]:
    """Variables that matter on MI300X and MI355X."""
    kinds = {name for name in ("mi300x", "mi325x", "mi350x", "mi355x") if name in _device_names(env)}
    if not kinds:
        return []
    findings, given = [], env.environ
    if given.get("HSA_NO_SCRATCH_RECLAIM") != "1":  # [rccl] [amd]
        found = "HSA_NO_SCRATCH_RECLAIM is not 1"
        advice = "export HSA_NO_SCRATCH_RECLAIM=1: releases of RCCL end at the first collective without it"
        findings.append(warning("rccl", found, advice))
    if kinds & {"mi350x", "mi355x"} and given.get("RCCL_WARP_SPEED_AUTO") != "0":  # [primus]
        advice = "export RCCL_WARP_SPEED_AUTO=0: collectives of this generation have brought NaN with it"
        findings.append(warning("rccl", "RCCL_WARP_SPEED_AUTO is not 0", advice))
    if given.get("GPU_MAX_HW_QUEUES") is None:  # [amd]
        advice = "AMD trains with GPU_MAX_HW_QUEUES=2, so that collectives have a queue beside computation"
        findings.append(note("rccl", "GPU_MAX_HW_QUEUES is not set", advice))
    if given.get("NCCL_DMABUF_ENABLE") == "1" and not env.names("boot"):  # [amd]
        advice = (
            "mount /boot read-only into the container, or unset it: RCCL reads the kernel's settings there"
        )
        findings.append(warning("rccl", "NCCL_DMABUF_ENABLE=1 but /boot is empty, which can crash", advice))
    return findings or [ok("rccl", "RCCL is set up as AMD trains on these devices")]


def _device_names(env: Environment) -> str:
    named = env.expected.name if env.expected else ""
    return " ".join([named, *env.devices.kinds]).lower()


def infiniband(env: Environment) -> list[Finding]:
    """RDMA interfaces and the choice among them [nccl]."""
    there, given = env.names("sys/class/infiniband"), env.environ.get("NCCL_IB_HCA")
    if given and there and not given.startswith("^"):
        wanted = [part.split(":")[0] for part in given.lstrip("=").split(",") if part]
        absent = [name for name in wanted if not any(device.startswith(name) for device in there)]
        if absent:
            found = f"NCCL_IB_HCA names {', '.join(absent)}, but there are {', '.join(there)}"
            return [error("interfaces", found, "correct it, or unset it")]
    if there and env.num_nodes > 1 and env.environ.get("NCCL_IB_DISABLE", "0") == "0":
        down = [
            name for name in there if "ACTIVE" not in env.text(f"sys/class/infiniband/{name}/ports/1/state")
        ]
        if down and not given:
            found = f"{len(down)} of {len(there)} RDMA interfaces are not active: {', '.join(down)}"
            return [note("interfaces", found, "name the others in NCCL_IB_HCA if NCCL complains")]
    return [ok("interfaces", f"RDMA interfaces {', '.join(there)}")] if there else []


def hostname(env: Environment) -> list[Finding]:
    """Whether other processes can reach this one by its name, as gloo and JAX's coordinator need."""
    advice = f"map {env.hostname} to the address of this machine on the network of the nodes in /etc/hosts"
    several = env.num_nodes > 1 or (env.number("SLURM_STEP_NUM_TASKS") or 1) > 1
    grade = error if several else note
    if env.addresses is None:
        return [
            grade("hostname", f"nobody said in time what {env.hostname} resolves to", "see /etc/resolv.conf")
        ]
    if not env.addresses:
        found = f"{env.hostname} resolves to nothing, so several processes could not find each other"
        return [grade("hostname", found, advice)]
    remote = [
        address for address in env.addresses if not ipaddress.ip_address(address.split("%")[0]).is_loopback
    ]
    if not remote:
        found = f"{env.hostname} resolves to {env.addresses[0]}, where no other machine can reach it"
        return [(error if env.num_nodes > 1 else note)("hostname", found, advice)]
    return [ok("hostname", f"{env.hostname} is {remote[0]}")]


def interface_affinity(env: Environment) -> list[Finding]:
    """How many network interfaces there are against the platform's, and beside which memory."""
    folder = "sys/class/cxi" if env.names("sys/class/cxi") else "sys/class/infiniband"
    there = env.names(folder)
    if not there:
        if has_slingshot(env):
            found = f"{env.expected.name if env.expected else 'this machine'} is on Slingshot, but no interface is here"
            return [
                warning(
                    "interfaces",
                    found,
                    "run this on a compute node; a container needs /sys and /dev/cxi*",
                )
            ]
        return []
    nodes = [env.text(f"{folder}/{name}/device/numa_node") for name in there]
    found = ", ".join(f"{name} (NUMA {node or '?'})" for name, node in zip(there, nodes, strict=True))
    expected = env.platform.nics_per_node if env.platform else None
    if expected and len(there) != expected:
        text = f"{len(there)} network interfaces ({found}), but a node of {env.platform.name} has {expected}"
        return [note("interfaces", text, "plans count on all of them")]
    return [ok("interfaces", found)]


CHECKS = (
    hostname,
    socket_interfaces,
    interface_affinity,
    infiniband,
    slingshot_variables,
    network_plugin,
    instinct_variables,
    debugging_switches,
    gpu_aware_mpi,
)
