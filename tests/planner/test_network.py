"""Expert dispatch: rows and bytes by hand, de-duplication, and which dispatcher is quickest."""

from dataclasses import replace
from math import ceil

import pytest

from benchmarks.network import published_rates
from meshes.platform import Device, Link, Platform, load_platform
from piperjax.planner import network
from piperjax.planner.network import (
    DISPATCHERS,
    Way,
    best_dispatcher,
    dispatch_transfer,
    expected_nodes,
    ways,
)

TOY = Platform(
    name="toy",
    description="round numbers",
    device=Device(),
    devices_per_node=4,
    links=(
        Link(name="node", devices=4, bytes_per_second=100e9, latency_seconds=1e-6, message_seconds=1e-6),
        Link(name="fabric", devices=64, bytes_per_second=10e9, latency_seconds=10e-6, message_seconds=10e-6),
    ),
)
LAYER = dict(tokens=1000, row_bytes=2048, num_experts=64, experts_per_token=6)


def off_node(cost):
    return cost.bytes_by_level["fabric"]


def test_our_flat_dispatcher_sends_its_static_buffer():
    # 16 devices with 4 experts each: at most min(6, 4) copies of a token go to one device.
    cost = dispatch_transfer(TOY, expert_factors=(1, 4, 4), **LAYER)
    row_bytes, tokens = LAYER["row_bytes"], LAYER["tokens"]
    assert sum(cost.bytes_by_level.values()) == pytest.approx(16 * tokens * 4 * row_bytes)
    assert off_node(cost) == pytest.approx(12 * tokens * 4 * row_bytes)
    # Padding hides the imbalance, which ragged rows pay for.
    assert dispatch_transfer(TOY, expert_factors=(1, 4, 4), imbalance=1.5, **LAYER) == cost
    exact = dispatch_transfer(TOY, expert_factors=(1, 4, 4), rows="exact", **LAYER)
    assert sum(exact.bytes_by_level.values()) == pytest.approx(tokens * 6 * row_bytes)
    skewed = dispatch_transfer(TOY, expert_factors=(1, 4, 4), rows="exact", imbalance=1.5, **LAYER)
    assert off_node(skewed) == pytest.approx(1.5 * off_node(exact))


def test_static_rows_are_those_of_the_runtime():
    runtime = pytest.importorskip("piperjax.runtime.dispatch_copies")
    from meshes.axes import EXPERT
    from piperjax.runtime.dispatcher import Sharing

    for experts, k, devices, factor in [(64, 6, 16, 0.0), (64, 6, 64, 0.0), (8, 2, 4, 1.25), (64, 6, 8, 9.0)]:
        cost = dispatch_transfer(
            TOY, expert_factors=(1, max(1, devices // 4), min(4, devices)), tokens=1000, row_bytes=2,
            num_experts=experts, experts_per_token=k, capacity_factor=factor,
        )  # fmt: skip
        sharing = Sharing(
            axes=EXPERT, sizes=(1, 1, devices), num_experts=experts, experts_per_token=k, num_tokens=1000,
            capacity_factor=factor,
        )  # fmt: skip
        capacity = runtime.row_capacity(sharing)
        assert sum(cost.bytes_by_level.values()) == pytest.approx(devices * capacity * 2)


def test_capacity_limits_rows():
    limited = dispatch_transfer(TOY, expert_factors=(1, 4, 4), capacity_factor=1.25, **LAYER)
    rows = 16 * ceil(1.25 * 1000 * 6 / 16)
    assert sum(limited.bytes_by_level.values()) == pytest.approx(rows * 2048)
    ragged = dict(expert_factors=(1, 4, 4), rows="exact", **LAYER)
    assert dispatch_transfer(TOY, capacity_factor=1.25, imbalance=2.0, **ragged) == dispatch_transfer(
        TOY, imbalance=1.25, **ragged
    )


@pytest.mark.parametrize("algorithm", ["halo2", "halo3"])
def test_a_token_crosses_to_a_node_once(algorithm):
    name = f"{algorithm}_dedup"
    cost = dispatch_transfer(TOY, expert_factors=(1, 4, 4), dispatcher=name, rows="exact", **LAYER)
    copies = expected_nodes(64, 6, 4) * 3 / 4
    assert off_node(cost) == pytest.approx(copies * 1000 * 2048)
    flat = dispatch_transfer(TOY, expert_factors=(1, 4, 4), rows="exact", **LAYER)
    assert off_node(flat) / off_node(cost) == pytest.approx(4.5 / copies)
    limited = dispatch_transfer(
        TOY,
        expert_factors=(1, 4, 4),
        dispatcher=name,
        rows="exact",
        num_groups=4,
        groups_per_token=2,
        **LAYER,
    )
    assert off_node(limited) == pytest.approx(expected_nodes(64, 6, 4, limit=2) * 3 / 4 * 1000 * 2048)
    # Worst case: each token to every other node, whatever the skew.
    static = dispatch_transfer(TOY, expert_factors=(1, 4, 4), dispatcher=name, **LAYER)
    assert off_node(static) == pytest.approx(3 * 1000 * 2048)


def test_inside_one_node_de_duplication_saves_copies_to_the_same_device():
    exact = dict(expert_factors=(1, 1, 4), rows="exact", **LAYER)
    once = dispatch_transfer(TOY, dispatcher="halo2_dedup", **exact)
    assert sum(once.bytes_by_level.values()) == pytest.approx(expected_nodes(64, 6, 4) * 1000 * 2048)
    assert set(once.bytes_by_level) == {"node", "self"}
    assert dispatch_transfer(TOY, dispatcher="halo2", **exact) == dispatch_transfer(TOY, **exact)


def test_one_device_sends_nothing():
    for name in DISPATCHERS:
        for rows in ("static", "exact"):
            cost = dispatch_transfer(TOY, expert_factors=(1, 1, 1), dispatcher=name, rows=rows, **LAYER)
            assert cost.seconds == 0 and cost.sent_bytes == 0


def test_which_is_quickest_depends_on_size_and_nodes():
    def best(tokens, factors, names=tuple(DISPATCHERS), chunks=(1, 2, 4)):
        layer = {**LAYER, "tokens": tokens, "rows": "exact", "expert_factors": factors}
        return best_dispatcher(TOY, candidates=ways(names, chunks), **layer)[0]

    # Few tokens: messages count. Many: the copies that de-duplication saves.
    assert best(1, (1, 16, 4)) in (("halo3", 1), ("halo3_dedup", 1))
    assert best(100_000, (1, 2, 4)) == ("halo2_dedup", 4)
    assert best(100_000, (1, 2, 4), ("flat", "halo2", "halo2_dedup"), [1]) == ("halo2_dedup", 1)
    assert best(100_000, (1, 16, 4), ("flat", "halo2", "halo3"), [1]) == ("flat", 1)
    assert best(1, (1, 16, 4), ["flat"]) == Way("flat")
    (name, chunks), cost = best_dispatcher(TOY, expert_factors=(1, 2, 4), **LAYER)
    assert cost == dispatch_transfer(TOY, expert_factors=(1, 2, 4), dispatcher=name, chunks=chunks, **LAYER)
    assert all(
        cost.seconds <= dispatch_transfer(TOY, expert_factors=(1, 2, 4), dispatcher=other, **LAYER).seconds
        for other in DISPATCHERS
    )


def test_seconds_rise_with_every_load():
    base = dict(expert_factors=(1, 4, 4), rows="exact", **LAYER)
    for name in DISPATCHERS:
        seconds = dispatch_transfer(TOY, dispatcher=name, **base).seconds
        for heavier in (
            dict(tokens=2000),
            dict(row_bytes=4096),
            dict(imbalance=1.5),
            dict(experts_per_token=8),
        ):
            assert dispatch_transfer(TOY, dispatcher=name, **{**base, **heavier}).seconds > seconds


def test_every_platform_with_a_network_can_be_priced():
    for name in ("frontier", "h100_pod", "mi300x_node"):
        platform = load_platform(name)
        factors = platform.expert_factors(expert=64, pipe=4, data=1)
        cost = dispatch_transfer(platform, expert_factors=factors, **LAYER)
        assert 0 < cost.seconds < 1
        slower = replace(platform, links=tuple(replace(way, efficiency=0.1) for way in platform.links))
        assert cost.seconds < dispatch_transfer(slower, expert_factors=factors, **LAYER).seconds


@pytest.mark.parametrize(("label", "predicted", "published"), published_rates())
def test_published_rates_of_de_duplicated_dispatch(label, predicted, published):
    assert predicted == pytest.approx(published, rel=0.2), label


def test_names_are_what_they_say():
    assert all(name == way.name for name, way in DISPATCHERS.items())
    assert set(network.__all__) <= set(dir(network))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(dispatcher="halo"), "no dispatcher named 'halo'; there are flat, halo2.* did you mean 'halo"),
        (dict(rows="padded"), "rows must be one of static, exact, got 'padded'"),
        (dict(imbalance=0.5), "so at least 1, got 0.5"),
        (dict(expert_factors=(1, 3, 4)), "got 64 experts on 12 devices"),
    ],
)
def test_a_mistake_is_one_sentence(changes, words):
    with pytest.raises(ValueError, match=words):
        dispatch_transfer(TOY, **{"expert_factors": (1, 4, 4), **LAYER, **changes})
