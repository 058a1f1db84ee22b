"""The executor equals one device also where passes overlap and rows take other ways to their experts."""

import re

import jax
import pytest

from piperjax.planner.dispatchers import DISPATCHERS
from piperjax.planner.plan import MEMORY_MODES
from piperjax.schedules import registry
from tests.runtime.executor_cases import (
    abstract_arguments,
    check_cannot_deadlock,
    check_equal,
    executor_for,
    model,
    plan_for,
)


@pytest.mark.parametrize(
    ("schedule", "dense_layers", "memory_mode", "layers_per_stage"),
    [
        pytest.param("one_f_one_b", 0, "named", (2, 2), marks=pytest.mark.slow),
        ("one_f_one_b", 0, "layer", (3, 1)),  # Only at one position do both ranks hold a layer.
        ("zb_v", 1, "layer", (1, 1, 1, 1)),
        (
            "interleaved",
            0,
            "stash",
            (1, 1, 1, 1),
        ),  # No loop over layers, so the slot is read in a loop of its own.
    ],
)
def test_overlapped_forward_and_backward_equal_one_device(
    schedule, dense_layers, memory_mode, layers_per_stage
):
    config = model(dense_layers=dense_layers)
    plan = plan_for(
        config,
        schedule=schedule,
        memory_mode=memory_mode,
        pipe=2,
        expert=2,
        layers_per_stage=layers_per_stage,
        overlap=True,
    )
    check_equal(config, plan, tolerance=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_holds_both_passes_together(overlap):
    config = model(dense_layers=0)
    plan = plan_for(config, memory_mode="named", pipe=2, expert=2, layers_per_stage=(2, 2), overlap=overlap)
    executor = executor_for(config, plan)
    text = jax.jit(executor.gradients).trace(*abstract_arguments(executor)).lower().as_text()
    # One before each of the four exchanges of a pair of layers, together with a computation of the other pass.
    barriers = [line for line in text.splitlines() if "stablehlo.optimization_barrier" in line]
    # `slots.add` holds its place and a value.
    held = [line for line in barriers if not re.search(r": tensor<i32>(, tensor<i32>)+, tensor<\S+>$", line)]
    assert len(held) == (4 if overlap else 0)


@pytest.mark.parametrize(
    ("dispatch", "chunks"), [("halo2_dedup", 1), pytest.param("flat", 2, marks=pytest.mark.slow)]
)
def test_overlap_goes_with_other_dispatchers_and_with_chunks(dispatch, chunks):
    plan = plan_for(
        model(), memory_mode="named", dispatch=dispatch, dispatch_chunks=chunks, pipe=2, expert=4,
        layers_per_stage=(2, 2), overlap=True,
    )  # fmt: skip
    check_equal(model(), plan, tolerance=1e-5)


# (schedule, memory mode, dispatcher, chunks, what else)
ALL_AT_ONCE, IN_PASSES = dict(expert=4), dict(expert=2, data=2, capacity_factor=0.4, overflow="passes")
WAYS = [
    # Pipe ranks and replicas make different numbers of passes.
    ("one_f_one_b", "layer", "halo2_dedup", 2, IN_PASSES),
    ("zb_h1", "stash", "halo2", 1, IN_PASSES),
]
# All at once go every day: two chunks of halo2_dedup under zb_h1 in test_placement.py, and DAILY below.
MORE_WAYS = [
    ("one_f_one_b", "layer", "halo2_dedup", 3, ALL_AT_ONCE),
    ("zb_h1", "named", "halo2_dedup", 2, ALL_AT_ONCE),
    ("one_f_one_b", "stage", "flat", 1, IN_PASSES),
    ("zb_h1", "named", "halo2_dedup", 1, IN_PASSES),
    ("zb_v", "products", "flat", 3, IN_PASSES),
]


@pytest.mark.parametrize(
    ("schedule", "mode", "dispatch", "chunks", "others"),
    [*WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in MORE_WAYS)],
)
def test_ways_to_the_experts_equal_one_device(schedule, mode, dispatch, chunks, others):
    check_way(schedule, mode, dispatch, chunks, pipe=2, **others)


def check_way(schedule, mode, dispatch, chunks, *, pipe, **others):
    stages = pipe * registry.chunks_of(schedule)
    plan = plan_for(
        model(), schedule=schedule, memory_mode=mode, dispatch=dispatch, dispatch_chunks=chunks, pipe=pipe,
        layers_per_stage=(4 // stages,) * stages, M=8 if schedule == "dualpipe_v" else 4, **others,
    )  # fmt: skip
    check_equal(model(), plan, tolerance=1e-5)


def every_schedule():
    """Every schedule with every hierarchical dispatcher: two nodes of two devices, and two pipe ranks or replicas.

    Memory modes, chunks, and whether all rows travel at once change from cell to cell.
    """
    for i, schedule in enumerate(registry.names()):
        for j, dispatch in enumerate(name for name in DISPATCHERS if name != "flat"):
            others = dict(capacity_factor=0.4, overflow="passes") if (i + j) % 4 == 3 else {}
            mode, chunks = MEMORY_MODES[(i + j) % len(MEMORY_MODES)], 1 + (i + j) % 3
            slow = (schedule, dispatch) not in DAILY
            yield pytest.param(
                schedule, mode, dispatch, chunks, others, marks=[pytest.mark.slow] if slow else []
            )


# Stages on a V with two levels, and permutes. Of the others every schedule goes with flat in test_executor.py.
DAILY = {("dualpipe_v", "halo2_dedup"), ("zb_v", "halo3_dedup")}


@pytest.mark.parametrize(("schedule", "mode", "dispatch", "chunks", "others"), [*every_schedule()])
def test_every_schedule_by_nodes_equals_one_device(schedule, mode, dispatch, chunks, others):
    if DISPATCHERS[dispatch].waits_for_all:
        with pytest.raises(
            ValueError, match="permutes, which wait for every device .* pipe must be 1, got 2"
        ):
            check_way(schedule, mode, dispatch, chunks, pipe=2, expert=4, **others)
        check_way(schedule, mode, dispatch, chunks, pipe=1, expert=4, data=2, **others)
    else:
        check_way(schedule, mode, dispatch, chunks, pipe=2, expert=4, **others)


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["halo3", "halo3_dedup"])
def test_rows_that_travel_later_through_leaders_equal_one_device(dispatch):
    # Permutes wait for all devices, so replicas agree on the number of passes.
    ways = dict(dispatch=dispatch, expert=4, data=2, capacity_factor=0.3, overflow="passes")
    check_equal(model(), plan_for(model(), **ways), tolerance=1e-5)


@pytest.mark.slow
def test_dispatch_by_nodes_and_in_chunks_cannot_deadlock():
    check_cannot_deadlock("zb_h1", (2, 4, 1), "layer", dispatch="halo2_dedup", dispatch_chunks=2)


# Training is looked through before every comparison above; here evaluation, too.
@pytest.mark.parametrize("schedule", ["zb_h1", pytest.param("one_f_one_b", marks=pytest.mark.slow)])
def test_later_passes_cannot_deadlock(schedule):
    check_cannot_deadlock(
        schedule, (2, 2, 2), "layer", dispatch="halo2_dedup", capacity_factor=0.4, overflow="passes"
    )
