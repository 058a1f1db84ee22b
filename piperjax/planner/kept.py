"""This file is what one layer keeps between its passes, in bytes, for each memory mode.

The closed form of what `runtime/passes.py` finds by tracing; a test compares the two. Letters are those of the README,
and R is the rows of a device's buffer for its experts, dead places included (`buffers`). Latent attention is not yet a
layer: it is counted as the same passes would keep it.
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from models.config import DenseFFN, GroupedQueryAttention, LatentAttention, LayerConfig, MoEFFN
from models.query_blocks import is_in_blocks
from piperjax.planner.buffers import Buffers, buffers
from piperjax.planner.dispatchers import named
from piperjax.planner.plan import Plan
from piperjax.planner.storage import itemsize_of, wide_itemsize

INDEX, SMALL_INDEX = 4, 2  # Bytes of an int32, and of an int16.


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one device works on in one pass of one layer.

    Attributes:
      sequences: B, sequences of a microbatch on this device.
      seq_len: S.
      expert: P, devices that share the experts of a layer.
      nodes: N, nodes that these are on.
      dispatch, dispatch_chunks: how rows reach them, as in a plan.
      capacity_factor: rows that a device accepts from another at a time, over the balanced number; 0 is dropless.
      overflow: what becomes of others, as in a plan.
      dtype: of the computation.
    """

    sequences: int
    seq_len: int
    expert: int = 1
    nodes: int = 1
    dispatch: str = "flat"
    dispatch_chunks: int = 1
    capacity_factor: float = 0.0
    overflow: str = "drop"
    dtype: str = "bfloat16"

    @classmethod
    def of(cls, plan: Plan, dtype: str) -> "Share":
        """That of a plan."""
        group, node, _ = plan.expert_factors
        return cls(
            sequences=plan.microbatch_size // (plan.data * plan.expert),
            seq_len=plan.seq_len,
            expert=plan.expert,
            nodes=group * node,
            dispatch=plan.dispatch,
            dispatch_chunks=plan.dispatch_chunks,
            capacity_factor=plan.capacity_factor,
            overflow=plan.overflow,
            dtype=dtype,
        )

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

    def buffers(self, ffn: MoEFFN) -> Buffers:
        """Rows of its buffers."""
        return buffers(
            ffn,
            self.tokens,
            expert=self.expert,
            nodes=self.nodes,
            dispatch=self.dispatch,
            chunks=self.dispatch_chunks,
            capacity_factor=self.capacity_factor,
        )

    def rows(self, ffn: MoEFFN) -> int:
        """R."""
        return self.buffers(ffn).experts

    def makes_passes(self, ffn: MoEFFN) -> bool:
        """Whether rows may travel in later passes."""
        return self.overflow == "passes" and self.buffers(ffn).may_overflow

    @property
    def deduplicates(self) -> bool:
        """Whether rows travel once per node, with the ids and gates of their experts."""
        return named(self.dispatch).deduplicates


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
    """Rows as experts receive them with their gates, and how many came from each device for each expert."""
    if share.deduplicates:
        return _arrived(D, ffn, share)
    counts = INDEX * ffn.num_experts * share.dispatch_chunks if share.expert > 1 else 0
    return share.rows(ffn) * (D * share.itemsize + share.wide) + counts


def _arrived(D: int, ffn: MoEFFN, share: Share) -> int:
    """Rows that came once per node, with the ids and gates of their experts; ids of those that a node chose from."""
    rows, k = share.buffers(ffn), ffn.experts_per_token
    ids = k * index_bytes(ffn)
    return rows.arrived * (D * share.itemsize + ids + k * share.wide) + (
        rows.of_node * ids if share.capacity_factor else 0
    )


def index_bytes(ffn: MoEFFN) -> int:
    """Bytes of the id of an expert that travels."""
    return SMALL_INDEX if ffn.num_experts < 2**15 else INDEX


def message_bytes(D: int, ffn: MoEFFN, share: Share, *, ids: bool = True) -> int:
    """Bytes of a row that travels with its gates, and the ids of its experts."""
    return share.itemsize * _message_words(D, ffn, share, ids=ids)


def _message_words(D: int, ffn: MoEFFN, share: Share, *, ids: bool = True) -> int:
    """Elements of such a message: what is beside the row is put into words as wide as its elements."""
    k, word = ffn.experts_per_token, itemsize_of(share.dtype)
    beside = [k * share.wide] + [k * index_bytes(ffn)] * ids
    return D + sum(ceil(num_bytes / word) for num_bytes in beside)


def hidden_read_where_kept(up: int, memory_mode: str) -> int:
    """Rows of experts, d_ff wide, between their matrices that are read where they were kept: these do not run again."""
    return {"products": up, "stash": up + 1}.get(memory_mode, 0)


def bytes_read_where_kept(layer: LayerConfig, share: Share, memory_mode: str) -> int:
    """Bytes that backward reads in the buffers in which they were kept, and copies no further."""
    ffn = layer.ffn
    if not isinstance(ffn, MoEFFN):
        return 0
    return (
        share.rows(ffn)
        * share.itemsize
        * hidden_read_where_kept(ffn.num_matrices - 1, memory_mode)
        * ffn.d_ff
    )


def _products(D: int, layer: LayerConfig, share: Share) -> int:
    """Results of projections, of the router and of experts' first products; indices of sorted rows; what travelled.

    Of attention in blocks also the result and the logarithms of its normalisers.
    """
    T, w, ffn, widths = share.tokens, share.itemsize, layer.ffn, attention_widths(layer.attention)
    attention = T * w * (widths.projected + D)
    if is_in_blocks(share.seq_len):
        attention += T * (w * widths.output + share.wide * layer.attention.num_heads)
    if isinstance(ffn, DenseFFN):
        return attention + T * w * (ffn.num_matrices - 1) * ffn.d_ff
    first, k, E = ffn.num_matrices - 1, ffn.experts_per_token, ffn.num_experts
    router = T * E * share.wide + T * k * INDEX + (E * share.wide if ffn.router.balance == "aux_loss" else 0)
    R, chunks = share.rows(ffn), share.dispatch_chunks
    rows = R * w * first * ffn.d_ff
    if share.deduplicates:
        # Messages as they came, at a device, and at a node that chooses among them.
        of = share.buffers(ffn)
        rows += (of.arrived + (of.of_node if share.capacity_factor else 0)) * message_bytes(D, ffn, share)
    else:
        router += T * k * INDEX
        if share.expert > 1:
            router += (R + chunks * E) * share.wide + (
                T * k * INDEX if share.buffers(ffn).may_overflow else 0
            )
            # Barriers between chunks hold what has arrived once more, but the first and the last less often.
            rows += R // chunks * w * D * (chunks + max(0, 2 * chunks - 3))
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
    rows = R * (w * (D + 7 * ffn.d_ff) + W) + INDEX * ffn.num_experts // share.expert * share.dispatch_chunks
    if share.deduplicates:
        rows += 5 * R + _sums_stash(ffn, share)
        returned = -T * k * W
    else:
        rows += 15 * R if share.expert > 1 else INDEX * R
        returned = T * k * (INDEX - W + share.buffers(ffn).may_overflow)
    later = T * k * (INDEX + W) if share.makes_passes(ffn) else 0  # Which copies wait, and their gates.
    return norms + attention + beside + rows + returned + later + _router_stash(ffn, share)


def _sums_stash(ffn: MoEFFN, share: Share) -> int:
    """What sums of the results of a device, and of a node, need for their gradients."""
    rows, k, here = share.buffers(ffn), ffn.experts_per_token, ffn.num_experts // share.expert
    sums = rows.arrived * (min(k, here) * INDEX + (k * here + here if here <= k else k))
    if not share.capacity_factor:
        return sums
    local = share.expert // share.nodes
    return sums + 5 * (rows.arrived + share.nodes * share.tokens + (local + 1) * rows.of_node)


def _attention_stash(attention: GroupedQueryAttention | LatentAttention, share: Share) -> int:
    T, S, w, W, N = share.tokens, share.seq_len, share.itemsize, share.wide, attention.num_heads
    widths = attention_widths(attention)
    # Weights of the softmax before and after they are rounded, which is the same without rounding.
    in_blocks = is_in_blocks(S)
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
        if not is_in_blocks(share.seq_len):
            attention += T * (share.wide - w) * widths.output + T * share.wide * layer.attention.num_heads
    hidden = 1 if memory_mode == "stash" else 2
    if isinstance(ffn, DenseFFN):
        return attention + widened + T * w * _ffn_taps(D, ffn.d_ff, ffn.num_matrices, hidden)
    first, R, chunks = ffn.num_matrices - 1, share.rows(ffn), share.dispatch_chunks
    inputs, indices = _inputs_by_products(D, ffn, share) if by_products else (R * D, 0)
    counts = INDEX * ffn.num_experts // share.expert * chunks + INDEX * indices
    rows = w * (R * (1 + first) * ffn.d_ff + R * D + inputs)
    # Hidden rows are those before they are weighed, with their gates; of other chunks, weighed ones.
    if memory_mode != "stash":
        rows += (R // chunks if memory_mode in ("stage", "layer") else R) * share.wide
    beside = 0
    if ffn.shared_d_ff:
        gated = ffn.shared_gate == "sigmoid" and not by_products
        beside += T * w * _ffn_taps(D, ffn.shared_d_ff, ffn.num_matrices, 1 if gated else hidden)
        if by_products and share.expert == 1:
            beside -= T * w * D  # The experts' rows are made from the same input.
    if ffn.dense_residual_d_ff:
        beside += widened + T * w * _ffn_taps(D, ffn.dense_residual_d_ff, ffn.num_matrices, hidden)
    if share.makes_passes(ffn):  # From these, and the gradient of the results, later passes start again.
        inputs = 1 if ffn.shared_d_ff else 2
        beside += T * (inputs * w * D + ffn.experts_per_token * (INDEX + share.wide))
    return attention + rows + counts + beside


def _inputs_by_products(D: int, ffn: MoEFFN, share: Share) -> tuple[int, int]:
    """Elements from which a weight gradient makes the inputs of experts, and indices for that."""
    T, of = share.tokens, share.buffers(ffn)
    R = of.experts
    if share.expert == 1:
        return T * D, R
    if share.deduplicates:
        return of.arrived * _message_words(D, ffn, share), R
    return R * D, R


def _ffn_taps(d_model: int, d_ff: int, num_matrices: int, hidden: int) -> int:
    """Elements per token: input, output gradient, gradient of the first product, factors of the hidden row."""
    return 2 * d_model + (num_matrices - 1 + hidden) * d_ff
