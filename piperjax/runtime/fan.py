"""Rows to all devices of an axis and sums back: each is the transpose of the other."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.runtime.all_to_all import axes_size


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def fan_out(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Per device: the rows [M, ...] of all n devices along the axes, [n M, ...]."""
    return fan_out_whole_numbers(x, axes)


def fan_out_whole_numbers(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`fan_out` of what has no gradient, and without one of its own, so that memory modes can see what it does."""
    return lax.all_gather(x, axes, tiled=True) if axes else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def fan_in(y: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Per device: sums what the n devices have for its M rows, [n M, ...] -> [M, ...].

    Adds in at least float32 what travels in the dtype of y, once and directly: a reduce_scatter would round sums to
    that dtype at every hop, and in an order of its own.
    """
    return _in(y, axes)


def _in(y: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    if not axes:
        return y
    parts = lax.all_to_all(y, axes, 0, 0, tiled=True)
    parts = parts.reshape(axes_size(axes), -1, *y.shape[1:])
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return sum(part.astype(wide) for part in parts).astype(y.dtype)


# The transpose of an all_gather is a reduce_scatter, for which the reservations above hold.
fan_out.defvjp(lambda x, axes: (fan_out_whole_numbers(x, axes), None), lambda axes, _, dy: (_in(dy, axes),))
fan_in.defvjp(lambda y, axes: (_in(y, axes), None), lambda axes, _, dx: (fan_out_whole_numbers(dx, axes),))
