"""The automatic schedule: never worse than a named one that fits, within its limit, sometimes better."""

from dataclasses import replace
from functools import cache
from itertools import product
from math import inf

import pytest

from piperjax.schedules import registry
from piperjax.schedules.auto import auto, chunk_costs
from piperjax.schedules.ticks import pack
from piperjax.schedules.timeline import ActionCosts, lockstep, simulate

COSTS = {
    "equal": ActionCosts(),
    "recomputing": ActionCosts(
        forward=1.0, backward=3.0, input_gradient=2.0, weight_gradient=1.0, transfer=0.1
    ),
    "measured": ActionCosts(
        forward=1.2, backward=2.4, input_gradient=1.5, weight_gradient=0.9, transfer=0.05
    ),
    "uneven": ActionCosts(
        forward=(1.0, 1.5, 1.0, 1.2),
        backward=(2.0, 3.0, 2.0, 2.4),
        input_gradient=(1.0, 1.5, 1.0, 1.2),
        weight_gradient=(1.0, 1.5, 1.0, 1.2),
    ),
}


GRID = list(product(COSTS, (1, 2), (inf, 8, 4, 3, 2), (4, 8, 13)))
# A covering part for every day: each pair of costs, chunks, limits and microbatches.
DAILY = GRID[::4]


@cache
def named(P, M, v):
    found = []
    for name in registry.names():
        if name != "auto" and registry.chunks_of(name, v if name == "interleaved" else 0) == v:
            try:
                found.append(registry.build(name, P, M, v if name == "interleaved" else 0))
            except ValueError:
                continue
    return found


@cache
def named_tables(P, M, v):
    return [
        pack(replace(schedule, clock=slots)) for schedule in named(P, M, v) for slots in ("dual", "single")
    ]


def asynchronous(schedule, costs):
    return simulate(schedule, chunk_costs(schedule, costs))


def executed(table, costs):
    return lockstep(table, chunk_costs(table.schedule, costs)).step_seconds


@pytest.mark.parametrize(("costs", "v", "limit", "M"), DAILY)
def test_no_named_schedule_within_the_limit_is_shorter(costs, v, limit, M):
    costs = COSTS[costs]
    found = asynchronous(auto(4, M, v, costs=costs, memory_limit=limit, clock="async"), costs)
    assert max(found.peak_held()) <= limit * v
    for schedule in named(4, M, v):
        other = asynchronous(schedule, costs)
        if max(other.peak_held()) <= limit * v:
            assert found.step_seconds <= other.step_seconds + 1e-9, schedule.name


@pytest.mark.slow
@pytest.mark.parametrize(("costs", "v", "limit", "M"), [case for case in GRID if case not in DAILY])
def test_no_named_schedule_within_the_limit_is_shorter_on_the_rest_of_the_grid(costs, v, limit, M):
    test_no_named_schedule_within_the_limit_is_shorter(costs, v, limit, M)


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("v", [1, 2])
@pytest.mark.parametrize("limit", [inf, 5, 3])
def test_no_named_table_within_the_limit_is_shorter(costs, v, limit):
    found = pack(auto(4, 8, v, costs=costs, memory_limit=limit))
    assert max(found.peak_held()) <= limit * v
    for table in named_tables(4, 8, v):
        if max(table.peak_held()) <= limit * v:
            assert executed(found, costs) <= executed(table, costs) + 1e-9, table.schedule.name


def test_it_is_shorter_than_every_named_one_where_times_are_not_equal():
    for M in (8, 32):
        costs = COSTS["recomputing"]
        found = asynchronous(auto(4, M, 2, costs=costs, clock="async"), costs).step_seconds
        best = min(asynchronous(schedule, costs).step_seconds for schedule in named(4, M, 2))
        assert found < 0.985 * best


def test_it_exists_where_no_named_one_does():
    schedule = auto(4, 6, 3)
    assert schedule.num_chunks == 3 and schedule.num_microbatches == 6
    assert pack(schedule).schedule == schedule


def test_one_rank_has_no_bubble_and_holds_one_microbatch():
    for v in (1, 2):
        table = pack(auto(1, 4, v))
        assert max(table.peak_held()) == v
        assert lockstep(table, ActionCosts()).bubble_fraction == pytest.approx(0.0)


def test_the_registry_knows_it():
    schedule = registry.build("auto", 4, 8)
    assert schedule.name == "auto" and schedule.num_chunks == registry.chunks_of("auto") == 2
    assert registry.build("auto", 4, 8, 1).num_chunks == 1


def test_what_cannot_fit_is_one_sentence():
    with pytest.raises(
        ValueError, match="no schedule of 1 chunks on 4 pipe ranks holds at most 0.5 activations"
    ):
        auto(4, 8, 1, memory_limit=0.5)
