"""Rows to all devices of an axis and sums back: each is the transpose of the other."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.runtime.all_to_all import axes_size
from piperjax.runtime.message import Part, Rows, carried, pack, unpack


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def fan_out(rows: Rows, axes: tuple[str, ...]) -> Rows:
    """Per device: the rows [M, ...] of all n devices along the axes, [n M, ...], by one all_gather."""
    return _out(rows, axes)


def _out(rows: Rows, axes: tuple[str, ...]) -> Rows:
    return Rows(*carried(partial(_gathered, axes=axes), rows)) if axes else rows


def _gathered(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.all_gather(x, axes, tiled=True) if axes else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def fan_in(y: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Per device: sums what the n devices have for its M rows, [n M, ...] -> [M, ...].

    Adds in at least float32 what travels in the dtype of y, once and directly: a reduce_scatter would round sums to
    that dtype at every hop, and in an order of its own.
    """
    return _in((y,), axes)[0]


def _in(arrays: Sequence[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
    """`fan_in` of arrays that travel in one message."""
    if not axes:
        return list(arrays)
    kinds = [Part.of(array) for array in arrays]
    # Nothing is cast that is alone in its message.
    alone = len(arrays) == 1
    received = lax.all_to_all(arrays[0] if alone else pack(arrays), axes, 0, 0, tiled=True)
    parts = jnp.split(received, axes_size(axes))
    sent = [[part] if alone else unpack(part, kinds) for part in parts]
    return [_sum(terms) for terms in zip(*sent, strict=True)]


def _sum(terms: Sequence[jax.Array]) -> jax.Array:
    wide = jnp.promote_types(terms[0].dtype, jnp.float32)
    return sum(term.astype(wide) for term in terms).astype(terms[0].dtype)


def _fan_out_backward(axes, _, gradient):
    # The transpose of an all_gather is a reduce_scatter, for which the reservations of `fan_in` hold.
    dx, _, dgates = gradient
    dx, dgates = _in((dx, dgates), axes)
    return (Rows(dx, None, dgates),)


fan_out.defvjp(lambda rows, axes: (_out(rows, axes), None), _fan_out_backward)
fan_in.defvjp(lambda y, axes: (_in((y,), axes)[0], None), lambda axes, _, dx: (_gathered(dx, axes),))
