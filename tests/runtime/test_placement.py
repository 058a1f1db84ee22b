"""Experts may be anywhere: moving them moves every bit to where a table says, and a step stays what it was."""

import jax
import numpy as np
import pytest

from piperjax.runtime.placement import check, inverse
from piperjax.schedules import registry
from tests.runtime.executor_cases import (
    check_equal,
    executor_for,
    initial_params,
    model,
    plan_for,
)


def placement_for(config, seed=0):
    """Another permutation in every layer."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(config.num_experts) for _ in config.moe_layers]
    return np.array(rows, np.int32)


MESHES = [
    dict(pipe=2, expert=2, data=2, layers_per_stage=(3, 2)),
    pytest.param(dict(), marks=pytest.mark.slow),
    pytest.param(dict(pipe=2, expert=4), marks=pytest.mark.slow),
    dict(expert=8),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_expert_is_where_the_placement_says(mesh):
    config = model(num_layers=5, dense_layers=2)
    executor, placement = executor_for(config, plan_for(config, **mesh)), placement_for(config)
    params, logical = executor.init_params(3), initial_params(config, 3)
    moved = executor.move_experts(params, inverse(placement))
    # As if there were no placement, the l-th expert of what was moved is the logical one that belongs in its place.
    found = jax.device_get(executor.to_logical(moved))
    for kind, stack in logical["layers"].items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(stack):
            expected = np.asarray(leaf)
            if any(entry.key == "experts" for entry in path):
                expected = np.stack(
                    [rows[order] for rows, order in zip(expected, inverse(placement), strict=True)]
                )
            place = found["layers"][kind]
            for entry in path:
                place = place[entry.key]
            np.testing.assert_array_equal(place, expected)
    back = executor.to_logical(moved, placement)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), jax.device_get(logical))
    again = executor.from_logical(back, placement)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(moved))
    assert jax.tree.map(lambda leaf: leaf.sharding, again) == executor.param_shardings


# (schedule, memory mode, dispatcher, chunks, what else)
STEPS = [
    ("zb_h1", "stash", "halo2_dedup", 2, dict(pipe=2, expert=4)),
    ("zb_v", "products", "flat", 1, dict(pipe=2, expert=4)),
    ("one_f_one_b", "named", "halo2", 1, dict(pipe=2, expert=2, data=2)),
    ("one_f_one_b", "stage", "halo3_dedup", 1, dict(expert=4, data=2)),
    (
        "interleaved", "layer", "halo2_dedup", 1,
        dict(pipe=2, expert=4, capacity_factor=0.4, overflow="passes"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "mode", "dispatch", "chunks", "others"),
    [STEPS[0], *(pytest.param(*step, marks=pytest.mark.slow) for step in STEPS[1:])],
)
def test_steps_with_experts_elsewhere_equal_one_device(schedule, mode, dispatch, chunks, others):
    config = model(dense_layers=1)
    stages = others.get("pipe", 1) * registry.chunks_of(schedule)
    plan = plan_for(
        config, schedule=schedule, memory_mode=mode, dispatch=dispatch, dispatch_chunks=chunks,
        layers_per_stage=(4 // stages,) * stages, **others,
    )  # fmt: skip
    check_equal(config, plan, tolerance=1e-5, placement=placement_for(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[:1], r"must be whole numbers \[3 layers with experts, 8 experts\], got int32 \[1, 8\]"),
        (lambda rows: rows.astype(np.float32), r"got float32 \[3, 8\]"),
        (lambda rows: np.where(rows == 7, 0, rows), "every physical expert 0 to 7 once .* got .* in layer 1"),
    ],
)  # fmt: skip
def test_what_is_no_placement_is_refused(change, says):
    config = model()
    check(placement_for(config), config)
    with pytest.raises(ValueError, match=says):
        check(change(placement_for(config)), config)
