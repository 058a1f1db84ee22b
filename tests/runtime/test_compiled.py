"""What the compiler makes of a step: memory that does not follow microbatches, no scatter, GPU lowering."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import pytest
from jax.extend.core import jaxprs_in_params

from benchmarks.cases import abstract_batch, compiled_step, dense_model, make_executor, moe_model, router_bias
from benchmarks.overhead import large_copies
from piperjax.planner.executed import executed_flop
from piperjax.runtime.compiled import work_of
from piperjax.runtime.lint import collectives
from piperjax.training.config import OptimizerConfig
from piperjax.training.optimizer import apply, init_moments


@functools.cache
def exchanging(memory_mode):
    """The step of two pipe ranks and two devices with experts: (as it is written, as it is compiled)."""
    executor = make_executor(moe_model(), pipe=2, expert=2, num_microbatches=4, memory_mode=memory_mode)
    return texts(executor)


def texts(executor):
    arguments = (executor.abstract_params, router_bias(executor.config), abstract_batch(executor))
    lowered = jax.jit(executor.gradients).lower(*arguments)
    return lowered.as_text(), lowered.compile().as_text()


def temp_bytes(schedule, num_microbatches):
    executor = make_executor(moe_model(), pipe=4, schedule=schedule, num_microbatches=num_microbatches)
    return compiled_step(executor).memory_analysis().temp_size_in_bytes


def test_memory_does_not_follow_microbatches_under_one_f_one_b():
    small, large = temp_bytes("one_f_one_b", 8), temp_bytes("one_f_one_b", 32)
    assert 0 < large <= 1.01 * small


@pytest.mark.slow
def test_memory_follows_microbatches_under_gpipe():
    # It keeps one input per layer and one gradient for every microbatch: the measurement above can tell.
    slot = 64 * 64 * 4
    assert temp_bytes("gpipe", 16) - temp_bytes("gpipe", 8) == pytest.approx(8 * 2 * slot, rel=0.05)


@pytest.mark.parametrize(
    ("make_model", "options"),
    [
        (moe_model, dict(layers_per_stage=(6, 3))),
        (dense_model, dict(layers_per_stage=(6, 3), overlap=True)),
        pytest.param(dense_model, dict(layers_per_stage=(6, 6), overlap=True), marks=pytest.mark.slow),
        (dense_model, dict(layers_per_stage=(6, 3), schedule="zb_h1")),
        (dense_model, dict(layers_per_stage=(1, 1), schedule="zb_h1")),
        pytest.param(dense_model, dict(layers_per_stage=(1, 1)), marks=pytest.mark.slow),
    ],
    ids=[
        "uneven",
        "uneven-overlap",
        "overlap",
        "uneven-weight-gradient",
        "one-layer-weight-gradient",
        "one-layer",
    ],
)
def test_the_gradients_of_all_layers_are_there_once(make_model, options):
    stages = options["layers_per_stage"]
    config = make_model(num_layers=sum(stages), d_model=128, d_ff=256)
    executor = make_executor(config, pipe=2, num_microbatches=4, seq_len=16, **options)
    compiled = compiled_step(executor)
    layers = jax.tree.leaves(executor.abstract_params["layers"])
    accumulators = sum(leaf.size * leaf.dtype.itemsize for leaf in layers) // 2
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in layers) // 2
    # Beside them a layer works: its weights, their gradients, and the sum of these with what was there.
    working = 3.5 * accumulators / max(stages)
    assert large_copies(compiled.as_text(), largest) == []
    if max(stages) > 1:
        assert compiled.memory_analysis().temp_size_in_bytes < accumulators + working


@pytest.mark.parametrize("schedule", ["one_f_one_b", "zb_h1"])
def test_nothing_of_a_layer_runs_before_its_loop(schedule):
    # One rank has a dense layer and the other one with experts, so every loop over layers has one turn or none: what a
    # turn does not change, such as a forward that runs again, would be computed for both kinds and wait.
    layers = dense_model(d_model=48, num_layers=1).layers + moe_model(d_model=48, num_layers=1).layers
    config = dataclasses.replace(moe_model(d_model=48), layers=layers)
    executor = make_executor(config, pipe=2, num_microbatches=4, seq_len=32, schedule=schedule)
    found = []
    for computation in compiled_step(executor).as_text().split("\n\n"):
        loops = re.findall(r" while\(.*op_name=\"[^\"]*/(layers_\w+)/while\"", computation)
        work = re.findall(r"op_name=\"[^\"]*/(layers_\w+)/while/body/[^\"]*dot_general\"", computation)
        found += [kind for kind in work if kind in loops]
    assert found == []


def choices(jaxpr):
    """(operation that makes the index, branches) of every conditional, also of those inside loops and branches."""
    made_by = {var: equation.primitive.name for equation in jaxpr.eqns for var in equation.outvars}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            yield made_by[equation.invars[0]], [branch.jaxpr for branch in equation.params["branches"]]
        for inner in jaxprs_in_params(equation.params):
            yield from choices(inner)


@pytest.mark.parametrize(
    "options",
    [{}, dict(overlap=True), dict(schedule="zb_h1"), dict(vocabulary="whole")],
    ids=["1f1b", "overlap", "weight-gradient", "whole"],
)
def test_what_idle_ticks_hand_on_comes_first_in_a_choice_by_number(options):
    # Otherwise XLA of jax 0.10 copies stash and all gradients for GPUs, in idle ticks and beside the loop over them.
    executor = make_executor(moe_model(num_layers=4), pipe=2, expert=2, num_microbatches=4, **options)
    arguments = (executor.abstract_params, router_bias(executor.config), abstract_batch(executor))
    found = list(choices(jax.make_jaxpr(executor.gradients)(*arguments).jaxpr))
    idle = [[not branch.eqns for branch in branches] for _, branches in found]
    assert sum(map(any, idle)) >= 3
    assert all(one == [True, False] for one in idle if any(one))
    assert {index for (index, _), one in zip(found, idle, strict=True) if any(one)} == {"clamp"}
    # Equal ones become one, of which there are copies later, behind the others.
    texts = [str(branches[0]) for (_, branches), one in zip(found, idle, strict=True) if any(one)]
    assert len(set(texts)) == len(texts)


def without_embedding_gradient(hlo):
    """HLO lines with a scatter, but for the one that adds up the rows of the embedding's gradient."""
    lines = [line for line in hlo.splitlines() if re.search(r"= \S+ scatter\(", line)]
    return [line for line in lines if "f32[256,64]" not in line and "f32[128,64]" not in line]


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_in_the_layers_compiles_to_a_scatter(alone):
    written, compiled = (
        texts(make_executor(moe_model(), num_microbatches=4)) if alone else exchanging("layer")
    )
    # One scatter is written in the whole step: the embedding's gradient. The compiler adds none.
    assert written.count('"stablehlo.scatter"') == 1
    assert without_embedding_gradient(compiled) == []


def optimizer_step(executor):
    """Gradients and AdamW in one function, as training compiles it."""

    def step(params, moments, number, bias, batch):
        grads, stats = executor.gradients(params, bias, batch)
        return apply(OptimizerConfig(), 10, step=number, params=params, moments=moments, grads=grads), stats

    return step


@functools.cache
def traced_train_step(dtype):
    executor = make_executor(moe_model(), pipe=2, expert=2, data=2, num_microbatches=4, dtype=dtype)
    params = executor.abstract_params
    moments = jax.eval_shape(init_moments, params)
    arguments = (params, moments, jax.ShapeDtypeStruct((), "int32"), router_bias(executor.config))
    return jax.jit(optimizer_step(executor)).trace(*arguments, abstract_batch(executor))


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_train_step_lowers_for_gpus_from_a_cpu(platform, dtype):
    text = traced_train_step(dtype).lower(lowering_platforms=(platform,)).as_text()
    assert "all_to_all" in text
    assert "collective_permute" in text
    # Expert matrices go through the Triton kernel, not through a dense or a ragged product.
    assert re.search(r"triton", text)
    assert "ragged_dot" not in text


@functools.cache
def traced_in_chunks():
    executor = make_executor(
        moe_model(), pipe=2, expert=4, expert_factors=(1, 2, 2), num_microbatches=4, dtype="bfloat16",
        schedule="zb_h1", dispatch="halo2_dedup", dispatch_chunks=2, memory_mode="named",
    )  # fmt: skip
    arguments = (executor.abstract_params, router_bias(executor.config), abstract_batch(executor))
    return jax.jit(executor.gradients).trace(*arguments)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_rows_that_cross_once_lower_for_gpus_in_chunks(platform):
    text = traced_in_chunks().lower(lowering_platforms=(platform,)).as_text()
    assert "optimization_barrier" in text
    assert "triton" in text
    assert text.count('"stablehlo.scatter"') == 1  # the embedding's gradient


@pytest.mark.parametrize(
    ("memory_mode", "repeated"), [("layer", 2), ("named", 0), ("products", 0), ("stash", 0)]
)
def test_backward_repeats_no_exchange_of_rows_that_cross_once(memory_mode, repeated):
    chunks = 2
    executor = make_executor(
        moe_model(), expert=4, expert_factors=(1, 2, 2), num_microbatches=4, memory_mode=memory_mode,
        dispatch="halo2_dedup", dispatch_chunks=chunks,
    )  # fmt: skip
    arguments = (executor.abstract_params, router_bias(executor.config), abstract_batch(executor))
    found = Counter(
        one.name
        for one in collectives(jax.make_jaxpr(executor.gradients)(*arguments))
        if one.axes in ({"expert_node"}, {"expert_local"})
    )
    # Between nodes and inside of them rows go out, with gates and ids in the same message, and gradients of results;
    # sums of results come back, and of gradients of rows and gates. Rows are not made again without what stands at the
    # same barrier.
    beside = chunks - 1 if repeated else 0
    assert found == {
        "all_gather": chunks * (2 * 2 + repeated),
        "all_to_all": chunks * 2 * 2 + beside,
    }


# The modes that repeat none are every day compared above, as they are written.
@pytest.mark.parametrize(
    ("memory_mode", "expected"),
    [
        ("stage", 7),
        ("layer", 5),
        ("products", 4),
        pytest.param("named", 4, marks=pytest.mark.slow),
        pytest.param("stash", 4, marks=pytest.mark.slow),
    ],
)
def test_backward_repeats_as_many_exchanges_as_the_memory_mode_says(memory_mode, expected):
    # Every loop over layers holds each exchange once.
    _, text = exchanging(memory_mode)
    widths = re.findall(r"= \(?f32\[\d+,(\d+)\]\S*,? .*all-to-all(?:-start)?\(", text)
    # Dispatch and combine, forward and backward, and what backward does again: what experts return it does not need.
    assert widths.count(str(moe_model().d_model)) == expected
    # Beside the rows that go there, gates and counts; and gradients of gates return.
    assert len(widths) == expected + {7: 4, 5: 3, 4: 2}[expected]


@pytest.mark.parametrize("schedule", ["one_f_one_b", "zb_h1"])
def test_what_products_keep_of_attention_in_blocks_saves_its_forward(monkeypatch, schedule):
    for name, size in (("LONGEST_WHOLE", 16), ("SMALLEST_BLOCK", 16), ("LARGEST_BLOCK", 16)):
        monkeypatch.setattr(f"models.query_blocks.{name}", size)
    config = dense_model(num_layers=2, d_model=32, d_ff=64)
    executor = make_executor(
        config, pipe=2, num_microbatches=2, seq_len=32, schedule=schedule, memory_mode="products"
    )
    compiled = compiled_step(executor)
    # Two products forward; backward the scores again and the gradients of weights, values, keys and queries.
    blocks = re.findall(r" dot\(.*lhs_batch_dims=", compiled.as_text())
    assert len(blocks) == 2 + 5
    assert work_of(compiled, executor).flop == pytest.approx(executed_flop(config, executor.plan))


@pytest.mark.parametrize("stages", [(2, 2), (1, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize(
    "config", [dense_model(d_model=32, d_ff=64), moe_model(d_model=32)], ids=["dense", "moe"]
)
def test_a_stage_is_run_again_but_for_its_last_layer(config, stages):
    # With one layer in every stage nothing is run again but by the layers' own backwards, as in mode "layer".
    work = {}
    for memory_mode in ("stage", "layer"):
        executor = make_executor(
            config,
            pipe=len(stages),
            num_microbatches=4,
            layers_per_stage=stages,
            memory_mode=memory_mode,
        )
        work[memory_mode] = work_of(compiled_step(executor), executor).flop
        expected = executed_flop(config, executor.plan, backend="cpu")
        assert work[memory_mode] == pytest.approx(expected), memory_mode
    assert (work["stage"] > work["layer"]) == (max(stages) > 1)


@pytest.mark.parametrize("pipe", [1, 4])
def test_no_layer_computes_sines(pipe):
    # A microbatch has its rotary angles once. With one layer per stage there is no loop to take them out of.
    text = compiled_step(
        make_executor(moe_model(num_layers=4), pipe=pipe, num_microbatches=8, microbatch_size=2)
    ).as_text()
    sines = [line for line in text.splitlines() if re.search(r" (co)?sine\(", line)]
    assert sines and not [line for line in sines if "layers_" in line]


def test_no_operation_of_a_layer_slices_the_batch_anew():
    # One layer per stage: there is no loop out of which the compiler could take it.
    executor = make_executor(moe_model(num_layers=4), pipe=4, num_microbatches=8, microbatch_size=2)
    text = compiled_step(executor).as_text()
    whole_batch = r"s32\[8,2,64\]"
    fusions = re.findall(
        r"= (\S+) fusion\(.*?calls=(%[\w.]+), .*op_name=\"[^\"]*/(?:forward|backward)/", text
    )
    assert fusions
    takes_it = set(re.findall(rf"^(%[\w.]+) \([^)]*{whole_batch}", text, re.MULTILINE))
    assert not [shape for shape, called in fusions if called in takes_it]
