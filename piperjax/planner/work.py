"""This file is the work of one layer on one device: matrix products, attention, and bytes moved by everything else.

`models/cost.py` counts a layer per token and unsharded; here the same layer has the shapes that one device
multiplies, as rates depend on them. T is the tokens of one microbatch that live on the device, `tensor` devices share
the heads and dense features of a layer and each other's tokens (1 in our executor; other frameworks have more).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from models import cost
from models.config import DenseFFN, GroupedQueryAttention, LatentAttention, LayerConfig, MoEFFN
from piperjax.planner.buffers import Buffers

FLOAT32_BYTES = 4
# Of an element of accumulators of gradients, by what a plan says of them.
GRADIENT_BYTES = {"float32": FLOAT32_BYTES, "bfloat16": 2}


class Product(NamedTuple):
    """One matrix product [rows, depth] x [depth, columns] of the forward pass, for each of `groups` experts.

    Attributes:
      name: what is projected.
      rows: rows of one group.
      columns, depth: the weight is [depth, columns].
      groups: experts on this device; 0 for a product that is not of experts.
      is_wide: computed in float32 (the router).
      is_last: its result only enters a sum, so that recomputation leaves it out.
    """

    name: str
    rows: float
    columns: float
    depth: float
    groups: int = 0
    is_wide: bool = False
    is_last: bool = False

    @property
    def weights(self) -> float:
        """Parameters on this device."""
        return max(self.groups, 1) * self.columns * self.depth


class Stream(NamedTuple):
    """Work bound by memory: bytes read and written, and kernels launched, forward and backward.

    Attributes:
      name: what it does.
      forward_bytes, backward_bytes: read and written in all.
      launches: kernels of one direction.
      is_sent: prepares or takes apart rows that travel to experts and back, repeated only if the exchange is.
      is_of_rows: goes through the buffers of rows of experts, in every pass.
      kind: in `meshes.device.ELEMENTWISE`, where its rates differ from those of memory.
    """

    name: str
    forward_bytes: float
    backward_bytes: float
    launches: int = 1
    is_sent: bool = False
    is_of_rows: bool = False
    kind: str = "memory"

    @property
    def backward_kind(self) -> str:
        """The kind of its gradient."""
        return f"{self.kind}_gradient"


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """The forward pass of a layer on one device, one microbatch.

    Attributes:
      products: matrix products with weights.
      attention_flop: scores and their product with the values, causal half.
      head_dim: features of a head, the mean of query and value.
      streams: memory-bound work.
    """

    products: tuple[Product, ...]
    attention_flop: float
    head_dim: float
    streams: tuple[Stream, ...]


@lru_cache(maxsize=4096)
def layer_work(
    d_model: int,
    layer: LayerConfig,
    *,
    tokens: float,
    seq_len: int,
    expert: int = 1,
    tensor: int = 1,
    imbalance: float = 1.0,
    buffer: Buffers | None = None,
    itemsize: int = 2,
) -> LayerWork:
    """The work of one layer.

    Args:
      d_model: D.
      layer: the layer.
      tokens: T.
      seq_len: tokens of a sequence.
      expert: devices that share the experts.
      tensor: devices that share heads and features.
      imbalance: rows of the busiest device over the mean.
      buffer: rows that elementwise work of experts goes through; None for those that are there, T k imbalance.
      itemsize: bytes of an activation.
    """
    attention, ffn = layer.attention, layer.ffn
    projections, streams = _attention(d_model, attention, tokens, tensor, itemsize)
    norms = (
        (5 if isinstance(ffn, MoEFFN) and ffn.dense_residual_d_ff else 4) * 2 * d_model * tokens * itemsize
    )
    streams = [Stream("norms and residuals", norms, norms, launches=4, kind="norm"), *streams]
    if isinstance(ffn, DenseFFN):
        products = _ffn("dense", d_model, ffn.d_ff, ffn.num_matrices, rows=tokens * tensor, tensor=tensor)
        streams.append(_activation("dense", ffn.d_ff, ffn.num_matrices, tokens, itemsize))
    else:
        rows = tokens * ffn.experts_per_token * imbalance
        products, more = _experts(d_model, ffn, tokens, rows, buffer, expert, itemsize)
        streams += more
        for name, width in (("shared", ffn.shared_d_ff), ("residual", ffn.dense_residual_d_ff)):
            if width:
                products += _ffn(name, d_model, width, ffn.num_matrices, rows=tokens * tensor, tensor=tensor)
                streams.append(_activation(name, width, ffn.num_matrices, tokens, itemsize))
    query_width, value_width = cost.head_widths(attention)
    return LayerWork(
        products=(*projections, *products),
        attention_flop=tokens * seq_len * attention.num_heads * (query_width + value_width),
        head_dim=(query_width + value_width) / 2,
        streams=tuple(streams),
    )


def _attention(
    d_model: int,
    attention: GroupedQueryAttention | LatentAttention,
    tokens: float,
    tensor: int,
    itemsize: int,
) -> tuple[list[Product], list[Stream]]:
    """Projections, and elementwise work on queries and keys. Compressing projections are done once, not shared."""
    query_width, value_width = cost.head_widths(attention)
    N, T, t = attention.num_heads, tokens, tensor
    output = Product("attention output", T * t, d_model, N * value_width / t)
    if isinstance(attention, GroupedQueryAttention):
        K = attention.num_kv_heads
        products = [Product("query, key, value", T * t, (N + 2 * K) * query_width / t, d_model), output]
        turned = 2 * T * (N + K) * query_width * itemsize
        streams = [Stream("rotary", turned, turned, launches=2, kind="rotary")]
        if attention.qk_norm != "none":
            streams.append(Stream("query and key norms", turned, 1.5 * turned, launches=2, kind="norm"))
        return products, streams
    up = N * (attention.nope_dim + value_width) / t
    products = [
        Product("key, value down", T, attention.kv_rank + attention.rope_dim, d_model),
        Product("key, value up", T * t, up, attention.kv_rank),
        output,
    ]
    rank = attention.q_rank
    if rank:
        products.append(Product("query down", T, rank, d_model))
    products.append(Product("query up", T * t, N * query_width / t, rank or d_model))
    # Queries are turned, and keys joined from a part of every head and one that all share.
    turned = 4 * T * N * query_width * itemsize
    latents = 2 * T * (rank + attention.kv_rank) * itemsize
    streams = [
        Stream("rotary", turned, turned, launches=3, kind="rotary"),
        Stream("latent norms", latents, 1.5 * latents, launches=2, kind="norm"),
    ]
    return products, streams


def _experts(
    d_model: int, ffn: MoEFFN, tokens: float, rows: float, buffer: Buffers | None, expert: int, itemsize: int
) -> tuple[list[Product], list[Stream]]:
    """Router, routed experts, and the permutations around them."""
    E, k = ffn.num_experts, ffn.experts_per_token
    groups = E // expert
    scores = tokens * E * FLOAT32_BYTES
    sent = tokens * k * d_model * itemsize
    buffer_rows = rows if buffer is None else buffer.experts
    rows_moved = dict(launches=2, is_sent=True, is_of_rows=True, kind="rows")
    streams = [
        Stream("router", 4 * scores, 3 * scores, launches=6),
        Stream("spread rows", sent + buffer_rows * d_model * itemsize, 2 * sent, **rows_moved),
        Stream("combine rows", sent + tokens * d_model * itemsize, 2 * sent, **rows_moved),
        _activation("experts", ffn.d_ff, ffn.num_matrices, buffer_rows, itemsize)._replace(is_of_rows=True),
    ]
    row_bytes = d_model * itemsize
    if buffer is not None and buffer.of_node:
        summed = 2 * (buffer.arrived + buffer.of_node) * row_bytes
        rows_summed = dict(launches=4, is_of_rows=True, kind="rows")
        streams.append(Stream("sums of devices and nodes", summed, summed, **rows_summed))
    elif expert > 1:
        moved = 4 * buffer_rows * row_bytes
        rows_grouped = dict(launches=4, is_of_rows=True, kind="rows")
        streams.append(Stream("group rows by expert", moved, moved, **rows_grouped))
    products = [
        Product("router", tokens, E, d_model, is_wide=True),
        *_ffn("experts", d_model, ffn.d_ff, ffn.num_matrices, rows=rows / groups, groups=groups),
    ]
    return products, streams


def _ffn(
    name: str, d_model: int, d_ff: int, num_matrices: int, *, rows: float, groups: int = 0, tensor: int = 1
) -> list[Product]:
    """Up (with the gate beside it) and down. Who weighs what experts return needs it for the gradients of gates."""
    up = (num_matrices - 1) * d_ff / tensor
    return [
        Product(f"{name} up", rows, up, d_model, groups),
        Product(f"{name} down", rows, d_model, d_ff / tensor, groups, is_last=not groups),
    ]


def _activation(name: str, d_ff: int, num_matrices: int, rows: float, itemsize: int) -> Stream:
    """Reads what the up product wrote and writes its input to the down product; backward all of it and gradients."""
    num_bytes = rows * num_matrices * d_ff * itemsize
    return Stream(f"{name} activation", num_bytes, 2 * num_bytes, kind="activation")
