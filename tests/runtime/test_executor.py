"""The executor equals one device: loss and every gradient, for every schedule, mesh and memory mode."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from meshes.mesh import build_mesh
from piperjax.planner.plan import MEMORY_MODES
from piperjax.runtime.executor import Executor
from piperjax.runtime.lint import check_no_deadlock
from piperjax.schedules import registry
from tests.runtime.executor_cases import (
    SEQ_LEN,
    batch_for,
    check_cannot_deadlock,
    check_equal,
    check_schedule,
    executor_for,
    gradients_of,
    initial_params,
    model,
    plan_for,
    reference,
    router_bias_for,
)

MESHES = [
    (pipe, expert, data)
    for pipe, expert, data in itertools.product((1, 2, 4), (1, 2, 4), (1, 2))
    if pipe * expert * data <= 8
]
GRID = [(schedule, *mesh, M) for schedule in ("gpipe", "one_f_one_b") for mesh in MESHES for M in (4, 8)]
# Every day without a pipeline: no axis, each of both, and both, up to four devices wide. With one: EVERY_DAY below.
DAILY = [
    ("one_f_one_b", 1, 1, 1, 4), ("one_f_one_b", 1, 4, 1, 8), ("one_f_one_b", 1, 1, 2, 8),
    ("one_f_one_b", 1, 2, 2, 4),
]  # fmt: skip


def daily(cells, today):
    """The cells as parameters, of which all but today's are slow."""
    return [pytest.param(*cell, marks=[] if cell in today else [pytest.mark.slow]) for cell in cells]


@pytest.mark.parametrize(("schedule", "pipe", "expert", "data", "M"), daily(GRID, DAILY))
def test_equals_one_device(schedule, pipe, expert, data, M):
    config = model()
    plan = plan_for(config, schedule=schedule, pipe=pipe, expert=expert, data=data, M=M)
    check_equal(config, plan, tolerance=1e-5)


IN_FLOAT64 = [
    ("one_f_one_b", 2, 2, 2, "layer"),
    ("gpipe", 4, 2, 1, "stage"),
    ("one_f_one_b", 1, 4, 2, "layer"),
]


@pytest.mark.parametrize(
    ("schedule", "pipe", "expert", "data", "memory_mode"), daily(IN_FLOAT64, IN_FLOAT64[:1])
)
def test_equals_one_device_in_float64(schedule, pipe, expert, data, memory_mode):
    with jax.enable_x64(True):
        config = model()
        plan = plan_for(
            config, schedule=schedule, pipe=pipe, expert=expert, data=data, memory_mode=memory_mode
        )
        check_equal(config, plan, tolerance=1e-10, dtype="float64")


def alternating(kinds):
    """A model of dense layers and of MoE layers in this order."""
    config = model()
    by_letter = {"D": config.layers[0], "M": config.layers[-1]}
    return dataclasses.replace(config, layers=tuple(by_letter[letter] for letter in kinds))


# Every day: two kinds of layer on uneven stages, tied vectors, a router with a bias, no experts at all. The slow ones
# are parts of these, or of what overlaps every day in test_executor_ways.py: layers of experts only, on uneven stages.
@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param(model(), dict(pipe=4, memory_mode="stage"), marks=pytest.mark.slow),
        pytest.param(model(), dict(pipe=2, expert=2, layers_per_stage=(3, 1)), marks=pytest.mark.slow),
        (
            model(num_layers=5, dense_layers=2),
            dict(pipe=4, layers_per_stage=(1, 2, 1, 1), memory_mode="stage"),
        ),
        (alternating("DMDMMD"), dict(pipe=2, expert=2, layers_per_stage=(4, 2), memory_mode="stage")),
        (
            model(embeddings="tied", balance="bias", score="sigmoid"),
            dict(pipe=2, expert=2, data=2),
        ),
        pytest.param(model(embeddings="tied"), dict(pipe=2, data=2), marks=pytest.mark.slow),
        pytest.param(model(balance="bias", score="sigmoid"), dict(pipe=2, expert=4), marks=pytest.mark.slow),
        pytest.param(model(dense_layers=0), dict(pipe=2, expert=2), marks=pytest.mark.slow),
        (model(dense_layers=4), dict(pipe=2, data=2)),
    ],
    ids=[
        "stage-mode",
        "uneven",
        "uneven-two-kinds",
        "last-layers-of-two-kinds",
        "tied-sigmoid-bias",
        "tied",
        "sigmoid-bias",
        "moe-only",
        "dense-only",
    ],
)
def test_equals_one_device_for_other_models_and_modes(config, options):
    check_equal(config, plan_for(config, **options), tolerance=1e-5)


SCHEDULES = tuple(registry.names())
# Every schedule once: every memory mode at least twice, with one stage per rank and with two, and every mesh that has a
# pipeline. Four ranks go with one stage each, since two make a deeper model; one vocabulary is whole.
EVERY_DAY = [
    ("gpipe", "stage", dict(pipe=4, expert=2, data=1)),
    ("one_f_one_b", "layer", dict(pipe=4, expert=1, data=1)),
    ("interleaved", "named", dict(pipe=2, expert=2, data=1)),
    ("zb_h1", "products", dict(pipe=2, expert=4, data=1)),
    ("zb_h2", "stash", dict(pipe=4, expert=1, data=2)),
    ("zb_dual", "named", dict(pipe=4, expert=2, data=1)),
    ("zb_v", "layer", dict(pipe=2, expert=2, data=2)),
    ("v_half", "products", dict(pipe=2, expert=1, data=2, vocabulary="whole")),
    ("v_min", "stage", dict(pipe=2, expert=4, data=1)),
    ("dualpipe_v", "stash", dict(pipe=2, expert=2, data=1)),
    ("auto", "layer", dict(pipe=2, expert=1, data=1)),
]


def test_every_schedule_has_its_day():
    assert {schedule for schedule, _, _ in EVERY_DAY} == set(SCHEDULES)
    assert {mode for _, mode, _ in EVERY_DAY} == set(MEMORY_MODES)


@pytest.mark.parametrize(("schedule", "mode", "options"), EVERY_DAY)
def test_every_schedule_and_memory_mode_equals_one_device(schedule, mode, options):
    check_schedule(schedule, mode, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "mode"), [*itertools.product(SCHEDULES, MEMORY_MODES)])
def test_all_schedules_in_all_memory_modes_equal_one_device(schedule, mode):
    check_schedule(schedule, mode)


@pytest.mark.parametrize(
    ("schedule", "embeddings"),
    daily([("one_f_one_b", "untied"), ("zb_v", "tied"), ("v_half", "untied")], [("zb_v", "tied")]),
)
def test_a_whole_vocabulary_equals_one_device(schedule, embeddings):
    config = model(embeddings=embeddings)
    stages = 2 * registry.chunks_of(schedule)
    plan = plan_for(
        config,
        schedule=schedule,
        pipe=2,
        expert=2,
        layers_per_stage=(4 // stages,) * stages,
        vocabulary="whole",
    )
    check_equal(config, plan, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_equals_one_device_over_four_ranks(schedule):
    check_schedule(schedule, "layer", pipe=4, data=1)


@pytest.mark.slow
@pytest.mark.parametrize("pipe", [3, 4])
@pytest.mark.parametrize("schedule", ["zb_h1", "zb_v"])
def test_tables_of_few_microbatches_equal_one_device(schedule, pipe):
    """Modes without recomputation get tables that begin with one action per tick, or have no others."""
    check_schedule(schedule, "products", pipe=pipe, data=1, M=4)


@pytest.mark.parametrize(
    ("schedule", "mode"),
    daily(
        [
            (schedule, mode)
            for schedule in ("one_f_one_b", "zb_h1")
            for mode in ("layer", "products", "stash")
        ],
        [("zb_h1", "products")],
    ),
)
def test_attention_in_blocks_equals_one_device(monkeypatch, schedule, mode):
    config = model()
    reference(config, 4)  # with all weights at once
    for name, size in (("LONGEST_WHOLE", 2), ("SMALLEST_BLOCK", 2), ("LARGEST_BLOCK", SEQ_LEN // 2)):
        monkeypatch.setattr(f"models.query_blocks.{name}", size)
    plan = plan_for(config, schedule=schedule, pipe=2, expert=2, data=1, M=4, memory_mode=mode)
    check_equal(config, plan, tolerance=1e-5)


def check_evaluation(config, plan):
    executor = executor_for(config, plan)
    batch = jax.device_put(batch_for(config.vocab_size, 4), executor.batch_sharding)
    traced = jax.jit(executor.evaluate).trace(executor.init_params(0), router_bias_for(config), batch)
    check_no_deadlock(traced.jaxpr)
    stats = traced.lower().compile()(executor.init_params(0), router_bias_for(config), batch)
    cross_entropy, aux_loss, load, _ = reference(config, 4)
    assert float(stats.loss) == pytest.approx(cross_entropy, rel=1e-5)
    assert float(stats.aux_loss) == pytest.approx(aux_loss, rel=1e-5)
    assert np.array_equal(np.asarray(stats.load), load)


@pytest.mark.parametrize("schedule", ["zb_v", "interleaved", pytest.param("zb_h1", marks=pytest.mark.slow)])
def test_schedules_evaluate_over_their_own_placement(schedule):
    stages = 2 * registry.chunks_of(schedule)
    config = model()
    check_evaluation(
        config, plan_for(config, schedule=schedule, pipe=2, layers_per_stage=(4 // stages,) * stages)
    )


@pytest.mark.parametrize(
    "options", [dict(pipe=2, expert=2, data=2), pytest.param({}, marks=pytest.mark.slow)]
)
def test_evaluation_is_the_loss_of_the_step(options):
    config = model()
    check_evaluation(config, plan_for(config, **options))


@pytest.mark.parametrize(
    "options",
    [
        dict(pipe=4, expert=2),
        dict(pipe=2, layers_per_stage=(1, 3)),
        dict(schedule="zb_v", pipe=2, data=2, expert=2, layers_per_stage=(1, 1, 1, 1)),
        dict(schedule="interleaved", pipe=2, layers_per_stage=(1, 1, 1, 1)),
        pytest.param(dict(), marks=pytest.mark.slow),
        pytest.param(dict(pipe=2, data=2, expert=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_initial_parameters_are_the_same_on_every_mesh(options):
    config = model()
    expected = initial_params(config, 11)
    executor = executor_for(config, plan_for(config, **options))
    params = executor.init_params(11)
    found = jax.device_get(executor.to_logical(params))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    # Also what pads, and where on the devices everything is.
    moved = executor.from_logical(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(moved))
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == executor.param_shardings


def test_logical_and_device_layout_are_inverse():
    config = model(num_layers=5)
    executor = executor_for(config, plan_for(config, pipe=2, data=2, layers_per_stage=(2, 3)))
    params = executor.init_params(5)
    again = executor.from_logical(executor.to_logical(params))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, again)
    jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim) or pytest.fail("moved"), params, again
    )


DEADLOCK_CASES = [((4, 2, 1), "stage"), ((2, 2, 2), "layer"), ((2, 4, 1), "stash")]


# Every comparison above looks for deadlocks before it runs; every day here, stages on a V over four ranks, which are
# too many for that, in training and in evaluation.
@pytest.mark.parametrize(
    ("schedule", "mesh", "memory_mode"),
    daily(
        [(name, *DEADLOCK_CASES[i % len(DEADLOCK_CASES)]) for i, name in enumerate(SCHEDULES)]
        + [("zb_v", (4, 2, 1), "layer")],
        [("zb_v", (4, 2, 1), "layer")],
    ),
)
def test_no_collective_can_deadlock(schedule, mesh, memory_mode):
    check_cannot_deadlock(schedule, mesh, memory_mode)


@pytest.mark.slow
def test_a_whole_vocabulary_cannot_deadlock():
    check_cannot_deadlock("zb_v", (2, 2, 1), "layer", vocabulary="whole")


def test_bfloat16_stays_near_float32():
    config = model()
    plan = plan_for(config, pipe=2, expert=2)
    executor = executor_for(config, plan, dtype="bfloat16")
    grads, stats = gradients_of(executor)
    cross_entropy, _, _, expected = reference(config, 4)
    assert float(stats.loss) == pytest.approx(cross_entropy, rel=2e-3)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(expected)))
    difference = jax.tree.map(
        lambda a, b: np.sum(np.square(a - b)), jax.device_get(executor.to_logical(grads)), expected
    )
    # bfloat16 has 8 bits; a token whose two best experts nearly tie may also go elsewhere.
    assert np.sqrt(sum(jax.tree.leaves(difference))) < 0.05 * norm


def test_mesh_and_plan_must_agree():
    config = model()
    plan = plan_for(config, pipe=2)
    mesh = build_mesh(pipe=1, data=2, expert_factors=(1, 1, 1), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="the mesh must have the plan's axes"):
        Executor(config, plan, mesh)


def test_experts_must_divide():
    config = model()
    thirds = dataclasses.replace(plan_for(config), expert=3, expert_factors=(1, 1, 3), batch_size=12)
    with pytest.raises(ValueError, match="the expert axis must divide the 8 experts of test, got expert = 3"):
        executor_for(config, thirds)
