"""Machine descriptions: the files are true to their sources, wrong files are refused in one sentence."""

import itertools
from dataclasses import replace

import pytest

from meshes.platform import (
    Attention,
    Device,
    Link,
    Platform,
    Products,
    detect_platform,
    known_platforms,
    load_platform,
)

FRONTIER = load_platform("frontier")


def test_frontier_as_published():
    assert FRONTIER.devices_per_node == 8
    assert FRONTIER.device.memory_bytes == 64 * 2**30
    assert FRONTIER.device.peak_flop_per_second["bfloat16"] == 191.5e12
    assert [(link.name, link.devices) for link in FRONTIER.links] == [
        ("package", 2),
        ("node", 8),
        ("switch", 32),
        ("cabinet", 128 * 8),
        ("system", 77 * 128 * 8),
    ]
    # Four 25 GB/s interfaces serve the eight devices of a node.
    assert FRONTIER.links[2].bytes_per_second * FRONTIER.devices_per_node == 4 * 25e9


@pytest.mark.parametrize("name", known_platforms())
def test_every_file_loads_and_gets_slower_outwards(name):
    platform = load_platform(name)
    assert platform.name == name
    for inner, outer in itertools.pairwise(platform.links):
        assert inner.bytes_per_second >= outer.bytes_per_second
        assert inner.latency_seconds <= outer.latency_seconds


@pytest.mark.parametrize(
    ("platform", "expert", "pipe", "data", "factors"),
    [
        ("cpu8", 4, 2, 1, (1, 1, 4)),  # a node each
        ("cpu8", 8, 1, 1, (1, 2, 4)),  # two nodes
        ("cpu8", 2, 2, 2, (1, 1, 2)),
        ("cpu8", 1, 8, 1, (1, 1, 1)),
        ("frontier", 8, 4, 16, (1, 1, 8)),
        ("frontier", 32, 1, 1, (1, 4, 8)),  # the nodes of a switch
        ("frontier", 128, 2, 1, (4, 4, 8)),  # four switches
        (
            "frontier",
            12,
            1,
            1,
            (1, 3, 4),
        ),  # the first four devices of the second node: no block of 8 would do
        ("frontier", 12, 1, 8, (3, 1, 4)),  # and blocks begin at every multiple of 12, also across switches
        ("frontier", 6, 1, 1, (1, 1, 6)),  # six devices of one node
        ("frontier", 6, 1, 2, (1, 3, 2)),
    ],
)
def test_expert_factors_drawn_out(platform, expert, pipe, data, factors):
    assert load_platform(platform).expert_factors(expert, pipe=pipe, data=data) == factors


@pytest.mark.parametrize("name", ["cpu8", "frontier"])
def test_expert_blocks_never_straddle_and_are_as_large_as_can_be(name):
    platform = load_platform(name)

    def straddles(block, boundary, num_devices):
        starts = range(0, num_devices, block)
        return any(start // boundary != (start + block - 1) // boundary for start in starts)

    for expert, copies in itertools.product([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], [1, 2, 3, 5]):
        group, node, local = platform.expert_factors(expert, pipe=copies, data=1)
        assert group * node * local == expert
        for block, boundary in ((local, platform.devices_per_node), (local * node, platform.switch_devices)):
            largest = max(
                size
                for size in range(1, expert + 1)
                if expert % size == 0 and not straddles(size, boundary, expert * copies)
            )
            assert block == largest


def test_a_machine_without_a_network_is_one_node():
    platform = Platform(name="one", description="one host", device=Device(), devices_per_node=4)
    assert platform.switch_devices is None
    assert platform.expert_factors(4, pipe=1, data=1) == (1, 1, 4)
    assert platform.expert_factors(8, pipe=1, data=1) == (1, 2, 4)


@pytest.mark.parametrize(
    ("backend", "kind", "num_devices", "per_process", "name", "per_node"),
    [
        ("cpu", "cpu", 1, 1, "cpu", 1),
        ("cpu", "cpu", 4, 4, "cpu", 4),
        ("cpu", "cpu", 8, 8, "cpu8", 4),
        ("cpu", "cpu", 8, 4, "cpu", 4),  # two processes
        ("gpu", "AMD Instinct MI250X/MI250", 64, 8, "frontier", 8),
        ("gpu", "AMD Instinct MI250X/MI250", 64, 1, "frontier", 8),  # one process per device
        ("gpu", "AMD Instinct MI300X", 8, 8, "mi300x_node", 8),
        ("gpu", "AMD Instinct MI300A", 4, 4, "el_capitan", 4),  # not the MI300X
        ("gpu", "NVIDIA A100-SXM4-80GB", 8, 8, "a100_pod", 8),
        ("gpu", "NVIDIA A100-SXM4-40GB", 4, 4, "perlmutter", 4),
        ("gpu", "NVIDIA A100-SXM-64GB", 4, 4, "leonardo", 4),
        ("gpu", "NVIDIA A100 80GB PCIe", 2, 2, "a100_pod", 8),
        ("gpu", "NVIDIA H100 80GB HBM3", 8, 8, "h100_pod", 8),
        ("gpu", "NVIDIA H200", 8, 8, "h200_pod", 8),
        ("gpu", "NVIDIA H800", 8, 8, "h800_pod", 8),
        ("gpu", "NVIDIA B200", 8, 8, "b200_pod", 8),
        ("gpu", "NVIDIA B300 SXM6 AC", 8, 8, "b300_pod", 8),
        ("gpu", "NVIDIA GB200", 8, 4, "gb200_nvl72", 64),  # not the B200 in its name
        ("gpu", "NVIDIA GB300", 8, 4, "gb300_nvl72", 64),
        ("gpu", "AMD Instinct MI355X", 8, 8, "mi355x_node", 8),
        ("gpu", "NVIDIA GH200 120GB", 8, 4, "alps", 4),  # no H200
        ("gpu", "NVIDIA GH200 480GB", 1, 1, "alps", 4),
        ("gpu", "AMD Instinct MI300", 4, 2, "generic", 2),
        ("gpu", "Quantum 9000", 4, 2, "generic", 2),
    ],
)
def test_machines_are_recognised(backend, kind, num_devices, per_process, name, per_node):
    platform = detect_platform(backend, kind, num_devices=num_devices, devices_per_process=per_process)
    assert (platform.name, platform.devices_per_node) == (name, per_node)


def test_computers_of_simulated_devices_are_joined_by_a_network():
    one = detect_platform("cpu", "cpu", num_devices=4, devices_per_process=4)
    assert [(link.name, link.devices) for link in one.links] == [("memory", 4)]
    three = detect_platform("cpu", "cpu", num_devices=12, devices_per_process=4)
    assert [(link.name, link.devices) for link in three.links] == [("memory", 4), ("network", 12)]


def test_the_machines_that_are_described():
    pods = [
        "a100_pod",
        "b200_pod",
        "b300_pod",
        "gb200_nvl72",
        "gb300_nvl72",
        "h100_pod",
        "h200_pod",
        "h800_pod",
    ]
    centres = ["alps", "el_capitan", "frontier", "jupiter", "leonardo", "lumi_g", "perlmutter"]
    nodes = ["mi300x_node", "mi355x_node"]
    assert known_platforms() == sorted([*pods, *centres, *nodes, "cpu", "cpu8", "laptop"])
    assert {name: load_platform(name).nics_per_node for name in ("frontier", "h100_pod", "laptop")} == {
        "frontier": 4,
        "h100_pod": 8,
        "laptop": None,
    }


@pytest.mark.parametrize(
    ("name", "nodes_per_group", "groups", "gigabits_per_device"),
    [
        ("perlmutter", 128, 12, 200),
        ("leonardo", 180, 19, 100),
        ("alps", 112, 24, 200),
        ("jupiter", 240, 25, 200),
        ("el_capitan", 128, 87, 200),
    ],
)
def test_supercomputers_of_four_devices_per_node(name, nodes_per_group, groups, gigabits_per_device):
    platform = load_platform(name)
    node, group, system = platform.links
    assert platform.devices_per_node == platform.nics_per_node == node.devices == 4
    assert (group.devices, system.devices) == (4 * nodes_per_group, 4 * nodes_per_group * groups)
    assert group.bytes_per_second == system.bytes_per_second == gigabits_per_device * 1e9 / 8
    # A message between nodes costs a collective library ten times what one of MPI would, 2 to 5 microseconds.
    assert group.message_seconds >= 20e-6


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("perlmutter", "a100_pod"),
        ("leonardo", "a100_pod"),
        ("alps", "h100_pod"),
        ("jupiter", "h100_pod"),
        ("el_capitan", "mi300x_node"),
    ],
)
def test_rates_are_those_of_the_nearest_device_that_is_known(name, nearest):
    ours, known = load_platform(name).device, load_platform(nearest).device
    for table in ("matmul", "grouped_matmul", "attention"):
        rates = getattr(ours, table)
        assert rates == replace(getattr(known, table), provenance=rates.provenance)
    ratios = {ours.peak_flop_per_second[dtype] / peak for dtype, peak in known.peak_flop_per_second.items()}
    units = {"leonardo": 124 / 108, "el_capitan": 228 / 304}.get(name, 1.0)
    assert all(ratio == pytest.approx(units, rel=2e-3) for ratio in ratios)


def test_machines_with_slingshot():
    slingshot = {name for name in known_platforms() if load_platform(name).network == "slingshot"}
    assert slingshot == {"alps", "el_capitan", "frontier", "lumi_g", "perlmutter"}
    with pytest.raises(
        ValueError, match="network must be one of ethernet, infiniband, slingshot, got 'rope'"
    ):
        replace(FRONTIER, network="rope")


@pytest.mark.parametrize("name", known_platforms())
def test_every_machine_can_be_planned_for(name):
    platform = load_platform(name)
    cpu = platform.device.concurrent_devices is not None
    assert platform.rated("bfloat16") and platform.rated("float32")
    # No MFU where the peak is assumed.
    assert (platform.device.known_peak("float32") is None) == cpu
    assert (platform.device.memory_bytes is None) == (name in ("cpu", "cpu8"))
    # Nothing is hidden on simulated devices; elsewhere collectives take something from products.
    assert 0 < platform.device.interference_fraction < 1 or cpu
    seconds = platform.device.product_seconds(4096, 4096, 4096, dtype="bfloat16")
    assert 2 * 4096**3 / seconds < platform.device.peak_flop_per_second["bfloat16"]


def test_an_unknown_accelerator_has_no_peak_and_says_so():
    platform = detect_platform(
        "gpu", "Quantum 9000", num_devices=1, devices_per_process=1, memory_bytes=2**34
    )
    assert platform.device.peak_flop_per_second == {}
    assert platform.device.memory_bytes == 2**34
    assert "no MFU" in platform.description
    assert "Quantum 9000" in platform.description


def test_platforms_are_values():
    assert load_platform("frontier") == FRONTIER
    assert hash(load_platform("frontier")) == hash(FRONTIER)
    with pytest.raises(ValueError, match="devices_per_node must be a whole number"):
        replace(FRONTIER, devices_per_node=0)


DEVICE = """[device]
memory_bytes = 1_000_000
memory_bytes_per_second = 1e9
peak_flop_per_second = { float32 = 1e9 }
"""
GOOD = f"""
description = "two hosts"
devices_per_node = 4
{DEVICE}
[[links]]
name = "host"
devices = 4
bytes_per_second = 1e9
latency_seconds = 1e-6
[[links]]
name = "wire"
devices = 8
bytes_per_second = 1e8
latency_seconds = 1e-5
"""


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    platform = load_platform(str(path))
    assert platform.name == "mine"
    assert platform.switch_devices == 8
    assert platform.links[1] == Link(name="wire", devices=8, bytes_per_second=1e8, latency_seconds=1e-5)


RATES = """
[device.matmul]
efficiency = { float32 = 0.9 }
half_rows = 64
provenance = "published"
[device.grouped_matmul]
efficiency = { float32 = 0.7, bfloat16 = 0.5 }
smallest_flop = 1e6
largest_flop = 1e9
[device.attention]
forward_efficiency = { float32 = 0.5 }
backward_efficiency = { float32 = 0.4 }
half_seq = 256
"""


def test_a_file_with_rates(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(DEVICE, DEVICE + RATES))
    platform = load_platform(str(path))
    assert platform.device.matmul == Products(
        efficiency={"float32": 0.9}, half_rows=64, provenance="published"
    )
    assert platform.device.grouped_matmul.largest_flop == 1e9
    assert platform.device.attention == Attention(
        forward_efficiency={"float32": 0.5}, backward_efficiency={"float32": 0.4}, half_seq=256
    )
    assert platform.rated("float32")
    assert not platform.rated("bfloat16")
    assert isinstance(hash(platform), int)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("half_rows", "half_row", "[device.matmul] has no field 'half_row', did you mean 'half_rows'?"),
        ("half_seq = 256", "half_seq = -1", "[device.attention]: half_seq must be a number of at least 0"),
        ("largest_flop = 1e9", "", "[device.grouped_matmul]: the range of FLOP must have both ends"),
        ("efficiency = { float32 = 0.9 }", "", "[device.matmul] needs the field efficiency"),
        ("{ float32 = 0.9 }", "{ float32 = 90 }", "[device.matmul]: efficiency.float32 must be at most 1"),
        ("[device.attention]", "[device.attend]", "[device] has no field 'attend'"),
    ],
)
def test_wrong_rates_are_refused_in_one_sentence(tmp_path, old, new, sentence):
    path = tmp_path / "mine.toml"
    assert old in RATES
    path.write_text(GOOD.replace(DEVICE, DEVICE + RATES.replace(old, new, 1)))
    with pytest.raises(ValueError) as error:
        load_platform(str(path))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_links_know_the_range_that_was_measured():
    link = Link(
        name="wire",
        devices=8,
        bytes_per_second=1e9,
        latency_seconds=1e-6,
        smallest_bytes=1e3,
        largest_bytes=1e6,
    )
    assert link.covers(1e4)
    assert not link.covers(1e9)
    assert replace(link, smallest_bytes=None, largest_bytes=None).covers(1e9)


def test_network_interfaces_are_shared_evenly():
    assert replace(FRONTIER, devices_per_nic=2).nics_per_node == 4
    assert replace(FRONTIER, devices_per_nic=None).nics_per_node is None
    with pytest.raises(ValueError, match="devices_per_nic must divide the 8 devices of a node, got 3"):
        replace(FRONTIER, devices_per_nic=3)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("devices_per_node = 4", "devices_per_node = ", "is not valid TOML: Invalid value (at line 3"),
        ("devices_per_node = 4", "", "the top level needs the field devices_per_node"),
        (
            "devices_per_node = 4",
            "devices_per_node = 4.0",
            "devices_per_node must be a whole number of at least 1, got 4.0",
        ),
        (
            "devices_per_node = 4",
            "devices_per_node = 3",
            "link 'host' joins 4 devices, which is neither a part nor a",
        ),
        (
            "devices_per_node",
            "device_per_node",
            "the top level has no field 'device_per_node', did you mean 'devices_per_node'?",
        ),
        ("[device]", "[devices]", "the top level has no field 'devices', did you mean 'device'?"),
        (DEVICE, "device = 3\n", "device must be a table headed [device], got 3"),
        ('"two hosts"', '" "', "description must be a non-empty text, got ' '"),
        ("1_000_000", "-5", "device.memory_bytes must be a whole number of at least 1, got -5"),
        ("1_000_000", '"64 GiB"', "device.memory_bytes must be a whole number of at least 1, got '64 GiB'"),
        (
            "per_second = 1e9\npeak",
            "per_second = 0.0\npeak",
            "device.memory_bytes_per_second must be a positive number",
        ),
        ("{ float32 = 1e9 }", "1e9", "device.peak_flop_per_second must give a rate for each dtype"),
        ("float32 = 1e9", "float32 = true", "device.peak_flop_per_second.float32 must be a positive number"),
        ('name = "host"', "", "[[links]] needs the field name"),
        ('name = "host"', "name = 7", "link.name must be a non-empty text, got 7"),
        (
            'name = "host"',
            'name = "host"\nbandwidth = 3',
            "[[links]] has no field 'bandwidth'; its fields are name,",
        ),
        (
            'name = "host"',
            'name = "host"\ntaper_fraction = 57',
            "link 'host': taper_fraction must be at most 1, got 57",
        ),
        (
            'name = "host"',
            'name = "host"\nprovenance = "rumour"',
            "provenance must be one of measured, published, vendor, assumed, got 'rumour'",
        ),
        (
            "latency_seconds = 1e-6",
            "latency_seconds = 2.0",
            "latency_seconds must lie between 1e-8 and 1, got 2.0; write it in seconds",
        ),
        (
            "bytes_per_second = 1e8",
            "bytes_per_second = nan",
            "link 'wire': bytes_per_second must be a positive number",
        ),
        ("devices = 8", "devices = 6", "but 'host' joins 4 and then 'wire' joins 6"),
        ("devices = 8", "devices = 4", "but 'host' joins 4 and then 'wire' joins 4"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(tmp_path, old, new, sentence):
    path = tmp_path / "mine.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        load_platform(str(path))
    assert sentence in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(
        ValueError, match="cannot read platform file .*nowhere.toml: No such file or directory"
    ):
        load_platform(str(tmp_path / "nowhere.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary.toml is not text; it must be TOML in UTF-8"):
        load_platform(str(tmp_path / "binary.toml"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fronteir", "no platform named 'fronteir', did you mean 'frontier'?"),
        ("moon", "no platform named 'moon';"),
    ],
)
def test_unknown_names_suggest(name, hint):
    with pytest.raises(ValueError) as error:
        load_platform(name)
    assert str(error.value).startswith(hint)
    assert ", ".join(known_platforms()) in str(error.value)
