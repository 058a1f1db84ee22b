"""Tests of what sharing the cores of a host does to a step: work is conserved, bubbles cost nothing."""

import dataclasses

import pytest

from meshes.platform import load_platform
from models.presets import preset
from piperjax.planner.memory import estimate_memory
from piperjax.planner.plan import default_plan
from piperjax.planner.timing import Conditions, action_costs, estimate_time
from piperjax.schedules.timeline import lockstep

CPU8 = load_platform("cpu8")
FLOAT32 = Conditions(dtype="float32")


def sharing(concurrent_devices):
    return dataclasses.replace(
        CPU8, device=dataclasses.replace(CPU8.device, concurrent_devices=concurrent_devices)
    )


def plan_for(**options):
    options = {"pipe": 4, "data": 2, "expert": 1, "num_microbatches": 4} | options
    return default_plan(preset("small"), CPU8, 8, batch_size=16, seq_len=256, **options)


def estimate(plan, platform, **options):
    return estimate_time(preset("small"), plan, platform, FLOAT32, **options)


@pytest.mark.parametrize("clock", ["lockstep", "profile"])
@pytest.mark.parametrize("schedule", ["one_f_one_b", "zb_v"])
def test_devices_that_take_turns_need_the_seconds_of_all_their_work(schedule, clock):
    plan = plan_for(schedule=schedule)
    costs = action_costs(preset("small"), plan, CPU8, FLOAT32)
    backward = (costs.input_gradient, costs.weight_gradient) if schedule == "zb_v" else (costs.backward,)
    everything = 8 / 4 * plan.num_microbatches * sum(map(sum, (costs.forward, *backward)))
    found = estimate(plan, sharing(1.0), clock=clock)
    assert found.parts["compute"] == pytest.approx(everything)
    assert found.parts["bubble"] == 0
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)
    assert estimate(plan, sharing(2.0), clock=clock).parts["compute"] == pytest.approx(everything / 2)


def test_bubbles_show_where_there_are_more_cores_than_work():
    plan = default_plan(
        preset("small"), CPU8, 8, batch_size=16, seq_len=256, pipe=8, expert=1, num_microbatches=1
    )
    many = estimate(plan, sharing(8.0))
    assert many.parts["bubble"] > 0
    whole = sum(
        seconds for part, seconds in many.parts.items() if part not in ("gradient_reduction", "optimizer")
    )
    costs = action_costs(preset("small"), plan, sharing(8.0), FLOAT32)
    assert whole == pytest.approx(lockstep(plan.tick_table(), costs).step_seconds)


def test_a_head_on_one_rank_is_computed_once_and_a_split_one_in_parts():
    """The same work in all, but for exchanges and the fall-off of skinny products."""
    whole, split = (estimate(plan_for(vocabulary=v), sharing(1.0)).parts["head"] for v in ("whole", "split"))
    assert whole == pytest.approx(split, rel=0.3)


def test_memory_that_a_step_takes_is_touched_at_its_rate_on_all_devices():
    plan = plan_for()
    device = dataclasses.replace(CPU8.device, concurrent_devices=1.0, fresh_bytes_per_second=2e9)
    taken = estimate_memory(preset("small"), plan, dtype="float32", backend="cpu")[0].taken
    found = estimate(plan, dataclasses.replace(CPU8, device=device))
    assert found.parts["fresh_memory"] == pytest.approx(8 * taken / 2e9)
    assert estimate(plan, sharing(1.0)).parts["fresh_memory"] == 0
