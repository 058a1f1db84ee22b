"""Slots: the same values as NumPy indexing, one dynamic slice each."""

import jax
import jax.numpy as jnp
import numpy as np

from piperjax.runtime import slots


def test_read_write_add_are_indexing():
    buffer = jnp.arange(24.0).reshape(2, 3, 4)
    i, j = jnp.int32(1), jnp.int32(2)
    value = jnp.array([5.0, 6.0, 7.0, 8.0])
    np.testing.assert_array_equal(slots.read(buffer, i, j), buffer[1, 2])
    np.testing.assert_array_equal(slots.read(buffer, i), buffer[1])
    np.testing.assert_array_equal(slots.write(buffer, value, i, j), buffer.at[1, 2].set(value))
    np.testing.assert_array_equal(slots.add(buffer, value, i, j), buffer.at[1, 2].add(value))
    assert slots.read(jnp.arange(5), jnp.int32(3)) == 3


def test_nothing_is_gathered_or_scattered():
    text = jax.jit(slots.add).lower(jnp.zeros((3, 4)), jnp.zeros(4), jnp.int32(1)).as_text()
    assert "gather" not in text
    assert "scatter" not in text
    assert "compare" not in text, "an index within bounds needs no check"


def test_the_slices_of_a_sum_begin_at_one_value_that_is_there_before():
    # XLA for GPUs then makes the sum in place, whatever an index follows from.
    def run(buffer, value, table):
        return slots.add(buffer, value, np.int32(0), slots.read(table, jnp.int32(1)))

    arguments = jnp.zeros((1, 3, 4)), jnp.ones(4), jnp.arange(2)
    text = jax.jit(run).lower(*arguments).as_text()
    assert text.count("optimization_barrier") == 1
    np.testing.assert_array_equal(jax.jit(run)(*arguments)[0], [[0] * 4, [1] * 4, [0] * 4])
