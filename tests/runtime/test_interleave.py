"""Two programs in one: the results are theirs, and exchanges of each wait beside products of the other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from meshes.axes import AXES, EXPERT
from meshes.mesh import build_mesh
from piperjax.runtime.interleave import interleave, parts
from piperjax.runtime.program import Call, trace

D = 4


def exchanged(x):
    return lax.all_to_all(x, EXPERT[-1:], 0, 0, tiled=True)


def layer(x, w):
    """Products, an exchange, products, an exchange, a sum."""
    arrived = exchanged(x @ w)
    return [exchanged(jnp.tanh(arrived @ w)) + x]


def on_two_devices(function, *arguments):
    mesh = build_mesh(pipe=1, data=1, expert_factors=(1, 1, 2), devices=jax.devices()[:2])
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=True)
    return jax.make_jaxpr(mapped)(*arguments), jax.jit(mapped)(*arguments)


@pytest.fixture
def arguments():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(4, D)), jnp.float32), jnp.asarray(
        rng.normal(size=(2 * D, D)), jnp.float32
    )


def names(equations) -> list[str]:
    wanted = ("all_to_all", "dot_general", "optimization_barrier")
    return [e.primitive.name for e in equations if e.primitive.name in wanted]


def test_parts_are_computations_and_exchanges_in_turn(arguments):
    found = []

    def run(x, w):
        found.extend(map(names, parts(trace(layer, x, w))))
        return x

    on_two_devices(run, *arguments)
    assert found == [["dot_general"], ["all_to_all"], ["dot_general"], ["all_to_all"], []]


def test_elementwise_work_waits_for_what_reads_it_and_products_do_not(arguments):
    def run_again(x, w):
        hidden = x @ w
        arrived = exchanged(x)
        return [arrived * (jnp.tanh(hidden) + jnp.cos(x)) @ w]

    found = []

    def run(x, w):
        found.extend([e.primitive.name for e in part] for part in parts(trace(run_again, x, w)))
        return x

    on_two_devices(run, *arguments)
    before, exchange, after = found
    assert "dot_general" in before and not {"tanh", "cos"} & set(before)
    assert exchange == ["all_to_all"]
    assert {"tanh", "cos", "dot_general"} <= set(after)


def test_exchanges_without_products_between_them_are_one_part(arguments):
    found = []

    def run(x, w):
        found.extend(map(names, parts(trace(lambda x, w: [exchanged(2.0 * exchanged(x @ w)) @ w], x, w))))
        return x

    on_two_devices(run, *arguments)
    assert found == [["dot_general"], ["all_to_all", "all_to_all"], ["dot_general"]]


def test_a_program_without_exchanges_is_one_part(arguments):
    assert len(parts(trace(lambda x: [jnp.sin(x) @ x], jnp.ones((3, 3))))) == 1


def both(x, w):
    program = trace(layer, x, w)
    calls = [
        Call(program, (values, w), 0, lambda outputs: outputs[0], name)
        for values, name in ((x, "a"), (-x, "b"))
    ]
    return jnp.concatenate(interleave(*calls))


def test_both_have_the_results_they_have_alone(arguments):
    def alone(x, w):
        return jnp.concatenate([layer(x, w)[0], layer(-x, w)[0]])

    _, expected = on_two_devices(alone, *arguments)
    _, found = on_two_devices(both, *arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_barrier_parts_every_exchange_of_one_with_a_product_of_the_other_from_the_rest(arguments):
    traced, _ = on_two_devices(both, *arguments)
    (inside,) = (e.params["jaxpr"] for e in traced.eqns if e.primitive.name == "shard_map")
    steps = " ".join(names(inside.eqns)).split(" optimization_barrier ")
    # The first's products; exchanges of the first beside products of the second, and in turn; the second's last.
    assert [sorted(step.split()) for step in steps] == [
        ["dot_general"],
        ["all_to_all", "dot_general"],
        ["all_to_all", "dot_general"],
        ["all_to_all", "dot_general"],
        ["all_to_all"],
    ]
    scopes = [str(e.source_info.name_stack) for e in inside.eqns if e.primitive.name == "all_to_all"]
    assert scopes == ["a", "b", "a", "b"]


def test_one_without_exchanges_runs_beside_the_other(arguments):
    def run(x, w):
        quiet = trace(lambda x, w: [x @ w], x, w)
        first = Call(trace(layer, x, w), (x, w), 0, partial(jnp.concatenate, axis=0))
        second = Call(quiet, (x, w), 0, lambda outputs: outputs[0])
        return jnp.concatenate(interleave(first, second))

    def alone(x, w):
        return jnp.concatenate([layer(x, w)[0], x @ w])

    np.testing.assert_allclose(
        on_two_devices(run, *arguments)[1], on_two_devices(alone, *arguments)[1], rtol=1e-6
    )
