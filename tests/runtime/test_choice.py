"""One of two ways by a number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piperjax.runtime.choice import choose


def tree():
    return {"a": jnp.arange(3.0), "b": (jnp.ones((2, 2)), jnp.int32(5))}


def doubled(values):
    return jax.tree.map(lambda leaf: 2 * leaf, values)


def kept(values):
    return values


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
@pytest.mark.parametrize("number", [0, 1])
def test_either_way_has_its_result_at_its_place(number, turn):
    found = jax.jit(lambda at, values: choose(at, kept, doubled, values, turn=turn))(number, tree())
    jax.tree.map(np.testing.assert_array_equal, found, doubled(tree()) if number else tree())


def test_ways_need_no_operands():
    found = jax.jit(lambda at: choose(at, lambda: jnp.zeros(2), lambda: jnp.ones(2)))(1)
    np.testing.assert_array_equal(found, [1, 1])


def idle_branches(turns):
    def run(at, values):
        for turn in turns:
            values = choose(at, kept, doubled, values, turn=turn)
        return values

    equations = jax.make_jaxpr(run)(0, tree()).jaxpr.eqns
    return [str(one.params["branches"][0]) for one in equations if one.primitive.name == "cond"]


def test_turns_tell_idle_ways_of_the_same_operands_apart():
    assert len(set(idle_branches((0, 0)))) == 1
    assert len(set(idle_branches((0, 1, 2)))) == 3


def test_a_loop_over_choices_copies_nothing():
    size = 1 << 16

    def tick(values, at):
        values = choose(at, kept, lambda given: given.at[at].set(at * 1.0), values)
        return choose(1 - at, kept, lambda given: given.at[at].add(2.0), values, turn=1), None

    compiled = jax.jit(lambda values, ats: jax.lax.scan(tick, values, ats)[0], donate_argnums=0).lower(
        jnp.zeros(size), jnp.asarray([0, 1, 1], jnp.int32)
    )
    assert compiled.compile().memory_analysis().temp_size_in_bytes < 4 * size
