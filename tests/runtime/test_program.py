"""Cutting a traced function: the parts compute the whole, and keep as little as they can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piperjax.runtime.program import is_variable, trace


@jax.jit
def inner(a):
    return jnp.tanh(a)


def function(w, x, c):
    hidden = inner(x @ w)
    mask = jnp.broadcast_to((c > 0)[:, None], hidden.shape)
    return [hidden.sum(), jnp.where(mask, hidden, 0.0).astype(jnp.float32), x]


ARGUMENTS = (jnp.ones((3, 4)), jnp.arange(6.0).reshape(2, 3), jnp.array([1.0, -1.0]))


def test_calls_are_gone_and_the_result_is_the_same():
    program = trace(function, *ARGUMENTS)
    assert not any(e.primitive.name in ("jit", "pjit") for e in program.equations)
    for found, expected in zip(program(*ARGUMENTS), function(*ARGUMENTS), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_parts_compute_the_whole():
    program = trace(function, *ARGUMENTS)
    middle = next(e.outvars[0] for e in program.equations if e.primitive.name == "tanh")
    first = program.cut(program.inputs, [middle])
    second = program.cut([middle, *program.inputs[1:]], program.outputs)
    assert not any(e.primitive.name == "dot_general" for e in second.equations)
    (value,) = first(*ARGUMENTS)
    for found, expected in zip(second(value, *ARGUMENTS[1:]), function(*ARGUMENTS), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_part_that_needs_more_than_its_inputs_is_refused():
    program = trace(function, *ARGUMENTS)
    with pytest.raises(ValueError, match="must not need more than its inputs"):
        program.cut(program.inputs[:1], program.outputs)


def test_what_is_kept_is_neither_free_nor_a_new_shape_of_something():
    def spread(x, c):
        wide = jnp.broadcast_to(x[:, None].astype(jnp.float32), (2, 5, 3))
        return [wide, jnp.sin(c), x * x]

    arguments = (jnp.ones((2, 3), jnp.bfloat16), jnp.ones(7))
    program = trace(spread, *arguments)
    x, c = program.inputs
    kept = program.to_keep(program.outputs, free=[c])
    # The broadcast follows from x, the sine from what is free; only the square is something new.
    assert set(kept) == {x, program.outputs[2]}
    assert all(map(is_variable, kept))
    restored = program.cut((*kept, c), program.outputs)
    for found, expected in zip(restored(*program.cut((x,), kept)(arguments[0]), arguments[1]),
                               spread(*arguments), strict=True):  # fmt: skip
        np.testing.assert_array_equal(found, expected)
