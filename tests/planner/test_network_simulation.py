"""The simulation of all-to-alls: by hand, against a loop over messages, measured networks and the closed forms."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.network import (
    NODES,
    SPEEDUPS,
    closed_form_ratios,
    frontier_like,
    geometric_mean_error,
    link,
    machine,
    measured_errors,
    simulated_speedups,
)
from meshes.platform import Device, Link, Platform
from piperjax.planner import network_simulation
from piperjax.planner.collectives import all_to_all, leaders_of_a_pair
from piperjax.planner.locality import Group
from piperjax.planner.network_simulation import num_messages, simulate_all_to_all

# Two devices a node, one interface each.
PAIRS = machine(
    "pairs",
    "round numbers",
    link("node", 2, 100e9, 1e-6),
    link("switch", 8, 10e9, 10e-6),
    link("system", 32, 10e9, 10e-6, taper=0.5),
    devices_per_node=2,
    devices_per_nic=1,
)


def test_by_hand():
    # One node of two devices: one message of half the bytes, 1 us and 10 us.
    assert simulate_all_to_all(PAIRS, 1, 2e6) == pytest.approx(11e-6)
    # Two nodes, parts of 1 MB, 100 us. Device 0 posts to 1 (1 us), 2 (11 us), 3 (21 us): these two take its interface
    # until 211 us. Device 1 posts to 2, 3 (10, 20 us), 0 (21 us). At the interface of 2 the message of 1 comes first
    # (10 us), then that of 0 (11 us): until 210 us. At 3, that of 0 leaves its own at 111 and comes after that of 1,
    # which has left at 110: until 310 us, as its destination is still busy until 210 us.
    assert simulate_all_to_all(PAIRS, 2, 4e6) == pytest.approx(310e-6)
    # halo2: 2 MB over the network (10 + 200 us) beside 1 MB inside, then 1 MB inside (1 + 10 us).
    assert simulate_all_to_all(PAIRS, 2, 4e6, "halo2") == pytest.approx(221e-6)


def test_halo2_equals_the_closed_form_where_nothing_queues():
    for nodes in (2, 4):
        found = simulate_all_to_all(PAIRS, nodes, 4e6, "halo2")
        assert found == pytest.approx(
            all_to_all(PAIRS, Group(2 * nodes), 4e6, algorithm="halo2").seconds, rel=0.02
        )


def test_queues_against_a_loop_over_messages():
    rng = np.random.default_rng(0)
    for count, servers in [(1, 1), (200, 7), (500, 1), (300, 300)]:
        server = rng.integers(0, servers, count)
        arrival, service = rng.exponential(1e-3, count), rng.exponential(1e-5 * count, count)
        start, end = network_simulation._queue(server, arrival, service)
        free = np.zeros(servers)
        for i in np.argsort(arrival, kind="stable"):
            begin = max(arrival[i], free[server[i]])
            free[server[i]] = begin + service[i]
            assert start[i] == pytest.approx(begin) and end[i] == pytest.approx(free[server[i]])


@pytest.mark.parametrize(("nodes", "local"), [(2, 8), (3, 4), (8, 8), (9, 4), (5, 2)])
def test_every_pair_of_nodes_has_its_leaders(nodes, local):
    peers, shares = network_simulation._leaders(nodes, local), leaders_of_a_pair(nodes, local)
    found = [(d // local, p // local) for d, row in enumerate(peers) for p in row if p >= 0]
    pairs = [(n, m) for n in range(nodes) for m in range(nodes) if n != m]
    assert sorted(found) == sorted(pairs * shares)
    for device, row in enumerate(peers):
        for peer in row[row >= 0]:
            stripe = (device // local + peer // local) % min(nodes, local)
            assert peer % local == device % local and device % local % min(nodes, local) == stripe
    # No device leads to, or receives from, many more nodes than another.
    assert (peers >= 0).sum(1).max() <= -(-nodes // local)


@pytest.mark.parametrize("algorithm", ["flat", "halo2", "halo3"])
def test_laws(algorithm):
    platform = frontier_like()
    sizes = [simulate_all_to_all(platform, 4, size, algorithm) for size in (1e3, 1e5, 1e7, 1e9)]
    assert sizes == sorted(sizes)
    # With few nodes there are few leaders, and the striped one may get quicker with more.
    nodes = [simulate_all_to_all(platform, n, 1e5, algorithm) for n in (8, 16, 32, 64)]
    assert nodes == sorted(nodes)
    assert num_messages(4, 8, algorithm) == dict(flat=992, halo2=544, halo3=472)[algorithm]
    # Never quicker than the interface: bytes that leave the node at 12.5 GB/s a device.
    assert sizes[-1] > 1e9 * 3 / 4 / 12.5e9


def test_a_taper_slows_what_crosses_it_only():
    free = replace(PAIRS, links=(*PAIRS.links[:2], replace(PAIRS.links[2], taper_fraction=1.0)))
    for algorithm in ("flat", "halo2", "halo3"):
        assert simulate_all_to_all(PAIRS, 4, 1e8, algorithm) == simulate_all_to_all(free, 4, 1e8, algorithm)
        tapered = simulate_all_to_all(PAIRS, 16, 1e8, algorithm)
        assert tapered > 1.2 * simulate_all_to_all(free, 16, 1e8, algorithm)
        # 24 of 32 parts leave the switch, at 5 GB/s.
        assert tapered > 1e8 * 24 / 32 / 5e9


def test_chunks_and_de_duplication_help_large_sizes():
    platform = frontier_like()
    whole = simulate_all_to_all(platform, 8, 64e6, "halo2")
    chunked = simulate_all_to_all(platform, 8, 64e6, "halo2", chunks=4)
    assert 0.8 * whole < chunked < 0.95 * whole
    assert simulate_all_to_all(platform, 8, 64e6, "halo2", far_fraction=0.5) < 0.6 * whole
    expected = all_to_all(platform, Group(64), 64e6, algorithm="halo2", chunks=4).seconds
    assert expected == pytest.approx(chunked, rel=0.05)
    # Without a phase of its own what stays in the node comes later.
    assert simulate_all_to_all(platform, 8, 64e6, "halo2", near_beside=False) > whole


def test_measured_all_to_alls_are_predicted_with_one_fitted_number():
    assert geometric_mean_error(measured_errors()) <= 1.35


def test_another_simulation_of_the_same_machine_agrees():
    found = simulated_speedups(NODES[:6])
    for case, expected in SPEEDUPS.items():
        ratios = np.array(found[case]) / expected[:6]
        spread = np.exp(np.abs(np.log(ratios)).mean())
        # Small messages depend on the order of phases, and striping on how pairs share leaders.
        assert spread < {"halo2": 1.2, "halo3": 1.45}[case[1]], (case, ratios)
        if case[0] >= 8:
            assert np.abs(ratios - 1).max() < 0.2, (case, ratios)


def test_a_first_message_takes_its_latency_and_further_ones_their_distance():
    """Also where messages are further apart than one of them takes: n peers take a latency and n - 1 distances."""
    link = Link(name="wire", devices=64, bytes_per_second=1e12, latency_seconds=2e-5, message_seconds=1e-4)
    platform = Platform(name="one", description="d", device=Device(), devices_per_node=1, links=(link,))
    for nodes in (2, 5, 64):
        expected = 2e-5 + (nodes - 2) * 1e-4
        assert simulate_all_to_all(platform, nodes, 1.0) == pytest.approx(expected, rel=1e-3)
        assert all_to_all(platform, Group(nodes), 1.0).seconds == pytest.approx(expected, rel=1e-3)


def test_closed_forms_stay_close_to_the_simulation():
    for (_, algorithm), cases in closed_form_ratios(nodes=(2, 4, 8, 16)).items():
        ratios = [ratio for _, ratio in cases]
        low, high = dict(flat=(0.5, 1.02), halo2=(0.95, 1.05), halo3=(0.95, 1.05))[algorithm]
        assert low <= min(ratios) and max(ratios) <= high, cases


@pytest.mark.parametrize(
    ("arguments", "more", "words"),
    [
        ((PAIRS, 2, 1e6, "ring"), {}, "one of flat, halo2, halo3, got 'ring'"),
        ((PAIRS, 0, 1e6), {}, "at least one node, one chunk"),
        ((PAIRS, 17, 1e6), {}, "'pairs' joins at most 32 devices, got 34"),
        ((PAIRS, 2, 1e6, "halo3"), dict(chunks=2), "only halo2 is cut into chunks, got 2 for halo3"),
        ((PAIRS, 2, 1e6, "halo2"), dict(far_fraction=1.5), r"far_fraction in \(0, 1\]"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, more, words):
    with pytest.raises(ValueError, match=words):
        simulate_all_to_all(*arguments, **more)
