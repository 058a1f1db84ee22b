"""Tests of piperjax/planner/timing.py: parts add up, clocks agree with formulas, and every term scales as it should."""

import dataclasses

import pytest

from meshes.platform import load_platform
from models import cost
from models.presets import preset
from piperjax.planner.layer_exchanges import HIDDEN_FRACTION
from piperjax.planner.layer_time import LayerSeconds, layer_seconds
from piperjax.planner.plan import default_plan
from piperjax.planner.step_end import step_end_seconds
from piperjax.planner.timing import (
    Conditions,
    action_costs,
    estimate_time,
    hidden_seconds,
    stage_seconds,
    uncertainty,
)

FRONTIER = load_platform("frontier")


def plan_for(name="deepseek_v3", devices=256, **options):
    options = {"pipe": 8, "expert": 32, "batch_size": 1024, "seq_len": 4096} | options
    return preset(name), default_plan(preset(name), FRONTIER, devices, **options)


@pytest.mark.parametrize("clock", ["lockstep", "profile", "async"])
@pytest.mark.parametrize("options", [{}, {"schedule": "zb_h1"}, {"schedule": "zb_v"}, {"overlap": True}])
def test_parts_add_up_to_the_step(clock, options):
    model, plan = plan_for(**options)
    found = estimate_time(model, plan, FRONTIER, clock=clock)
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)
    assert min(found.parts.values()) >= 0
    assert found.tokens_per_second == pytest.approx(1024 * 4096 / found.step_seconds)
    useful = cost.flop_per_token(model, 4096).step * found.tokens_per_second / 256
    assert found.flop_per_second == pytest.approx(useful)
    assert found.mfu == pytest.approx(useful / 191.5e12)
    assert 0 < found.bubble_fraction < 1
    assert 0 < found.all_to_all_fraction < 1


def test_1f1b_costs_its_formula_in_both_clocks():
    """(M + P - 1) (F + B) with equal stages and nothing else."""
    model = dataclasses.replace(preset("mixtral_8x7b"), vocab_size=1)
    plan = default_plan(model, FRONTIER, 32, pipe=4, expert=8, batch_size=256, seq_len=4096)
    costs = action_costs(model, plan, FRONTIER)
    one = costs.forward[0] + costs.backward[0] + costs.exposed_forward[0] + costs.exposed_backward[0]
    outer = plan.num_microbatches * (costs.embedding + costs.head + costs.embedding_gradient)
    expected = (plan.num_microbatches + 3) * one + outer + sum(step_end_seconds(model, plan, FRONTIER))
    transfers = len(plan.tick_table().ticks) * costs.transfer
    lockstep, asynchronous = (
        estimate_time(model, plan, FRONTIER, clock=clock).step_seconds for clock in ("lockstep", "async")
    )
    assert lockstep == pytest.approx(expected + transfers)
    assert asynchronous == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("schedule", ["one_f_one_b", "interleaved", "zb_h1", "zb_v", "v_half", "v_min"])
def test_counts_give_the_time_of_the_table(schedule):
    """Exactly with equal stages; with unequal ones a little more, and the more the fewer there are: 61 layers."""
    for name, pipe, most in (("mixtral_8x7b", 4, 0.0), ("deepseek_v3", 8, 0.025), ("deepseek_v3", 4, 0.09)):
        model, plan = plan_for(name, 256, pipe=pipe, expert=8, schedule=schedule)
        table, counted = (estimate_time(model, plan, FRONTIER, clock=c) for c in ("lockstep", "profile"))
        assert -1e-9 <= counted.step_seconds / table.step_seconds - 1 <= most + 1e-9
        for part, seconds in table.parts.items():
            assert counted.parts[part] == pytest.approx(seconds, abs=(most + 1e-9) * table.step_seconds)


def test_counts_hide_what_the_table_hides():
    model, plan = plan_for(overlap=True)
    table, counted = (estimate_time(model, plan, FRONTIER, clock=c) for c in ("lockstep", "profile"))
    assert counted.step_seconds == pytest.approx(table.step_seconds, rel=0.02)
    assert counted.parts["exposed_all_to_all"] == pytest.approx(table.parts["exposed_all_to_all"], rel=0.02)


def test_stages_are_their_layers():
    model, plan = plan_for()
    stages = stage_seconds(model, plan, FRONTIER)
    parameters = dict(tokens=4096, seq_len=4096, expert_factors=plan.expert_factors)
    dense, moe = (layer_seconds(model, model.layers[i], FRONTIER, **parameters).cut() for i in (0, -1))
    assert plan.tokens_per_device == 4096
    assert stages[0].forward == pytest.approx(
        3 * dense.forward + (plan.layers_per_stage[0] - 3) * moe.forward
    )
    assert stages[-1].backward == pytest.approx(plan.layers_per_stage[-1] * moe.backward)


def test_one_layer_of_a_kind_is_no_slice():
    """Where a device has one layer of a kind, its weights need not be cut out; with two chunks there are two."""
    model = dataclasses.replace(preset("mixtral_8x7b"), layers=preset("mixtral_8x7b").layers[:4])
    parameters = dict(tokens=512, seq_len=512, expert_factors=(1, 1, 2))
    layer = layer_seconds(model, model.layers[0], FRONTIER, **parameters)
    weights = 2 * (model.d_model * (2 * model.d_model + 2 * 1024) + 4 * 3 * model.d_model * 14336)
    router = 2 * model.d_model * 8
    assert layer.slices == pytest.approx(FRONTIER.device.stream_seconds(2 * (weights + router)))

    def forward(layers_per_stage, **changes):
        plan = default_plan(model, FRONTIER, 8, batch_size=32, seq_len=512, expert=2, **changes)
        assert plan.tokens_per_device == 512 and plan.layers_per_stage == layers_per_stage
        return stage_seconds(model, plan, FRONTIER)[0].forward

    one = forward((1,) * 4, pipe=4, data=1, num_microbatches=16)
    two = forward((2,) * 2, pipe=2, data=2, num_microbatches=8)
    chunks = forward((1,) * 4, pipe=2, data=2, num_microbatches=8, schedule="interleaved")
    assert one == pytest.approx(layer.forward)
    assert two == pytest.approx(2 * (layer.forward + layer.slices))
    assert chunks == pytest.approx(layer.forward + layer.slices)


def test_of_a_stage_that_is_run_again_the_last_layer_is_not():
    def exchanged(memory_mode, **sizes):
        model, plan = plan_for(memory_mode=memory_mode, **sizes)
        return plan, stage_seconds(model, plan, FRONTIER)

    plan, again = exchanged("stage")
    _, keeping = exchanged("layer")
    layers = plan.layers_per_stage[-1]
    more = again[-1].exchange_backward - keeping[-1].exchange_backward
    assert layers > 1 and more == pytest.approx((layers - 1) / layers * keeping[-1].exchange_forward)
    one_each = dict(pipe=61, expert=1, devices=61, batch_size=64)
    assert exchanged("stage", **one_each)[1] == exchanged("layer", **one_each)[1]


def test_a_prediction_layer_is_one_more_layer_and_head():
    model, plan = plan_for()
    more = dataclasses.replace(model, prediction_layers=1)
    plain, predicting = (action_costs(m, plan, FRONTIER) for m in (model, more))
    layers = plan.layers_per_stage[-1]
    assert predicting.forward[-1] == pytest.approx(plain.forward[-1] * (layers + 1) / layers)
    assert predicting.forward[:-1] == plain.forward[:-1]
    assert predicting.head > 2 * plain.head


def test_split_vocabulary_divides_the_head():
    model, plan = plan_for()
    whole = dataclasses.replace(plan, vocabulary="whole")
    split_head, whole_head = (action_costs(model, p, FRONTIER).head for p in (plan, whole))
    assert whole_head / 8 < split_head < whole_head / 2


def test_overlap_hides_exchanges():
    model, plan = plan_for(memory_mode="layer")
    hidden = estimate_time(model, dataclasses.replace(plan, overlap=True), FRONTIER, Conditions(rows="exact"))
    shown = estimate_time(model, plan, FRONTIER, Conditions(rows="exact"))
    assert hidden.parts["exposed_all_to_all"] < 0.9 * shown.parts["exposed_all_to_all"]
    assert hidden.parts["compute"] == pytest.approx(shown.parts["compute"])


def test_what_collectives_take_from_products_is_priced():
    """Three times what the exchanges last of products: all could be hidden, less what they take from the products."""
    stages = [LayerSeconds(forward=3, backward=6, exchange_forward=1, exchange_backward=2)]

    def saved(**changes):
        return hidden_seconds(stages, dataclasses.replace(FRONTIER, device=device_with(**changes)))

    def device_with(**changes):
        return dataclasses.replace(FRONTIER.device, **changes)

    assert saved(interference_fraction=0.0) == pytest.approx(HIDDEN_FRACTION * 3)
    assert saved(interference_fraction=0.4) == pytest.approx(HIDDEN_FRACTION * 0.6 * 3)
    assert saved(interference_fraction=0.4, concurrent_devices=1.0) == 0
    assert 0 < hidden_seconds(stages, FRONTIER) < HIDDEN_FRACTION * 3


def test_imbalance_costs_time():
    model, plan = plan_for()
    even, skewed = (
        estimate_time(model, plan, FRONTIER, Conditions(imbalance=i)).step_seconds for i in (1.0, 1.5)
    )
    assert even < skewed < 1.5 * even


def test_devices_that_share_cores_wait_for_each_other():
    model, plan = plan_for("mixtral_8x7b", devices=8, pipe=2, expert=4, batch_size=64)
    shared = dataclasses.replace(FRONTIER, device=dataclasses.replace(FRONTIER.device, concurrent_devices=2))
    alone, together = (estimate_time(model, plan, p).step_seconds for p in (FRONTIER, shared))
    # Eight devices of which two compute at once: four times as long where all are busy, less in the bubble.
    assert 3 * alone < together < 4 * alone


def test_uncertainty_follows_provenance():
    parts = {"compute": 1.0, "exposed_all_to_all": 1.0}

    def of(provenance):
        device = FRONTIER.device
        tables = {
            name: dataclasses.replace(getattr(device, name), provenance=provenance)
            for name in ("matmul", "grouped_matmul", "attention")
        }
        links = tuple(dataclasses.replace(link, provenance=provenance) for link in FRONTIER.links)
        return uncertainty(
            dataclasses.replace(FRONTIER, device=dataclasses.replace(device, **tables), links=links), parts
        )

    assert of("measured") < of("published") < of("vendor") < of("assumed")
    assert of("measured") <= 0.10


def test_unknown_clock_is_refused():
    model, plan = plan_for()
    with pytest.raises(ValueError, match="lockstep, profile or async, got 'wall'"):
        estimate_time(model, plan, FRONTIER, clock="wall")


@pytest.mark.parametrize("wrong", [dict(imbalance=0.5), dict(rows="some")], ids=str)
def test_impossible_conditions_are_refused(wrong):
    with pytest.raises(ValueError, match="imbalance of at least 1 and rows that are static or exact, got "):
        Conditions(**wrong)


def test_what_leaves_the_measured_range_is_said():
    model, plan = plan_for()
    matmul = dataclasses.replace(FRONTIER.device.matmul, smallest_flop=1e6, largest_flop=1e9)
    grouped = dataclasses.replace(FRONTIER.device.grouped_matmul, smallest_flop=1e6, largest_flop=1e15)
    device = dataclasses.replace(FRONTIER.device, matmul=matmul, grouped_matmul=grouped)
    found = estimate_time(model, plan, dataclasses.replace(FRONTIER, device=device))
    (note,) = found.notes
    assert note.startswith("dense products: ")
    assert note.endswith("outside the measured range of 1e+06 to 1e+09")
    before = estimate_time(model, plan, FRONTIER)
    assert before.notes == ()
    assert found.uncertainty_fraction > before.uncertainty_fraction
