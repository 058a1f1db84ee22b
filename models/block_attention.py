"""This file is attention of long sequences: a block of queries at a time, so that S^2 weights never exist at once.

As in flash attention (Dao et al., arXiv:2205.14135), forward keeps the logarithm of each row's normaliser, and
backward makes the weights again from it. Here every block sees all keys, so the kernel is three plain products and
works on every backend. What forward keeps has a name, for memory modes that keep little: with it backward does not run
forward again.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from models.layers import at_least_float32

# The result and the logarithms of the normalisers, which are all that backward needs of forward.
ATTENDED = "attended"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_in_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, block: int
) -> jax.Array:
    """Causal attention within documents, `block` queries at a time; the function of `attention.attend`.

    `query` is [B, S, N, H], `key` and `value` [B, S, K, H], `segment_ids` [B, S]; `block` divides S. Works with
    [B, N, block, S] weights at once, forward and backward, and keeps [B, S, N, H] and [B, N, S]. Returns [B, S, N, H].
    """
    return _forward(query, key, value, segment_ids, block)[0]


def _forward(query, key, value, segment_ids, block: int):
    heads = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)

    def one(operands):
        rows, number, segments = operands
        logits = _logits(rows, heads[0], segments, segment_ids, number * block)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        normaliser = jnp.sum(weights, axis=-1, keepdims=True)
        y = _product("bkrt,bkth->bkrh", weights.astype(value.dtype), heads[1]) / normaliser
        return y.astype(query.dtype), (largest + jnp.log(normaliser))[..., 0]

    y, log_normaliser = lax.map(one, _blocks(query, key.shape[2], segment_ids, block))
    y, log_normaliser = (checkpoint_name(a, ATTENDED) for a in (_joined(y, query.shape), log_normaliser))
    return y, (query, key, value, segment_ids, y, log_normaliser)


def _backward(block: int, residuals, y_grad):
    query, key, value, segment_ids, y, log_normaliser = residuals
    K, wide = key.shape[2], at_least_float32(query.dtype)
    heads = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scale = 1.0 / math.sqrt(query.shape[-1])

    def one(sums, operands):
        (rows, number, segments), row_grads, rows_y, logs = operands
        logits = _logits(rows, heads[0], segments, segment_ids, number * block)
        weights = jnp.exp(logits - logs[..., None])
        narrow = weights.astype(value.dtype)
        value_grad = sums[1] + _product("bkrt,bkrh->bkth", narrow, row_grads)
        # The gradient through the normaliser is the same for a whole row: sum of y times its gradient.
        own = jnp.sum(row_grads.astype(wide) * rows_y.astype(wide), axis=-1, keepdims=True)
        weight_grads = _product("bkrh,bkth->bkrt", row_grads, heads[1]) - own
        logit_grads = (weights * weight_grads * scale).astype(query.dtype)
        key_grad = sums[0] + _product("bkrt,bkrh->bkth", logit_grads, rows)
        query_grad = _product("bkrt,bkth->bkrh", logit_grads, heads[0]).astype(query.dtype)
        return (key_grad, value_grad), query_grad

    start = tuple(jnp.zeros_like(h, dtype=wide) for h in heads)
    operands = (
        _blocks(query, K, segment_ids, block),
        _rows(y_grad, K, block),
        _rows(y, K, block),
        log_normaliser,
    )
    (key_grad, value_grad), query_grad = lax.scan(one, start, operands)
    restored = (g.transpose(0, 2, 1, 3).astype(h.dtype) for g, h in ((key_grad, key), (value_grad, value)))
    return _joined(query_grad, query.shape), *restored, None


attend_in_blocks.defvjp(_forward, _backward)


def _logits(rows, key, segments, all_segments, first):
    """Scaled and masked logits [B, K, rows, S] of one block that begins at position `first`."""
    B, K, R, H = rows.shape
    block, S = segments.shape[1], all_segments.shape[1]
    logits = _product("bkrh,bkth->bkrt", rows, key) * (1.0 / math.sqrt(H))
    position = first + lax.iota(jnp.int32, block)
    seen = segments[:, :, None] == all_segments[:, None, :]
    seen &= position[None, :, None] >= lax.iota(jnp.int32, S)[None, None, :]
    logits = logits.reshape(B, K, R // block, block, S)
    hidden = 0.5 * float(jnp.finfo(logits.dtype).min)
    return jnp.where(seen[:, None, None], logits, hidden).reshape(B, K, R, S)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in the operands' precision, summed in at least float32."""
    preset = lax.DotAlgorithmPreset.BF16_BF16_F32 if a.dtype == jnp.bfloat16 else None
    return jnp.einsum(subscripts, a, b, precision=preset, preferred_element_type=at_least_float32(a.dtype))


def _blocks(query, K: int, segment_ids, block: int):
    """What each block works on, stacked: rows [blocks, B, K, N/K block, H], its number, its segments."""
    B, S = segment_ids.shape
    number = lax.iota(jnp.int32, S // block)
    segments = segment_ids.reshape(B, S // block, block).transpose(1, 0, 2)
    return _rows(query, K, block), number, segments


def _rows(x, K: int, block: int):
    """[B, S, N, H] to [blocks, B, K, N/K block, H]: the queries of one key-value head are rows of one matrix."""
    B, S, N, H = x.shape
    x = x.reshape(B, S // block, block, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(S // block, B, K, N // K * block, H)


def _joined(blocks, shape: tuple[int, ...]):
    """The inverse of `_rows`."""
    number, B, K, rows, H = blocks.shape
    block = shape[1] // number
    x = blocks.reshape(number, B, K, rows // block, block, H).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(shape)
