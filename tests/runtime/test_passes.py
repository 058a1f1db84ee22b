"""The passes of a layer: backward in one and in two parts, what each memory mode keeps, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.cases import dense_model
from benchmarks.split import dense_layer, matmul_flop, passes_of
from meshes.axes import AXES
from meshes.mesh import build_mesh
from piperjax.planner.plan import MEMORY_MODES as NAMES
from piperjax.runtime.passes import MEMORY_MODES
from piperjax.runtime.varying import vary

T, D = 16, 8


def on_one_device(function, *arguments):
    mesh = build_mesh(pipe=1, data=1, expert_factors=(1, 1, 1), devices=jax.devices()[:1])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(AXES), check_vma=True))(
        *arguments
    )


def test_the_plan_and_the_executor_know_the_same_memory_modes():
    assert set(NAMES) == set(MEMORY_MODES)


@pytest.mark.parametrize("mode", NAMES)
def test_backward_in_two_parts_is_backward(mode):
    def run(x, gradient):
        x, gradient, scale = vary((x, gradient, jnp.ones((), jnp.float32)))
        passes, weights, surroundings = passes_of(dense_layer(), mode, x)
        _, kept = passes.forward(weights, x, surroundings)()
        x_grad, whole = passes.backward(weights, kept, surroundings, gradient, scale)()
        x_first, small, taps = passes.input_gradient(weights, kept, surroundings, gradient, scale)()
        large = passes.weight_gradient(weights, taps, surroundings)()
        assert [a is None for a in small] == [b is not None for b in large]
        parts = [b if a is None else a for a, b in zip(small, large, strict=True)]
        return [a[None] for a in (x_grad, *whole)], [a[None] for a in (x_first, *parts)]

    rng = np.random.default_rng(0)
    x, gradient = (jnp.asarray(rng.normal(size=(1, T, D)), jnp.float32) for _ in range(2))
    whole, parts = on_one_device(run, x, gradient)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), parts, whole)


@pytest.mark.parametrize("mode", [name for name, mode in MEMORY_MODES.items() if mode.by_stage])
def test_a_stage_that_is_run_again_keeps_inputs_of_layers_only(mode):
    # So nothing of its last layer has to run for what that layer keeps.
    def run(x):
        x = vary(x)
        passes, weights, surroundings = passes_of(dense_layer(), mode, x)
        _, (kept,) = passes.forward(weights, x, surroundings)()
        return kept[None]

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, D)), jnp.float32)
    np.testing.assert_array_equal(on_one_device(run, x)[0], x)


def test_modes_keep_more_and_more():
    sizes = []
    for mode in ("layer", "products", "stash"):

        def run(x, mode=mode):
            passes, _, _ = passes_of(dense_layer(), mode, vary(x))
            sizes.append(sum(kept.size * kept.dtype.itemsize for kept in passes.kept))
            return vary(x)

        on_one_device(run, jnp.zeros((1, T, D)))
    assert sizes[0] == T * D * 4
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("mode", ["layer", "products", "stash"])
def test_two_parts_multiply_no_more_than_one(mode):
    whole, first, second = matmul_flop(dense_model(num_layers=1), mode, num_tokens=64)
    assert first + second <= 1.02 * whole
    assert 0.15 * whole < second < 0.5 * whole
