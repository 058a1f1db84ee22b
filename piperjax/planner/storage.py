"""This file is the parameters of a plan on one device: at rest, gathered for a step, and accumulated as gradients.

The same rules as `runtime/layout.py`, on numbers: layers are split over pipe, experts over the expert axis, the
vocabulary over pipe, and what then remains replicated is split at rest over the devices that hold copies (ZeRO-1;
Rajbhandari et al., arXiv:1910.02054), along the largest dimension that divides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from models.config import DenseFFN, GroupedQueryAttention, LatentAttention, LayerConfig, ModelConfig

ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


class Leaf(NamedTuple):
    """One parameter of a layer: its path and its shape [...], experts first if it has them."""

    path: str
    shape: tuple[int, ...]

    @property
    def is_expert(self) -> bool:
        """Whether its first dimension is the routed experts."""
        return self.path.startswith("ffn/experts/")

    @property
    def stays_wide(self) -> bool:
        """Whether it is computed with in at least float32: routers and norms."""
        name = self.path.rsplit("/", 1)[-1]
        return name == "router" or name.endswith("norm")

    @property
    def is_small(self) -> bool:
        """Whether its gradient belongs to the input gradient: norms, biases, routers and gates."""
        return self.stays_wide or self.path.endswith(("bias", "shared_gate"))


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Bytes of parameters that every device holds.

    Attributes:
      at_rest: parameters at rest; each of the two moments takes as much.
      accumulators: gradients of all that a device computes with, before they are reduced.
      outer_accumulators: those of embedding, head and final norm.
      reduced: those gradients after that, at rest, that other devices have a part in.
      widened: gradients at rest that are narrower than moments, as wide as these.
      compute_copy: what is cast or gathered at the start of a step; what is neither is read where it rests.
      outer_copy: embedding and head of it.
      layers: for each kind of layer, what a pass of one such layer reads.
    """

    at_rest: int
    accumulators: int
    outer_accumulators: int
    reduced: int
    widened: int
    compute_copy: int
    outer_copy: int
    layers: dict[str, "LayerWeights"]


class LayerWeights(NamedTuple):
    """Elements of one layer's weights on one device.

    Attributes:
      attention: with all norms.
      ffn: of the dense FFN, or of what is beside the experts, router included.
      experts: of the experts held here.
      held: how many layers of this kind a device has room for.
    """

    attention: int
    ffn: int
    experts: int
    held: int

    @property
    def total(self) -> int:
        """All of one layer."""
        return self.attention + self.ffn + self.experts


def itemsize_of(dtype: str) -> int:
    """Bytes of an element.

    Raises:
      ValueError: for a dtype that nothing is computed in.
    """
    if dtype not in ITEMSIZES:
        raise ValueError(
            f"dtype must be one of {', '.join(ITEMSIZES)}, got {dtype!r}; use bfloat16 or float32"
        )
    return ITEMSIZES[dtype]


def wide_itemsize(dtype: str) -> int:
    """Bytes of an element of what is computed in at least float32."""
    return max(4, itemsize_of(dtype))


@lru_cache(maxsize=4096)
def layer_leaves(d_model: int, layer: LayerConfig) -> tuple[Leaf, ...]:
    """The parameters of one layer. For latent attention, which has no layer yet, those that it will have."""
    leaves = [Leaf("attention_norm", (d_model,)), Leaf("ffn_norm", (d_model,))]
    leaves += [Leaf(f"attention/{name}", shape) for name, shape in _attention(d_model, layer.attention)]
    ffn = layer.ffn
    if isinstance(ffn, DenseFFN):
        return tuple(leaves + _matrices("ffn", d_model, ffn.d_ff, ffn.num_matrices))
    leaves.append(Leaf("ffn/router", (d_model, ffn.num_experts)))
    leaves += _matrices("ffn/experts", d_model, ffn.d_ff, ffn.num_matrices, (ffn.num_experts,))
    if ffn.shared_d_ff:
        leaves += _matrices("ffn/shared", d_model, ffn.shared_d_ff, ffn.num_matrices)
    if ffn.shared_gate == "sigmoid":
        leaves.append(Leaf("ffn/shared_gate", (d_model,)))
    if ffn.dense_residual_d_ff:
        leaves.append(Leaf("dense_residual_norm", (d_model,)))
        leaves += _matrices("dense_residual", d_model, ffn.dense_residual_d_ff, ffn.num_matrices)
    return tuple(leaves)


def _matrices(
    path: str, d_model: int, d_ff: int, num_matrices: int, first: tuple[int, ...] = ()
) -> list[Leaf]:
    up = Leaf(f"{path}/gate_up", (*first, d_model, 2 * d_ff))
    if num_matrices == 2:
        up = Leaf(f"{path}/up", (*first, d_model, d_ff))
    return [up, Leaf(f"{path}/down", (*first, d_ff, d_model))]


def _attention(
    D: int, attention: GroupedQueryAttention | LatentAttention
) -> list[tuple[str, tuple[int, ...]]]:
    N = attention.num_heads
    if isinstance(attention, LatentAttention):
        width = attention.nope_dim + attention.rope_dim
        rank = attention.q_rank
        query = [("query_down", (D, rank)), ("query_latent_norm", (rank,)), ("query_up", (rank, N, width))]
        return [
            *(query if rank else [("query", (D, N, width))]),
            ("kv_down", (D, attention.kv_rank + attention.rope_dim)),
            ("kv_latent_norm", (attention.kv_rank,)),
            ("kv_up", (attention.kv_rank, N, attention.nope_dim + attention.v_dim)),
            ("output", (N, attention.v_dim, D)),
        ]
    K, H = attention.num_kv_heads, attention.head_dim
    leaves = [("query", (D, N, H)), ("key", (D, K, H)), ("value", (D, K, H)), ("output", (N, H, D))]
    if attention.qk_norm != "none":
        widths = (H, H) if attention.qk_norm == "head" else (N * H, K * H)
        leaves += [("query_norm", widths[:1]), ("key_norm", widths[1:])]
    if attention.bias != "none":
        leaves += [("query_bias", (N, H)), ("key_bias", (K, H)), ("value_bias", (K, H))]
    if attention.bias == "all":
        leaves.append(("output_bias", (D,)))
    return leaves


def padded_rows(vocab_size: int, pipe: int) -> int:
    """Rows of embedding and head on one pipe rank, when the vocabulary is split."""
    return -(-vocab_size // pipe)


@lru_cache(maxsize=256)
def kinds_of(model: ModelConfig) -> tuple[tuple[str, LayerConfig], ...]:
    """Kinds of layers in order of first use."""
    return tuple(model.kinds.items())


@lru_cache(maxsize=1024)
def most_layers_of_kind(model: ModelConfig, layers_per_stage: tuple[int, ...]) -> dict[str, int]:
    """For each kind, the most layers of it that any stage holds: all stages have room for as many."""
    names = model.kind_of_layer
    most = dict.fromkeys(model.kinds, 0)
    first = 0
    for count in layers_per_stage:
        stage = names[first : first + count]
        first += count
        for name in set(stage):
            most[name] = max(most[name], stage.count(name))
    return most


@lru_cache(maxsize=4096)
def storage(
    model: ModelConfig,
    layers_per_stage: tuple[int, ...],
    *,
    pipe: int,
    data: int,
    expert: int,
    vocabulary: str = "split",
    dtype: str = "bfloat16",
    master_dtype: str = "float32",
    gradient_dtype: str = "float32",
) -> Storage:
    """Counts the bytes of parameters on one device; all devices hold equally much, padding included."""
    master, chunks = itemsize_of(master_dtype), len(layers_per_stage) // pipe
    most = most_layers_of_kind(model, layers_per_stage)
    tally = _Tally(dtype, master_dtype, gradient_dtype)
    layers = {}
    for kind, layer in kinds_of(model):
        leaves = layer_leaves(model.d_model, layer)
        for leaf in leaves:
            split, copies = (expert, data) if leaf.is_expert else (1, data * expert)
            tally.add(
                leaf, chunks * most[kind], split=split, copies=copies, dimensions=leaf.shape[leaf.is_expert :]
            )
        layers[kind] = _layer_weights(leaves, expert, held=chunks * most[kind])
    of_layers, summed, rows = tally.copied_bytes, tally.accumulated_bytes, padded_rows(model.vocab_size, pipe)
    names = ("embedding",) if model.embeddings == "tied" else ("embedding", "head")
    for name in names:
        whole = pipe if vocabulary == "whole" else 1
        tally.add(
            Leaf(name, (rows, model.d_model)),
            1,
            copies=data * expert,
            dimensions=(model.d_model,),
            regathered=whole,
        )
    tally.add(Leaf("final_norm", (model.d_model,)), 1)
    return Storage(
        at_rest=tally.at_rest * master,
        accumulators=tally.accumulated_bytes,
        outer_accumulators=tally.accumulated_bytes - summed,
        reduced=tally.reduced_bytes,
        widened=tally.widened_bytes,
        compute_copy=tally.copied_bytes,
        outer_copy=tally.copied_bytes - of_layers,
        layers=layers,
    )


class _Tally:
    """Elements and bytes added up leaf by leaf."""

    def __init__(self, dtype: str, master_dtype: str, gradient_dtype: str):
        self.dtype, self.master = dtype, itemsize_of(master_dtype)
        wide = wide_itemsize(master_dtype)
        self.gradient = wide, wide if gradient_dtype == "float32" else itemsize_of(gradient_dtype)
        self.at_rest = self.copied_bytes = 0
        self.accumulated_bytes = self.reduced_bytes = self.widened_bytes = 0

    def itemsize(self, leaf: Leaf) -> int:
        """Bytes of an element in a step."""
        return wide_itemsize(self.dtype) if leaf.stays_wide else itemsize_of(self.dtype)

    def add(
        self,
        leaf: Leaf,
        count: int,
        *,
        split: int = 1,
        copies: int = 1,
        dimensions: Sequence[int] = (),
        regathered=1,
    ):
        """Adds `count` leaves, each divided by `split`, and at rest by `copies` if one of the dimensions divides."""
        here = count * prod(leaf.shape) // split
        is_split = copies > 1 and any(size % copies == 0 for size in dimensions)
        whole = here * regathered
        rests = here // copies if is_split else here
        self.at_rest += rests
        gradient = self.gradient[not (leaf.is_small or leaf.path == "embedding")]
        self.reduced_bytes += rests * gradient if copies > 1 or regathered > 1 else 0
        self.accumulated_bytes += whole * gradient
        self.widened_bytes += rests * self.gradient[0] if gradient < self.gradient[0] else 0
        if is_split or regathered > 1 or self.itemsize(leaf) != self.master:
            self.copied_bytes += whole * self.itemsize(leaf)


def _layer_weights(leaves: Sequence[Leaf], expert: int, *, held: int) -> LayerWeights:
    def elements(*starts: str) -> int:
        return sum(prod(leaf.shape) for leaf in leaves if leaf.path.startswith(starts))

    experts = elements("ffn/experts")
    ffn = elements("ffn/", "dense_residual/") - experts
    total = sum(prod(leaf.shape) for leaf in leaves)
    return LayerWeights(attention=total - ffn - experts, ffn=ffn, experts=experts // expert, held=held)
