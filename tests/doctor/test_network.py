"""Tests of the checks of the network: Slingshot, RCCL, interfaces, names."""

import re
from pathlib import Path

import pytest

from meshes.platform import load_platform
from piperjax.doctor import network
from piperjax.doctor.network import (
    CUDA_SLINGSHOT,
    ROCM_SLINGSHOT,
    SLINGSHOT,
    debugging_switches,
    gpu_aware_mpi,
    hostname,
    infiniband,
    instinct_variables,
    interface_affinity,
    network_plugin,
    slingshot_variables,
    socket_interfaces,
)

ROOT = Path(__file__).parents[2]
CXI = {f"sys/class/cxi/cxi{number}/device/numa_node": str(number) for number in range(4)}
GOOD = {name: values[0] for name, (values, _) in (SLINGSHOT | ROCM_SLINGSHOT).items()} | {
    "FI_MR_CACHE_MONITOR": "kdreg2",
    "SLURM_NETWORK": "disable_rdzv_get",
}
TWO_NODES = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"}


def levels(findings):
    return [finding.level for finding in findings]


def test_slingshot_that_is_set_up(machine, told):
    env = machine.rocm(files=CXI, environ=GOOD)
    assert told(slingshot_variables(env)) == [
        ("ok", "libfabric and RCCL are set up as operators of Slingshot recommend")
    ]
    assert slingshot_variables(machine(environ={})) != [] and levels(interface_affinity(env)) == ["ok"]


def test_elsewhere_nothing_is_asked_of_slingshot(machine):
    env = machine.rocm()
    assert slingshot_variables(env) == network_plugin(env) == interface_affinity(env) == []


def test_slingshot_that_is_not_set_up(machine):
    findings = slingshot_variables(machine.rocm(files=CXI))
    assert levels(findings) == ["warning", "warning"]
    assert findings[0].found == "FI_MR_CACHE_MONITOR is not set"
    for name in SLINGSHOT | ROCM_SLINGSHOT:
        assert f"{name}=" in findings[1].advice


def test_the_monitor_that_deadlocks_is_an_error(machine):
    (finding,) = slingshot_variables(
        machine.rocm(files=CXI, environ=GOOD | {"FI_MR_CACHE_MONITOR": "memhooks"})
    )
    assert finding.level == "error" and "memhooks deadlocks with RCCL's plugin" in finding.sentence


@pytest.mark.parametrize("name", SLINGSHOT)
def test_each_value_that_is_not_recommended(machine, name):
    (finding,) = slingshot_variables(machine.rocm(files=CXI, environ=GOOD | {name: "odd"}))
    assert finding.level == "warning" and finding.sentence.startswith(
        f"{name}=odd; {SLINGSHOT[name][0][0]} is recomm"
    )


def test_alt_read_needs_a_network_that_allows_it(machine):
    environ = {name: value for name, value in GOOD.items() if name != "SLURM_NETWORK"}
    (finding,) = slingshot_variables(machine.rocm(files=CXI, environ=environ))
    assert finding.level == "note" and finding.advice == "ask for the job with --network=disable_rdzv_get"


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("frontier", "RCCL"),
        ("lumi_g", "RCCL"),
        ("el_capitan", "RCCL"),
        ("alps", "NCCL"),
        ("perlmutter", "NCCL"),
    ],
)
def test_a_platform_that_is_named_has_slingshot(machine, name, library):
    env = machine(expected=load_platform(name))
    _, missing = slingshot_variables(env)
    assert f"variables that {library} needs on Slingshot are not set" in missing.found
    assert ("HSA_FORCE_FINE_GRAIN_PCIE=1" in missing.advice) == (library == "RCCL")
    assert ("NCCL_PROTO=^LL128" in missing.advice) == (library == "NCCL")
    (plugin,) = network_plugin(env)
    assert f"without it {library} uses TCP" in plugin.advice
    assert ("aws-ofi-nccl, or" in plugin.advice) == (library == "NCCL")
    (finding,) = interface_affinity(env)
    assert finding.found == f"{name} is on Slingshot, but no interface is here"


@pytest.mark.parametrize("name", ["h100_pod", "leonardo", "jupiter", "mi300x_node"])
def test_a_platform_that_is_named_has_another_network(machine, name):
    env = machine(expected=load_platform(name))
    assert slingshot_variables(env) == network_plugin(env) == interface_affinity(env) == []


def test_slingshot_with_nccl(machine, told):
    good = {key: value for key, value in GOOD.items() if key not in ROCM_SLINGSHOT}
    good |= {key: values[0] for key, (values, _) in CUDA_SLINGSHOT.items()}
    alps = load_platform("alps")
    assert told(slingshot_variables(machine(expected=alps, files=CXI, environ=good))) == [
        ("ok", "libfabric and NCCL are set up as operators of Slingshot recommend")
    ]
    environ = good | TWO_NODES | {"NCCL_NET_PLUGIN": "/net/lib/libnccl-net.so"}
    found, forced = network_plugin(machine(expected=alps, files=["net/lib/libnccl-net.so"], environ=environ))
    assert found.found == "NCCL's network plugin is /net/lib/libnccl-net.so"
    assert 'export NCCL_NET="AWS Libfabric"' in forced.advice


def test_the_job_script_sets_what_is_recommended():
    script = (ROOT / "launch/frontier.sbatch").read_text()
    exported = dict(re.findall(r"^export (\w+)=([^\s#]*)", script, flags=re.MULTILINE))
    for name, (values, _) in (SLINGSHOT | ROCM_SLINGSHOT).items():
        assert exported.get(name) in values, name
    assert exported["FI_MR_CACHE_MONITOR"] in ("userfaultfd", "kdreg2")
    assert "--network=disable_rdzv_get" in script


def test_the_network_plugin(machine, told):
    (finding,) = network_plugin(machine.rocm(files=CXI))
    assert finding.level == "warning" and "without it RCCL uses TCP between nodes" in finding.sentence
    (finding,) = network_plugin(machine.rocm(environ={"NCCL_NET_PLUGIN": "/net/lib/librccl-net.so"}))
    assert told([finding]) == [
        (
            "error",
            "NCCL_NET_PLUGIN names /net/lib/librccl-net.so, which does not exist; correct it, or load the module "
            "rccl-net-plugin",
        )
    ]
    files = ["net/lib/librccl-net.so"]
    for environ in ({"NCCL_NET_PLUGIN": "/net/lib/librccl-net.so"}, {"LD_LIBRARY_PATH": "/net/lib"}):
        assert levels(network_plugin(machine.rocm(files=files, environ=environ))) == ["ok"]


def test_a_network_that_is_forced(machine):
    plugin = {"LD_LIBRARY_PATH": "/net/lib"}
    machine(files=[*CXI, "net/lib/librccl-net.so"])
    good, finding = network_plugin(machine.rocm(environ=plugin | {"NCCL_NET": "OFI"}))
    assert (good.level, finding.level) == ("ok", "warning") and finding.found == "NCCL_NET=OFI with one node"
    good, finding = network_plugin(machine.rocm(environ=plugin | TWO_NODES))
    assert (good.level, finding.level) == ("ok", "note") and "export NCCL_NET=OFI" in finding.advice
    assert levels(network_plugin(machine.rocm(environ=plugin | TWO_NODES | {"NCCL_NET": "OFI"}))) == ["ok"]


@pytest.mark.parametrize(
    ("given", "level", "words"),
    [
        (None, "warning", "export NCCL_SOCKET_IFNAME=hsn0,hsn1 (only hsn0 where it hangs)"),
        ("hsn0", "ok", "NCCL_SOCKET_IFNAME=hsn0: hsn0"),
        ("hsn", "ok", "hsn0, hsn1"),
        ("=hsn", "error", "matches none of eth0, hsn0, hsn1, lo; name an interface that joins the nodes"),
        ("ib0", "error", "NCCL_SOCKET_IFNAME=ib0 matches none"),
        ("lo", "error", "is the loopback interface"),
    ],
)
def test_interfaces(machine, given, level, words):
    environ = TWO_NODES | ({"NCCL_SOCKET_IFNAME": given} if given else {})
    files = [f"sys/class/net/{name}" for name in ("lo", "eth0", "hsn0", "hsn1")]
    (finding,) = socket_interfaces(machine(files=files, environ=environ))
    assert finding.level == level and words in finding.sentence


def test_interfaces_that_cannot_be_judged(machine):
    assert socket_interfaces(machine(files=["sys/class/net/eth0"])) == []
    assert socket_interfaces(machine(environ={"NCCL_SOCKET_IFNAME": "^docker"})) == []


def test_how_many_interfaces_there_are(machine):
    (finding,) = interface_affinity(machine.rocm(files=CXI))
    assert finding.sentence == "cxi0 (NUMA 0), cxi1 (NUMA 1), cxi2 (NUMA 2), cxi3 (NUMA 3)"
    (finding,) = interface_affinity(machine.rocm(kind="AMD Instinct MI300X"))
    assert finding.level == "note" and "but a node of mi300x_node has 8" in finding.found


def test_rdma_interfaces(machine, told):
    files = {f"sys/class/infiniband/mlx5_{number}/ports/1/state": "4: ACTIVE" for number in range(2)}
    env = machine.rocm(files=files, environ=TWO_NODES)
    assert told(infiniband(env)) == [("ok", "RDMA interfaces mlx5_0, mlx5_1")]
    (finding,) = infiniband(machine.rocm(environ={"NCCL_IB_HCA": "mlx5_0,rdma7:1"}))
    assert (
        finding.level == "error" and "NCCL_IB_HCA names rdma7, but there are mlx5_0, mlx5_1" in finding.found
    )
    files["sys/class/infiniband/mlx5_1/ports/1/state"] = "1: DOWN"
    (finding,) = infiniband(machine.rocm(files=files, environ=TWO_NODES))
    assert finding.level == "note" and "1 of 2 RDMA interfaces are not active: mlx5_1" in finding.found


def test_variables_of_mi300x_and_mi355x(machine):
    assert instinct_variables(machine.rocm()) == []
    good = {"HSA_NO_SCRATCH_RECLAIM": "1", "GPU_MAX_HW_QUEUES": "2"}
    assert levels(instinct_variables(machine.rocm(kind="AMD Instinct MI300X", environ=good))) == ["ok"]
    (finding,) = instinct_variables(machine.rocm(kind="AMD Instinct MI355X", environ=good))
    assert finding.level == "warning" and "export RCCL_WARP_SPEED_AUTO=0" in finding.advice
    scratch, _, queues = instinct_variables(machine(expected=load_platform("mi355x_node")))
    assert "export HSA_NO_SCRATCH_RECLAIM=1" in scratch.advice and queues.level == "note"
    environ = good | {"NCCL_DMABUF_ENABLE": "1"}
    (finding,) = instinct_variables(machine.rocm(kind="AMD Instinct MI300X", environ=environ))
    assert finding.found == "NCCL_DMABUF_ENABLE=1 but /boot is empty, which can crash"


def test_switches_for_finding_faults(machine):
    (finding,) = debugging_switches(machine(environ={"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "0"}))
    assert finding.level == "warning" and "NCCL_P2P_DISABLE=1: GPUs of a node" in finding.sentence


def test_gpu_aware_mpi(machine):
    environ = {"MPICH_GPU_SUPPORT_ENABLED": "1"}
    assert levels(gpu_aware_mpi(machine.rocm(environ=environ))) == ["note"]
    assert gpu_aware_mpi(machine(environ=environ)) == [] == gpu_aware_mpi(machine.rocm())


@pytest.mark.parametrize(
    ("addresses", "alone", "together", "words"),
    [
        (("10.0.0.1",), "ok", "ok", "node7 is 10.0.0.1"),
        (
            ("127.0.1.1", "::1"),
            "note",
            "error",
            "node7 resolves to 127.0.1.1, where no other machine can reach it",
        ),
        (("127.0.0.1", "10.0.0.1"), "ok", "ok", "node7 is 10.0.0.1"),
        (("fe80::1%eth0",), "ok", "ok", "node7 is fe80::1%eth0"),
        (
            (),
            "note",
            "error",
            "node7 resolves to nothing, so several processes could not find each other; map node7",
        ),
        (None, "note", "error", "nobody said in time what node7 resolves to"),
    ],
)
def test_the_name_of_this_machine(machine, addresses, alone, together, words):
    for environ, level in (({}, alone), (TWO_NODES, together)):
        (finding,) = hostname(machine(hostname="node7", addresses=addresses, environ=environ))
        assert finding.level == level and words in finding.sentence


def test_every_source_is_cited_where_it_is_used():
    _, heading, body = Path(network.__file__).read_text().split('"""', 2)
    sources = re.findall(r"^  \[(\w+)\]", heading, flags=re.MULTILINE)
    assert len(sources) == 7 and [name for name in sources if f"[{name}]" not in body] == []
