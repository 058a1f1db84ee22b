"""FLOP that a step runs: useful work, what attention computes too much, and what is run again."""

import pytest

from benchmarks.cases import dense_model, make_plan, moe_model
from models import cost
from piperjax.planner.executed import executed_flop


@pytest.mark.parametrize(
    ("memory_mode", "forwards"), [("stash", 3), ("products", 3), ("layer", 4), ("stage", 4.5)]
)
def test_a_step_costs_three_forwards_and_what_is_run_again(memory_mode, forwards):
    model = dense_model()
    flop = cost.flop_per_token(model, 64)
    # Of three layers on one rank and one on the other, the last is run again once only.
    layers = sum(layer.total + layer.attention_scores for layer in flop.layers)
    # The last product of a layer is not run again, and of attention only the inner products where the rest is kept.
    down = 4 * 2 * 64 * 256 if memory_mode in ("layer", "stage") else 0
    scores = 2 * sum(layer.attention_scores for layer in flop.layers) if memory_mode == "products" else 0
    expected = 8 * 64 * (forwards * layers - down + scores + 3 * flop.head) / 4
    sizes = dict(pipe=2, data=2, num_microbatches=4, layers_per_stage=(3, 1))
    plan = make_plan(model, **sizes, memory_mode=memory_mode)
    assert executed_flop(model, plan) == pytest.approx(expected)


def test_attention_in_blocks_is_run_again_by_modes_that_run_layers_again():
    model = dense_model()
    plan = {mode: make_plan(model, seq_len=2048, memory_mode=mode) for mode in ("stash", "products", "layer")}
    flop = {mode: executed_flop(model, one) for mode, one in plan.items()}
    layer = cost.layer_flop(model, model.layers[0], 2048)
    # Three times all of it, and the scores once more in backward.
    expected = 4 * (3 * (layer.total + layer.attention_scores) + layer.attention_scores) + 3 * 2 * 256 * 64
    assert flop["stash"] == flop["products"] == pytest.approx(8 * 2048 * expected)
    assert flop["layer"] > flop["products"] + 8 * 2048 * 4 * 2 * layer.attention_scores


def test_what_experts_return_is_run_again_by_simulated_devices_only_and_for_all_chunks_but_the_last():
    model = moe_model()
    ffn = model.layers[-1].ffn

    def plan(mode, chunks):
        return make_plan(model, memory_mode=mode, expert=2, dispatch_chunks=chunks)

    def flop(mode="layer", backend="cpu", chunks=1):
        return executed_flop(model, plan(mode, chunks), backend=backend)

    one = plan("layer", 1)
    tokens = one.batch_size * one.seq_len / one.num_devices
    down = tokens * len(model.moe_layers) * 2 * model.d_model * ffn.d_ff * ffn.experts_per_token
    assert flop("layer") == flop("layer", "gpu") == flop("layer", "gpu", 4)
    assert flop("layer", chunks=4) == pytest.approx(flop("layer") + 3 / 4 * down)
    assert flop("named", chunks=4) == flop("named")
