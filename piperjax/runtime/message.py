"""Rows that travel with the ids and gates of their experts, in one message: as many bytes, but one collective.

A message is a matrix of unsigned whole numbers as wide as an element of the rows. What is put there is a cast of bits,
so nothing is rounded, and nothing that looks like a NaN is touched on the way.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.runtime.journey import Journey

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


class Rows(NamedTuple):
    """Per device: M rows on their way.

    Attributes:
      x: [M, D].
      expert_ids: [M, k]; E for none.
      gates: [M, k].
    """

    x: jax.Array
    expert_ids: jax.Array
    gates: jax.Array


class Part(NamedTuple):
    """What a message has of one array: elements of a row, and their type."""

    width: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, array: jax.Array) -> "Part":
        """That of an array [M, width]."""
        return cls(array.shape[1], array.dtype)


def pack(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays [M, ...] side by side, [M, W], in words as wide as an element of the first; parts end with a word."""
    size = arrays[0].dtype.itemsize
    return jnp.concatenate([_to_words(array, size) for array in arrays], axis=1)


def unpack(message: jax.Array, parts: Sequence[Part]) -> list[jax.Array]:
    """The arrays of a message."""
    size, start, arrays = message.dtype.itemsize, 0, []
    for part in parts:
        width = words_of(part.width, part.dtype.itemsize, size)
        arrays.append(_from_words(lax.slice_in_dim(message, start, start + width, axis=1), part))
        start += width
    return arrays


def words_of(width: int, itemsize: int, word_bytes: int) -> int:
    """Words that so many elements take."""
    return -(-width * itemsize // word_bytes)


def _to_words(array: jax.Array, size: int) -> jax.Array:
    (M, width), itemsize = array.shape, array.dtype.itemsize
    if itemsize < size:
        each = size // itemsize
        array = jnp.pad(array, ((0, 0), (0, -width % each))).reshape(M, -1, each)
    return lax.bitcast_convert_type(array, _WORDS[size]).reshape(M, -1)


def _from_words(words: jax.Array, part: Part) -> jax.Array:
    M, each = words.shape[0], part.dtype.itemsize // words.dtype.itemsize
    if each > 1:
        words = words.reshape(M, -1, each)
    return lax.bitcast_convert_type(words, part.dtype).reshape(M, -1)[:, : part.width]


def carried(move: Callable[[jax.Array], jax.Array], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Moves arrays [M, ...] by one collective, `move` of a message [M, W] -> [M', W]."""
    return unpack(move(pack(arrays)), [Part.of(array) for array in arrays])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def exchange(rows: Rows, journey: Journey) -> Rows:
    """Per device: rows [n C, ...] by a journey, its own transpose: gradients of rows and gates travel together, too."""
    return _exchanged(rows, journey)


def _exchanged(rows: Rows, journey: Journey) -> Rows:
    return Rows(*carried(journey.exchanged, rows)) if journey.axes else rows


def _exchange_backward(journey, _, gradient):
    dx, _, dgates = gradient
    if journey.axes:
        dx, dgates = carried(journey.exchanged, (dx, dgates))
    return (Rows(dx, None, dgates),)


exchange.defvjp(lambda rows, journey: (_exchanged(rows, journey), None), _exchange_backward)
