"""Bytes by level: by hand, and in which the dispatchers differ."""

import pytest

from benchmarks.cases import make_plan, moe_model
from piperjax.planner.sent_bytes import dispatch_bytes

MODEL = moe_model(num_layers=4, d_model=64, num_experts=16, experts_per_token=4)
# 8 devices, two groups of two nodes of two; 128 tokens on each, 8 microbatches; two experts on a device.
FACTORS = dict(expert=8, expert_factors=(2, 2, 2), seq_len=128)
ROW = 64 * 2


def sent(dtype="bfloat16", **options):
    return dispatch_bytes(MODEL, make_plan(MODEL, **FACTORS | options), dtype=dtype)


def test_flat_by_hand():
    # Two copies of a token at most to a device, five exchanges of 4 layers and 8 microbatches.
    part = 5 * 4 * 8 * 128 * 2 * ROW
    assert sent() == {"self": part, "local": part, "node": 2 * part, "group": 4 * part}
    assert sent(memory_mode="stash")["node"] == 2 * part * 4 / 5
    # Four layers on one pipe rank: three run there and back once more.
    assert sent(memory_mode="stage")["node"] == 2 * part * (3 * 7 + 5) / (4 * 5)
    assert sent(dtype="float32")["local"] == 2 * part
    assert sent(dispatch_chunks=4) == sent()


def test_once_per_node_by_hand():
    # Every token to the other node of the group and to the two of the other group, with 4 ids and 4 gates one way.
    each = 5 * ROW + 2 * 4 * (2 + 4) + 4 * 4
    found = sent(dispatch="halo2_dedup")
    assert found["node"] == 4 * 8 * 128 * each
    assert found["group"] == 2 * found["node"]
    # Inside a node what came from four nodes goes to both devices.
    assert found["local"] == 4 * 4 * 8 * 128 * each
    assert sent(dispatch="halo2_dedup", capacity_factor=1.0)["node"] < found["node"]


def test_leaders_move_rows_of_a_node_inside_twice_more():
    direct, led = (sent(dispatch=f"{name}_dedup") for name in ("halo2", "halo3"))
    assert led["node"] == direct["node"] and led["group"] == direct["group"]
    # Beside what 8 devices have for both of a node, what 4 nodes' devices of an index have, there and from there.
    assert led["local"] == direct["local"] * (8 + 2 * 4) / 8
    limited = [sent(dispatch=f"{name}_dedup", capacity_factor=1.0) for name in ("halo2", "halo3")]
    assert limited[0]["node"] == limited[1]["node"] and limited[0]["local"] < limited[1]["local"]


def test_hierarchy_sends_as_much_between_nodes_and_more_inside():
    flat, halo2, halo3 = (sent(dispatch=name) for name in ("flat", "halo2", "halo3"))
    for level in ("node", "group"):
        assert flat[level] == halo2[level] == halo3[level]
    assert flat["local"] < halo2["local"] and halo3["local"] == 2 * halo2["local"]
    # Three nodes of two in two rounds: leaders have room for four pairs. In one node nobody leads.
    three = dict(expert=6, expert_factors=(1, 3, 2))
    thirds = moe_model(num_layers=4, d_model=64, num_experts=12, experts_per_token=4)
    halo2, halo3 = (
        dispatch_bytes(thirds, make_plan(thirds, **FACTORS | three, dispatch=name))
        for name in ("halo2", "halo3")
    )
    assert halo3["local"] == pytest.approx(2 * 4 / 3 * halo2["local"])
    one = dict(expert_factors=(1, 1, 8))
    assert sent(**one) == sent(**one, dispatch="halo3")
    assert sent(**one, dispatch="halo2_dedup") == sent(**one, dispatch="halo3_dedup")


def test_pipe_ranks_share_layers_and_one_device_sends_nothing():
    assert sent(pipe=2)["node"] == pytest.approx(sent()["node"] / 2)
    assert dispatch_bytes(MODEL, make_plan(MODEL)) == {}
    assert set(sent(expert=2, expert_factors=(1, 1, 2))) == {"self", "local"}
