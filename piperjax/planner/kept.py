"""This file is what one layer keeps between its passes, in bytes, for each memory mode.

The closed form of what `runtime/passes.py` finds by tracing; a test compares the two. Letters are those of the README,
and R is the rows of a device's dispatch buffer, dead places included. Latent attention is not yet a layer: it is
counted as the same passes would keep it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from models.config import DenseFFN, GroupedQueryAttention, LatentAttention, LayerConfig, MoEFFN
from models.query_blocks import query_block
from piperjax.planner.storage import itemsize_of, wide_itemsize

INDEX = 4  # Bytes of an int32.


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one device works on in one pass of one layer.

    Attributes:
      sequences: B, sequences of a microbatch on this device.
      seq_len: S.
      expert: P, devices that share the experts of a layer.
      capacity_factor: rows that a device accepts from another, over the balanced number; 0 is dropless.
      dtype: of the computation.
    """

    sequences: int
    seq_len: int
    expert: int = 1
    capacity_factor: float = 0.0
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.seq_len

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the computation."""
        return itemsize_of(self.dtype)

    @property
    def wide(self) -> int:
        """Bytes of an element of norms, softmax and routers."""
        return wide_itemsize(self.dtype)

    def rows(self, ffn: MoEFFN) -> int:
        """R of the flat dispatcher: P C with C = T min(k, E / P), or as many as the capacity allows."""
        capacity = self.tokens * min(ffn.experts_per_token, ffn.num_experts // self.expert)
        if self.capacity_factor:
            balanced = self.tokens * ffn.experts_per_token / self.expert
            capacity = min(capacity, math.ceil(self.capacity_factor * balanced))
        return self.expert * capacity

    def drops(self, ffn: MoEFFN) -> bool:
        """Whether the capacity can be too small."""
        return self.rows(ffn) < self.expert * self.tokens * min(
            ffn.experts_per_token, ffn.num_experts // self.expert
        )


class AttentionWidths(NamedTuple):
    """Elements per token inside attention.

    Attributes:
      query, key, value: of all heads, as the products of attention read them.
      output: what enters the output projection.
      projected: results of the projections before it.
      latents: compressed queries, keys and values, which are normed and projected again.
    """

    query: int
    key: int
    value: int
    output: int
    projected: int
    latents: int = 0


def attention_widths(attention: GroupedQueryAttention | LatentAttention) -> AttentionWidths:
    """Counts elements per token inside attention."""
    N = attention.num_heads
    if isinstance(attention, GroupedQueryAttention):
        query, key = N * attention.head_dim, attention.num_kv_heads * attention.head_dim
        return AttentionWidths(query, key, key, query, query + 2 * key)
    key, value = N * (attention.nope_dim + attention.rope_dim), N * attention.v_dim
    latents = attention.q_rank + attention.kv_rank
    projected = key + latents + attention.rope_dim + N * (attention.nope_dim + attention.v_dim)
    return AttentionWidths(key, key, value, value, projected, latents)


def kept_bytes(d_model: int, layer: LayerConfig, share: Share, memory_mode: str) -> int:
    """Bytes that one layer keeps of one microbatch; under memory mode "stage", one stage."""
    x = share.tokens * d_model * share.itemsize
    if memory_mode in ("stage", "layer"):
        return x
    if memory_mode == "named":
        return x + (_named(d_model, layer.ffn, share) if isinstance(layer.ffn, MoEFFN) else 0)
    return x + (_products if memory_mode == "products" else _stash)(d_model, layer, share)


def _named(D: int, ffn: MoEFFN, share: Share) -> int:
    """Rows as experts receive and return them, and how many came from each device for each expert."""
    counts = INDEX * ffn.num_experts if share.expert > 1 else 0
    return 2 * share.rows(ffn) * D * share.itemsize + counts


def _products(D: int, layer: LayerConfig, share: Share) -> int:
    """Results of projections, of the router and of expert products; indices of sorted rows; what travelled."""
    T, w, ffn = share.tokens, share.itemsize, layer.ffn
    attention = T * w * (attention_widths(layer.attention).projected + D)
    if isinstance(ffn, DenseFFN):
        return attention + T * w * (ffn.num_matrices - 1) * ffn.d_ff
    first, k, E = ffn.num_matrices - 1, ffn.experts_per_token, ffn.num_experts
    router = (
        T * E * share.wide + 2 * T * k * INDEX + (E * share.wide if ffn.router.balance == "aux_loss" else 0)
    )
    if share.expert > 1:
        router += E * INDEX + (T * k * INDEX if share.drops(ffn) else 0)
    rows = share.rows(ffn) * w * ((2 if share.expert > 1 else 1) * D + first * ffn.d_ff)
    beside = first * (ffn.shared_d_ff + ffn.dense_residual_d_ff)
    if ffn.shared_gate == "sigmoid":
        beside += D + 1
    return attention + router + rows + T * w * beside


def _stash(D: int, layer: LayerConfig, share: Share) -> int:
    """Every intermediate result that plain autodiff needs, the layer's input not counted."""
    T, w, W, ffn = share.tokens, share.itemsize, share.wide, layer.ffn
    norms = T * (4 * D * W + 4 * W + 3 * D * w)
    attention = _attention_stash(layer.attention, share)
    if isinstance(ffn, DenseFFN):
        return norms + attention + 6 * T * w * ffn.d_ff
    beside = T * w * 6 * (ffn.shared_d_ff + ffn.dense_residual_d_ff)
    if ffn.shared_gate == "sigmoid":
        beside += T * w * (D + 2)
    if ffn.dense_residual_d_ff:
        beside += T * (2 * D * W + 2 * W + D * w)
    R, k = share.rows(ffn), ffn.experts_per_token
    indices = 15 * R if share.expert > 1 else INDEX * R
    rows = R * w * (D + 6 * ffn.d_ff) + indices + INDEX * ffn.num_experts // share.expert
    returned = T * k * (D * w + INDEX + share.drops(ffn))
    return norms + attention + beside + rows + returned + _router_stash(ffn, share)


def _attention_stash(attention: GroupedQueryAttention | LatentAttention, share: Share) -> int:
    T, S, w, W, N = share.tokens, share.seq_len, share.itemsize, share.wide, attention.num_heads
    widths = attention_widths(attention)
    # Weights of the softmax before and after they are rounded, which is the same without rounding.
    in_blocks = query_block(S) < S
    scores = 0 if in_blocks else T * S * N * (W + (w if w != W else 0))
    heads = T * w * (widths.query + widths.key + widths.value + widths.output)
    # In blocks the logarithm of the normaliser is kept, else it, the largest logit and the sum before division.
    sums = T * W * N if in_blocks else T * W * (widths.output + 2 * N)
    normed = widths.latents
    extra = 4 if normed else 0
    if isinstance(attention, GroupedQueryAttention) and attention.qk_norm != "none":
        normed = widths.query + widths.key
        extra = 4 if attention.qk_norm == "full" else 2 * (N + attention.num_kv_heads)
    return scores + heads + sums + T * (normed * (2 * W + w) + extra * W)


def _router_stash(ffn: MoEFFN, share: Share) -> int:
    """Scores, chosen ones and what the losses need: small beside the rows unless experts are many."""
    T, W, E, k, router = share.tokens, share.wide, ffn.num_experts, ffn.experts_per_token, ffn.router
    is_softmax = router.score == "softmax"
    per_token = E + 2 * is_softmax + k + (2 + k if router.gates == "normalized" else 0)
    bits = k * E
    if router.balance == "aux_loss":
        per_token += 2 * E + 2 + 2 * is_softmax
    if router.z_loss_coefficient:
        per_token, bits = per_token + E + 2, bits + 1
    return T * (per_token * W + bits) + (E * W if router.balance == "aux_loss" else 0)


def tap_bytes(d_model: int, layer: LayerConfig, share: Share, memory_mode: str) -> int:
    """Bytes that the input gradient of a layer leaves for its weight gradient, per microbatch.

    Of every product y = a w the pair (a, dL/dy); instead of a, what it is cheaply made from, if that is not larger.
    """
    D, T, w, ffn = d_model, share.tokens, share.itemsize, layer.ffn
    by_products = memory_mode == "products"
    widths = attention_widths(layer.attention)
    attention = T * w * (widths.projected + widths.latents + widths.output + 2 * D)
    # Where sums in float32 are kept, they serve instead of what is rounded from them.
    widened = T * (share.wide - w) * D if by_products else 0
    if by_products:
        attention += widened
        if query_block(share.seq_len) == share.seq_len:
            attention += T * (share.wide - w) * widths.output + T * share.wide * layer.attention.num_heads
    hidden = 1 if memory_mode == "stash" else 2
    if isinstance(ffn, DenseFFN):
        return attention + widened + T * w * _ffn_taps(D, ffn.d_ff, ffn.num_matrices, hidden)
    first, R = ffn.num_matrices - 1, share.rows(ffn)
    inputs = T if by_products and share.expert == 1 else R
    counts = INDEX * ffn.num_experts // share.expert + (INDEX * R if by_products else 0)
    rows = w * (
        R * ((2 if memory_mode in ("named", "products") else 1) + first) * ffn.d_ff + (R + inputs) * D
    )
    beside = 0
    if ffn.shared_d_ff:
        gated = ffn.shared_gate == "sigmoid" and not by_products
        beside += T * w * _ffn_taps(D, ffn.shared_d_ff, ffn.num_matrices, 1 if gated else hidden)
        if by_products and share.expert == 1:
            beside -= T * w * D  # The experts' rows are made from the same input.
    if ffn.dense_residual_d_ff:
        beside += widened + T * w * _ffn_taps(D, ffn.dense_residual_d_ff, ffn.num_matrices, hidden)
    return attention + rows + counts + beside


def _ffn_taps(d_model: int, d_ff: int, num_matrices: int, hidden: int) -> int:
    """Elements per token: input, output gradient, gradient of the first product, factors of the hidden row."""
    return 2 * d_model + (num_matrices - 1 + hidden) * d_ff
