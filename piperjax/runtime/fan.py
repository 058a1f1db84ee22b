"""Rows to all devices of a journey and sums back: each is the transpose of the other."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from piperjax.runtime.journey import Journey
from piperjax.runtime.message import Part, Rows, carried, pack, unpack


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def fan_out(rows: Rows, journey: Journey) -> Rows:
    """Per device: the rows [M, ...] of all n devices of the journey, [n M, ...], by one all_gather if it is direct."""
    return _out(rows, journey)


def _out(rows: Rows, journey: Journey) -> Rows:
    return Rows(*carried(journey.gathered, rows)) if journey.axes else rows


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def fan_in(y: jax.Array, journey: Journey) -> jax.Array:
    """Per device: sums what the n devices have for its M rows, [n M, ...] -> [M, ...].

    Adds in at least float32 what travels in the dtype of y, once and directly: a reduce_scatter would round sums to
    that dtype at every hop, and in an order of its own.
    """
    return _in((y,), journey)[0]


def _in(arrays: Sequence[jax.Array], journey: Journey) -> list[jax.Array]:
    """`fan_in` of arrays that travel in one message."""
    if not journey.axes:
        return list(arrays)
    kinds = [Part.of(array) for array in arrays]
    # Nothing is cast that is alone in its message.
    alone = len(arrays) == 1
    received = journey.exchanged(arrays[0] if alone else pack(arrays))
    parts = jnp.split(received, journey.size)
    sent = [[part] if alone else unpack(part, kinds) for part in parts]
    return [_sum(terms) for terms in zip(*sent, strict=True)]


def _sum(terms: Sequence[jax.Array]) -> jax.Array:
    wide = jnp.promote_types(terms[0].dtype, jnp.float32)
    return sum(term.astype(wide) for term in terms).astype(terms[0].dtype)


def _fan_out_backward(journey, _, gradient):
    # The transpose of an all_gather is a reduce_scatter, for which the reservations of `fan_in` hold.
    dx, _, dgates = gradient
    dx, dgates = _in((dx, dgates), journey)
    return (Rows(dx, None, dgates),)


fan_out.defvjp(lambda rows, journey: (_out(rows, journey), None), _fan_out_backward)
fan_in.defvjp(
    lambda y, journey: (_in((y,), journey)[0], None), lambda journey, _, dx: (journey.gathered(dx),)
)
