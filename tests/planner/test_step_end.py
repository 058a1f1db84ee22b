"""Tests of piperjax/planner/step_end.py: who reduces what with whom."""

from dataclasses import replace

import pytest

from meshes.platform import load_platform
from models import cost
from models.presets import preset
from piperjax.planner.network import Group, all_gather, reduce_scatter
from piperjax.planner.plan import default_plan
from piperjax.planner.step_end import step_end_seconds

FRONTIER = load_platform("frontier")


def plan_for(name="mixtral_8x7b", devices=256, **options):
    options = {"pipe": 8, "expert": 8, "batch_size": 1024, "seq_len": 4096} | options
    return preset(name), default_plan(preset(name), FRONTIER, devices, **options)


def test_no_reduction_without_copies():
    """Eight pipe ranks and nothing else: every gradient is whole where it is made."""
    model, plan = plan_for(devices=8, expert=1, batch_size=64)
    reduction, optimizer = step_end_seconds(model, plan, FRONTIER)
    assert reduction == 0
    assert optimizer > 0


def test_the_optimizer_works_on_a_share():
    model, few = plan_for(devices=64)
    _, many = plan_for(devices=256)
    assert step_end_seconds(model, many, FRONTIER)[1] < step_end_seconds(model, few, FRONTIER)[1]


def test_all_parameters_are_reduced_over_data_where_experts_are_not_divided():
    model, plan = plan_for(devices=8, pipe=1, expert=1, batch_size=64)
    counted, group = cost.parameters(model), Group(8, 1)
    total = counted.total - counted.final_norm
    whole = (
        reduce_scatter(FRONTIER, group, 4 * total).seconds + all_gather(FRONTIER, group, 2 * total).seconds
    )
    # Experts and the others one after the other: the same bytes, twice the latency.
    assert step_end_seconds(model, plan, FRONTIER)[0] == pytest.approx(whole, rel=1e-3)


def test_the_rank_with_most_parameters_counts():
    model, even = plan_for(devices=64)
    uneven = default_plan(model, FRONTIER, 64, pipe=8, expert=8, batch_size=1024, seq_len=4096)
    object.__setattr__(uneven, "layers_per_stage", (11, 3, 3, 3, 3, 3, 3, 3))
    assert step_end_seconds(model, uneven, FRONTIER)[1] > 2 * step_end_seconds(model, even, FRONTIER)[1]


def test_devices_that_share_cores_bring_what_they_exchange_into_another_layout():
    """Gradients in 32 bits whole and an eighth of them, parameters the same in 16 bits; read and written."""
    model, plan = plan_for(devices=8, pipe=1, expert=1, batch_size=64)

    def optimizer_seconds(**changes):
        device = replace(FRONTIER.device, elementwise_bytes_per_second={"layout": 1e9}, **changes)
        return step_end_seconds(model, plan, replace(FRONTIER, device=device))[1]

    counted = cost.parameters(model)
    copied = 2 * (4 + 2) * (1 + 1 / 8) * (counted.total - counted.final_norm)
    more = optimizer_seconds(concurrent_devices=1.0) - optimizer_seconds()
    assert more == pytest.approx(copied / 1e9, rel=1e-3)
