"""Collectives: times computed by hand, and laws of bytes and levels."""

from dataclasses import replace

import numpy as np
import pytest

from meshes.platform import Device, Link, Platform, load_platform
from piperjax.planner.collectives import (
    ALGORITHMS,
    all_gather,
    all_reduce,
    all_to_all,
    between_nodes,
    halo,
    permute,
    reduce_scatter,
)
from piperjax.planner.locality import Group

COLLECTIVES = (all_gather, reduce_scatter, all_reduce, permute, all_to_all)


def link(name, devices, rate, latency, **more):
    return Link(name=name, devices=devices, bytes_per_second=rate, latency_seconds=latency, **more)


# Nodes of 4, switches of 2 nodes, a system of 4 switches that leaves half of the rate when all talk.
TOY = Platform(
    name="toy",
    description="round numbers",
    device=Device(),
    devices_per_node=4,
    links=(
        link("node", 4, 100e9, 1e-6, message_seconds=1e-6),
        link("switch", 8, 10e9, 10e-6, message_seconds=5e-6),
        link("system", 32, 10e9, 20e-6, message_seconds=5e-6, taper_fraction=0.5),
    ),
)


def test_all_to_all_by_hand():
    # 8 devices, 8 MB: parts of 1 MB. Three to the node: 3 MB at 100 GB/s; four to the other: 4 MB at 10 GB/s = 400 us.
    # Posting 3 x 1 us + 4 x 5 us is done long before.
    cost = all_to_all(TOY, Group(8), 8e6)
    assert cost.seconds == pytest.approx(10e-6 + 400e-6)
    assert cost.bytes_by_level == pytest.approx({"node": 3e6, "switch": 4e6, "self": 1e6})
    # 8 kB: the wire needs 0.4 us, a seventh of it after 18 us of posting, as the first is in the latency.
    assert all_to_all(TOY, Group(8), 8e3).seconds == pytest.approx(10e-6 + 18e-6 + 0.4e-6 / 7)
    # halo2: II one message of 4 MB beside I; III spreads 4 MB: 3 messages of 1 MB, 30 us of wire.
    cost = all_to_all(TOY, Group(8), 8e6, algorithm="halo2")
    assert cost.seconds == pytest.approx((10e-6 + 400e-6) + (1e-6 + 30e-6))
    assert cost.bytes_by_level == pytest.approx({"node": 6e6, "switch": 4e6, "self": 1e6})
    # In 4 chunks all but a fourth of III runs beside II, which posts its other three messages while the wire is busy.
    cost = all_to_all(TOY, Group(8), 8e6, algorithm="halo2", chunks=4)
    assert cost.seconds == pytest.approx((10e-6 + 400e-6) + (1e-6 + 30e-6) / 4)
    # halo3: I moves all 8 MB inside the node, 3 parts of 2 MB; two leaders of four share 16 MB, at 10 GB/s each.
    cost = all_to_all(TOY, Group(8), 8e6, algorithm="halo3")
    assert cost.seconds == pytest.approx((1e-6 + 60e-6) + (10e-6 + 800e-6) + (1e-6 + 30e-6))
    assert cost.bytes_by_level == pytest.approx({"node": 9e6, "switch": 4e6, "self": 1e6})


def test_one_index_of_all_nodes_by_hand():
    # 4 MB to the device of the same index in the other node.
    cost = between_nodes(TOY, (1, 2, 4), 8e6)
    assert cost.seconds == pytest.approx(10e-6 + 400e-6)
    assert cost.bytes_by_level == pytest.approx({"switch": 4e6, "self": 4e6})
    # Through leaders all 8 MB also move inside, 2 MB to each of three, twice; two leaders of four share 16 MB.
    cost = between_nodes(TOY, (1, 2, 4), 8e6, striped=True)
    assert cost.seconds == pytest.approx((10e-6 + 800e-6) + 2 * (1e-6 + 60e-6))
    assert cost.bytes_by_level == pytest.approx({"node": 12e6, "switch": 4e6, "self": 8e6})
    for factors in ((1, 1, 4), (1, 8, 1)):
        assert between_nodes(TOY, factors, 8e6, striped=True) == between_nodes(TOY, factors, 8e6)


def test_taper_and_the_shared_network_interface():
    # 32 devices, parts of 1 MB: 28 MB leave the node at 10 GB/s, of which 24 MB leave the switch at 5 GB/s: 4.8 ms.
    cost = all_to_all(TOY, Group(32), 32e6)
    assert cost.seconds == pytest.approx(20e-6 + 4.8e-3)
    wide = replace(TOY, links=(*TOY.links[:2], replace(TOY.links[2], taper_fraction=1.0)))
    # Untapered, the interface is the limit: it carries both.
    assert all_to_all(wide, Group(32), 32e6).seconds == pytest.approx(20e-6 + 2.8e-3)


def test_ring_and_tree_by_hand():
    # 8 devices, 8 MB: each sends 7/8; 1 - 1/4 = 6 MB in the node at 100 GB/s, 1/4 - 1/8 = 1 MB beyond at 10 GB/s.
    # Six hops in a node and one beyond.
    cost = all_gather(TOY, Group(8), 8e6)
    assert cost.seconds == pytest.approx(100e-6 + 6 * 1e-6 + 10e-6)
    assert cost.bytes_by_level == pytest.approx({"node": 6e6, "switch": 1e6})
    # All-reduce: twice the bytes; the tree is 2 hops deep in the node and 1 beyond, both ways.
    assert all_reduce(TOY, Group(8), 8e6).seconds == pytest.approx(200e-6 + 2 * (2e-6 + 10e-6))


def test_neighbour_exchange_by_hand():
    # Stages of 4 devices: every other pair leaves the switch; half of a switch's 8 devices send over the system at
    # once, which leaves them the full rate. Stages of 16: all of them do, and get half.
    assert permute(TOY, Group(8, 4, 32), 1e6).seconds == pytest.approx(20e-6 + 100e-6)
    assert permute(TOY, Group(2, 16, 32), 1e6).seconds == pytest.approx(20e-6 + 200e-6)
    assert permute(TOY, Group(2, 4, 8), 1e6).bytes_by_level == {"switch": 1e6}
    assert permute(TOY, Group(4, 1, 4), 1e6).seconds == pytest.approx(1e-6 + 10e-6)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_one_device_costs_nothing(collective):
    for platform in (TOY, replace(TOY, links=())):
        cost = collective(platform, Group(1, 1, 32), 1e6)
        assert cost.seconds == 0 and cost.sent_bytes == 0


def test_a_group_within_a_node_never_touches_outer_links():
    slow = replace(
        TOY, links=(TOY.links[0], *(replace(outer, bytes_per_second=1.0) for outer in TOY.links[1:]))
    )
    for collective in COLLECTIVES:
        group = Group(4, 1, 32)
        cost = collective(TOY, group, 1e6)
        assert set(cost.bytes_by_level) <= {"node", "self"}
        assert collective(slow, group, 1e6) == cost
    for algorithm in ALGORITHMS:
        assert all_to_all(TOY, (1, 1, 4), 1e6, algorithm=algorithm) == all_to_all(TOY, (1, 1, 4), 1e6)


@pytest.mark.parametrize("platform", [TOY, load_platform("frontier"), load_platform("h100_pod")])
@pytest.mark.parametrize("size", [2, 4, 6, 16, 24, 32])
def test_laws_of_bytes(platform, size):
    group, num_bytes = Group(size), 5e6
    for collective, total in [
        (all_gather, (size - 1) / size),
        (reduce_scatter, (size - 1) / size),
        (all_reduce, 2 * (size - 1) / size),
        (permute, 1),
        (all_to_all, (size - 1) / size),
    ]:
        assert collective(platform, group, num_bytes).sent_bytes == pytest.approx(total * num_bytes)
    flat = all_to_all(platform, group, num_bytes)
    assert sum(flat.bytes_by_level.values()) == pytest.approx(num_bytes)
    outside = [way.name for way in platform.links if way.devices > platform.devices_per_node]
    for algorithm in ("halo2", "halo3"):
        cost = all_to_all(platform, group, num_bytes, algorithm=algorithm)
        assert cost.bytes_by_level["self"] == flat.bytes_by_level["self"]
        for name in outside:
            assert cost.bytes_by_level.get(name, 0) == pytest.approx(flat.bytes_by_level.get(name, 0))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_arrays_and_monotone(algorithm):
    sizes = np.geomspace(1e3, 1e9, 25)
    for group in (Group(4), Group(8), Group(32)):
        together = all_to_all(TOY, group, sizes, algorithm=algorithm).seconds
        single = [all_to_all(TOY, group, float(size), algorithm=algorithm).seconds for size in sizes]
        np.testing.assert_allclose(together, single, rtol=1e-12)
        assert (np.diff(together) > 0).all()
    for collective in COLLECTIVES[:-1]:
        assert (np.diff(collective(TOY, Group(32), sizes).seconds) > 0).all()


def test_hierarchy_wins_small_messages_and_loses_large_ones():
    def seconds(algorithm, num_bytes, nodes=8):
        return all_to_all(load_platform("frontier"), Group(8 * nodes), num_bytes, algorithm=algorithm).seconds

    posting = replace(TOY.links[1], message_seconds=15e-6)
    slow = replace(TOY, links=(TOY.links[0], posting, replace(TOY.links[2], message_seconds=15e-6)))
    costs = {a: all_to_all(slow, Group(32), 1e4, algorithm=a).seconds for a in ALGORITHMS}
    assert costs["halo3"] < costs["halo2"] < costs["flat"]
    assert seconds("flat", 1e9) < seconds("halo2", 1e9) < seconds("halo3", 1e9)


def test_it_says_when_it_extrapolates():
    measured = replace(TOY.links[0], smallest_bytes=1e3, largest_bytes=1e6)
    platform = replace(TOY, links=(measured, *TOY.links[1:]))
    assert all_gather(platform, Group(4), 1e6).notes == ()
    assert (
        "link 'node': sizes outside those that were measured" in all_gather(platform, Group(4), 1e7).notes[0]
    )
    assert all_gather(platform, Group(2, 4), 1e7).notes == ()
    assert len(all_to_all(platform, Group(4), np.array([1e5, 1e9])).notes) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: all_gather(TOY, Group(64), 1), "'toy' joins at most 32 devices, got a mesh of 64"),
        (lambda: all_to_all(TOY, (2, 8, 4), 1), "at most 32 devices, got a mesh of 64"),
        (
            lambda: all_gather(replace(TOY, links=()), Group(2), 1),
            "describes no links, so a group of 2 devices",
        ),
        (lambda: all_to_all(TOY, Group(4), 1, algorithm="halo"), "one of flat, halo2, halo3, got 'halo'"),
        (lambda: all_to_all(TOY, Group(8), 1, chunks=2), "only halo2 is cut into chunks, got 2 for flat"),
        (
            lambda: halo(TOY, Group(8), near_bytes=1, far_bytes=1, spread_bytes=1, striped=True, chunks=2),
            "got 2",
        ),
    ],
)
def test_a_mistake_is_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()
