"""This file is the elementwise work of a layer, each kind by itself: what its rates are measured with.

A kind is in `meshes.device.ELEMENTWISE`, and counts as many arrays as `planner.work` does. Per device; functions are
those that layers and dispatchers call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models.layers import Rotation, activate, rms_norm, rotary
from piperjax.runtime.permute import Places, spread_rows

# Features of a row, and of a head.
WIDTH, HEAD_DIM = 256, 64
# Copies of a token.
COPIES = 2
ITEM_BYTES = 4
# A prime that no number of rows is a multiple of: rows are taken from all over an array.
STRIDE = 7919


class Elementwise(NamedTuple):
    """One kind of work.

    Attributes:
      run: the function.
      operands: what it takes: "rows" [rows, WIDTH], "pairs" [rows, 2 WIDTH], "halves" [rows, HEAD_DIM / 2], a "scale"
        [WIDTH], float32 all, or "zero", an int32 [1].
      num_arrays: [rows, WIDTH] that count as read or written.
    """

    run: Callable[..., Any]
    operands: tuple[str, ...]
    num_arrays: int


def elementwise_operands(body: Elementwise, num_bytes: int) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and types of the operands, where an array [rows, WIDTH] has `num_bytes`."""
    rows = max(COPIES, num_bytes // (ITEM_BYTES * WIDTH))
    shapes = {
        "rows": ((rows, WIDTH), "float32"),
        "pairs": ((rows, 2 * WIDTH), "float32"),
        "halves": ((rows, HEAD_DIM // 2), "float32"),
        "scale": ((WIDTH,), "float32"),
        "zero": ((1,), "int32"),
    }
    return [shapes[name] for name in body.operands]


def _norm(zero, x, y, scale):
    x = x + (y + zero[0])  # not (x + y) + zero: what is the same in every round is computed once
    return x, rms_norm(x, scale, 1e-5)


def _norm_gradient(x, dx, dy, scale):
    more, dscale = jax.vjp(lambda x, scale: rms_norm(x, scale, 1e-5), x, scale)[1](dy)
    return dx + more, dscale


def _rotary(x, cos, sin):
    rows = x.shape[0]
    turn = Rotation(*(half.reshape(1, rows, 1, HEAD_DIM // 2) for half in (cos, sin)))
    return rotary(x.reshape(1, rows, WIDTH // HEAD_DIM, HEAD_DIM), turn).reshape(x.shape)


def _rotary_gradient(dy, cos, sin):
    return jax.vjp(lambda x: _rotary(x, cos, sin), jnp.zeros_like(dy))[1](dy)


def _activation(hidden):
    return activate(hidden, 3)


def _activation_gradient(hidden, dy):
    return jax.vjp(lambda hidden: activate(hidden, 3), hidden)[1](dy)


def _rows(zero, x):
    copies = (zero + lax.iota(jnp.int32, len(x)) * STRIDE) % len(x)
    places = copies.reshape(-1, COPIES)
    return spread_rows(x[: len(x) // COPIES], Places(copies, None, places, None))


def _rows_gradient(zero, dy):
    copies = (zero + lax.iota(jnp.int32, len(dy)) * STRIDE) % len(dy)
    places = copies.reshape(-1, COPIES)
    tokens = dy[: len(dy) // COPIES]  # What they are does not matter to the gradient.
    return jax.vjp(lambda x: spread_rows(x, Places(copies, None, places, None)), tokens)[1](dy)


def _layout(x):
    return x.T.reshape(-1)


BODIES = {
    "norm": Elementwise(_norm, ("zero", "rows", "rows", "scale"), 4),
    "norm_gradient": Elementwise(_norm_gradient, ("rows", "rows", "rows", "scale"), 4),
    "rotary": Elementwise(_rotary, ("rows", "halves", "halves"), 2),
    "rotary_gradient": Elementwise(_rotary_gradient, ("rows", "halves", "halves"), 2),
    "activation": Elementwise(_activation, ("pairs",), 3),
    "activation_gradient": Elementwise(_activation_gradient, ("pairs", "rows"), 6),
    "rows": Elementwise(_rows, ("zero", "rows"), 2),
    "rows_gradient": Elementwise(_rows_gradient, ("zero", "rows"), 2),
    "layout": Elementwise(_layout, ("rows",), 2),
}
