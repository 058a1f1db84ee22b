"""This file is grouped-query attention: causal, within documents, with rotary positions."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.block_attention import attend_in_blocks
from models.config import GroupedQueryAttention
from models.layers import LayerContext, at_least_float32, parameter, rms_norm, rotary
from models.query_blocks import query_block


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns softmax(query key^T / sqrt(H)) value where the mask allows, softmax in at least float32.

    `query` is [B, S, N, H], `key` and `value` [B, S, K, H], `mask` [B, S, S] (query, key) bool; each query
    must be allowed one key. Returns [B, S, N, H]. `jax.nn.dot_product_attention` with such a mask does the same
    on every backend, but takes 1.1 to 1.7 times as long on a CPU and rounds the softmax of
    float64 to float32.
    """
    B, S, N, H = query.shape
    K = key.shape[2]
    # All queries of one key-value head are the rows of one matrix: two plain batched products, and no
    # transposed copy of the S^2 weights.
    rows = query.reshape(B, S, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * S, H)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    # Reduced-precision inputs with float32 accumulation, named explicitly: only then do the two transposed
    # products of the backward pass run in the reduced precision as well.
    is_bfloat16 = query.dtype == jnp.bfloat16
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if is_bfloat16 else None
    wide = at_least_float32(query.dtype)
    logits = jnp.einsum("bkrh,bkth->bkrt", rows, key, precision=precision, preferred_element_type=wide)
    logits = logits.reshape(B, K, N // K, S, S) * (1.0 / math.sqrt(H))
    logits = jnp.where(mask[:, None, None], logits, 0.5 * float(jnp.finfo(wide).min))
    # Normalised after the product with the values, as flash attention does: S * S divisions fewer, and backward
    # needs no sum over a product of two [S, S] arrays, which XLA does slowly on CPUs.
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    normaliser = jnp.sum(weights, axis=-1).reshape(B, K, N // K * S, 1)
    weights = weights.astype(value.dtype).reshape(B, K, N // K * S, S)
    y = jnp.einsum("bkrt,bkth->bkrh", weights, value, precision=precision, preferred_element_type=wide)
    y = (y / normaliser).astype(query.dtype)
    return y.reshape(B, K, N // K, S, H).transpose(0, 3, 1, 2, 4).reshape(B, S, N, H)


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """Returns [B, S, S] bool: a query sees the keys at or before it that are of its segment ([B, S])."""
    order = jnp.arange(segment_ids.shape[1])
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same_segment & (order[None, :, None] >= order[None, None, :])


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns causal attention within documents: `attend` for short sequences, in blocks of queries for long ones.

    `query` is [B, S, N, H], `key` and `value` [B, S, K, H], `segment_ids` [B, S]. Returns [B, S, N, H].
    """
    seq_len = query.shape[1]
    block = query_block(seq_len)
    if block == seq_len:
        return attend(query, key, value, causal_mask(segment_ids))
    return attend_in_blocks(query, key, value, segment_ids, block)


class Attention(nnx.Module):
    """Projections, optional biases and norms of query and key, rotary, attention: [B, S, D] -> [B, S, D]."""

    def __init__(self, d_model: int, attention: GroupedQueryAttention, *, norm_eps: float):
        N, K, H = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.config = attention
        self.norm_eps = norm_eps
        self.query = parameter(d_model, N, H)
        self.key = parameter(d_model, K, H)
        self.value = parameter(d_model, K, H)
        self.output = parameter(N, H, d_model)
        if attention.qk_norm == "head":
            self.query_norm, self.key_norm = parameter(H), parameter(H)
        elif attention.qk_norm == "full":
            self.query_norm, self.key_norm = parameter(N * H), parameter(K * H)
        if attention.bias != "none":
            self.query_bias, self.key_bias, self.value_bias = (
                parameter(N, H),
                parameter(K, H),
                parameter(K, H),
            )
        if attention.bias == "all":
            self.output_bias = parameter(d_model)

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        query, key, value = (
            jnp.einsum("bsd,dnh->bsnh", x, weight[...]) for weight in (self.query, self.key, self.value)
        )
        if self.config.bias != "none":
            query = query + self.query_bias[...][None, None]
            key = key + self.key_bias[...][None, None]
            value = value + self.value_bias[...][None, None]
        if self.config.qk_norm != "none":
            query = self._norm(query, self.query_norm[...])
            key = self._norm(key, self.key_norm[...])
        turn = context.rotation(*self.config.rotary)
        query, key = rotary(query, turn), rotary(key, turn)
        y = causal_attention(query, key, value, context.segment_ids)
        y = jnp.einsum("bsnh,nhd->bsd", y, self.output[...])
        return y + self.output_bias[...][None, None] if self.config.bias == "all" else y

    def _norm(self, heads: jax.Array, scale: jax.Array) -> jax.Array:
        """Normalises [B, S, N, H] per head, or over all heads when the scale has their joint width."""
        B, S, N, H = heads.shape
        width = H if self.config.qk_norm == "head" else N * H
        return rms_norm(heads.reshape(B, S, -1, width), scale, self.norm_eps).reshape(B, S, N, H)
