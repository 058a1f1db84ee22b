"""Tied values are what they were, and what made them is not run before what they are tied to."""

import re

import jax
import jax.numpy as jnp
import pytest

from piperjax.runtime.ties import tied


@pytest.mark.parametrize("other", [0.0, -0.0, 1.5, jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_stay_what_they_are(other, dtype):
    tree = {"index": jnp.int32(-3), "rows": jnp.array([1.0, -2.0, jnp.nan], dtype)}
    found = jax.jit(lambda tree, other: tied(tree, to=[other]))(tree, jnp.full((2, 2), other, dtype))
    assert found["index"] == -3
    assert found["rows"].dtype == dtype
    assert jnp.array_equal(found["rows"], tree["rows"], equal_nan=True)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_loop_keeps_what_is_tied_to_what_it_changes(is_tied):
    def repeated(x, weights, turns):
        def turn(_, x):
            of_this_turn = tied(weights, to=[x]) if is_tied else weights
            return x + jnp.tanh(of_this_turn @ weights)

        return jax.lax.fori_loop(0, turns, turn, x)

    weights = jnp.ones((8, 8))
    text = jax.jit(repeated).lower(weights, weights, 3).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    # The product alone is the same in every turn: without a tie it is made once, before the loop.
    assert bool(re.search(r"\bdot|ynn|custom-call", entry)) == (not is_tied)
