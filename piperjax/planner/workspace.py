"""This file is the memory that one phase of a step needs beside what lasts: a layer, the head, the reduction.

Phases follow one another, so the largest counts. What is alive at once in each was read off XLA's buffer assignment
(`--xla_dump_to`) for simulated devices. There ("cpu"), products in bfloat16 run in float32, what a loop reads in every
turn is converted once before it, and attention writes its scores, S^2 of them or those of a block of queries. On GPUs
our attention writes them too.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from models.config import DenseFFN, LayerConfig, MoEFFN
from models.query_blocks import is_in_blocks, query_block
from piperjax.planner.kept import (
    Share,
    attention_widths,
    hidden_read_where_kept,
    message_bytes,
    tap_bytes,
)
from piperjax.planner.plan import RECOMPUTING_MODES
from piperjax.planner.storage import LayerWeights

# Small things that are not counted one by one, and gaps between blocks: from 0 to 6 % of the largest phases seen.
SLACK = 1.02
# Part of a block that is lost where blocks of another size were before.
GAP = 0.6


class Phase(NamedTuple):
    """Bytes of one phase beside what lasts.

    Attributes:
      dispatch: rows as they are sent and received.
      logits: logits, their exponentials and their gradient.
      workspace: everything else.
    """

    dispatch: float = 0
    logits: float = 0
    workspace: float = 0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)

    def beside(self, num_bytes: float) -> "Phase":
        """The same with more in the workspace."""
        return self._replace(workspace=self.workspace + num_bytes)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """How a compiler treats what is narrower than float32.

    Attributes:
      widens: it is one for CPUs, which converts to float32 what products read, unless they are
      natively: computed from what they are given in, and only their results are wide.
      share: what a device works on.
    """

    widens: bool
    natively: bool = False
    share: Share

    @classmethod
    def named(cls, backend: str, share: Share) -> "Backend":
        """One of `BACKENDS`."""
        return cls(widens=backend != "gpu", natively=backend == "native_cpu", share=share)

    @property
    def is_widened(self) -> bool:
        """Whether anything is converted before products."""
        return self.widens and not self.natively and self.share.itemsize < self.share.wide

    @property
    def itemsize(self) -> int:
        """Bytes of an element inside of a phase, on average: where only results are wide, these are about half."""
        if self.natively:
            return (self.share.wide + self.share.itemsize) // 2
        return self.share.wide if self.widens else self.share.itemsize


@lru_cache(maxsize=8192)
def layer_backward(
    d_model: int,
    layer: LayerConfig,
    weights: LayerWeights,
    backend: Backend,
    *,
    splits: bool,
    memory_mode: str = "layer",
) -> Phase:
    """Backward of one layer after its forward ran again, or its input gradient alone if backward `splits`."""
    share, w = backend.share, backend.itemsize
    T, W = share.tokens, share.wide
    widths = attention_widths(layer.attention)
    heads = widths.query + widths.key + widths.value + widths.output
    block = query_block(share.seq_len)
    of_scores = share.sequences * layer.attention.num_heads * share.seq_len * block * W
    in_blocks = is_in_blocks(share.seq_len)
    of_weights = _weights_in_backward(layer, weights, backend, splits=splits)
    beside = T * (7 * d_model * w + heads * w)
    up = layer.ffn.num_matrices - 1
    if isinstance(layer.ffn, DenseFFN):
        hidden = T * layer.ffn.d_ff * w * (up + 3 if backend.is_widened else up + 2)
        num_scores = _scores_of_a_block(share) if in_blocks else 2
        return Phase(workspace=of_weights + beside + hidden + num_scores * of_scores)
    ffn = layer.ffn
    R = share.rows(ffn)
    shared = T * w * (up + 3) * (ffn.shared_d_ff + ffn.dense_residual_d_ff)
    rows, hidden = _rows_and_hidden(d_model, ffn, backend, memory_mode)
    waits = backend.widens and share.dispatch_chunks > 1 and memory_mode in ("stage", "layer")
    if waits and not splits and not share.deduplicates:
        # Between chunks CPUs ask for what experts return, though nobody needs it.
        rows += R * d_model * share.itemsize
    num_scores = 2 if backend.is_widened else 1
    if in_blocks:  # No weights of the softmax wait for their backward.
        num_scores = 0
    experts = Phase(dispatch=rows, workspace=of_weights + beside + shared + hidden + num_scores * of_scores)
    # Backward of attention: the experts' results are gone, what they were made from waits for the next kernel.
    attention = Phase(
        dispatch=2 * R * d_model * w,
        workspace=of_weights
        + beside
        + R * w * _hidden_beside_attention(up, memory_mode) * ffn.d_ff
        + (_scores_of_a_block(share) if in_blocks else 2.1) * of_scores,
    )
    # Blocks larger than the experts' hidden rows leave gaps where these were.
    largest = max(of_scores, R * d_model * w)
    gap = GAP * largest if largest > R * w * up * ffn.d_ff else 0
    return max(experts, attention, key=lambda phase: phase.total).beside(gap)


def _weights_in_backward(
    layer: LayerConfig, weights: LayerWeights, backend: Backend, *, splits: bool
) -> float:
    """Bytes of a layer's weights as its products read them, and of their gradients."""
    share, w = backend.share, backend.itemsize
    # The layer's slice of the weights, and its gradient, which is added to the accumulator in place.
    copies = 1 if splits else 2
    if weights.held == 1 and not splits and not backend.is_widened:  # The slice is all there is.
        copies = 1
    of_weights = copies * (weights.attention + weights.experts) * w
    if not backend.widens and copies == 2:  # As of the other parts, below.
        of_weights -= weights.experts * w / layer.ffn.num_matrices
    if not splits:
        # Chunks have gradients of their own, and so does a later pass, beside those that it is added to.
        later = isinstance(layer.ffn, MoEFFN) and share.makes_passes(layer.ffn)
        # GPUs add them up one by one.
        others = share.dispatch_chunks - 1 if backend.widens else share.dispatch_chunks > 1
        of_weights += (others + later) * weights.experts * w
    up = layer.ffn.num_matrices - 1
    if splits:
        of_weights += weights.ffn * w
    else:  # The gradient of the second matrix is added before the others are there.
        of_weights += (1 if backend.is_widened else 1 + up / (up + 1)) * weights.ffn * w
    return of_weights


def _scores_of_a_block(share: Share) -> float:
    """Arrays as large as the scores of one block of queries, in float32, that its backward has at once.

    Weights, which take the place of scores, and their gradients, which become those of scores; and weights as narrow as
    products read them.
    """
    return 2 + (share.itemsize / share.wide if share.itemsize < share.wide else 0)


def _hidden_beside_attention(up: int, memory_mode: str) -> int:
    """Rows of experts, d_ff wide, that weight gradients wait for while the backward of attention runs.

    What was made again from what is kept; with one matrix up, also the gradient of what it made.
    """
    read = hidden_read_where_kept(up, memory_mode)
    return up + 1 - read + (up == 1 and read > 0)


def _rows_and_hidden(
    d_model: int, ffn: MoEFFN, backend: Backend, memory_mode: str = "layer"
) -> tuple[float, float]:
    """Bytes of rows at experts, and of what is between their matrices, in the backward of experts."""
    share, w, up = backend.share, backend.itemsize, ffn.num_matrices - 1
    R, once, copies = share.rows(ffn), 0, 3
    read = hidden_read_where_kept(up, memory_mode)
    if share.deduplicates and memory_mode in RECOMPUTING_MODES:
        if not backend.widens:  # Gradients of results are rows of messages, gathered when products read them.
            copies = 2
        # Of one chunk, messages as they arrived.
        once = share.buffers(ffn).arrived * message_bytes(d_model, ffn, share) // share.dispatch_chunks
    if memory_mode == "named" and share.expert > 1 and not share.deduplicates:
        # What arrived, as it was kept, beside the same grouped by expert.
        once += R * d_model * share.itemsize
    if backend.is_widened:
        # SwiGLU in float32; of GELU one factor, the others are rounded first. Weighed rows are rounded, too.
        widths = (up + 3) * w + share.itemsize if up == 2 else w + 6 * share.itemsize
        return R * d_model * (2 * w + share.itemsize) + once, R * (widths - read * w) * ffn.d_ff
    return copies * R * d_model * w + once, R * w * (up + 2 + up - read) * ffn.d_ff


@lru_cache(maxsize=8192)
def weight_gradient(
    d_model: int, layer: LayerConfig, weights: LayerWeights, backend: Backend, memory_mode: str
) -> Phase:
    """Weight gradients of one layer from its taps: what it reads, and the gradients; experts' once per chunk."""
    share, w = backend.share, backend.itemsize
    taps = tap_bytes(d_model, layer, share, memory_mode) * w / share.itemsize
    gradients, others = weights.total, share.dispatch_chunks - 1
    rows = hidden = 0.0
    if isinstance(layer.ffn, MoEFFN) and share.makes_passes(layer.ffn):
        # Later passes run their forward again, with the weights, and have gradients of their own.
        rows, hidden = _rows_and_hidden(d_model, layer.ffn, backend)
        gradients += 2 * weights.experts
    if others and isinstance(layer.ffn, MoEFFN):
        # All these are prepared before the first loop over experts, so what a turn adds up, an expert's product to its
        # slice, comes beside them. Of one chunk it comes where taps were, or attention's gradients will be.
        gradients += others * weights.experts + 2 * (layer.ffn.num_matrices - 1) * d_model * layer.ffn.d_ff
    return Phase(dispatch=rows, workspace=taps + gradients * w + hidden)


def widest_tap(layer: LayerConfig, share: Share) -> int:
    """Elements of the largest of a layer's taps, the gradient of a first product."""
    ffn, T = layer.ffn, share.tokens
    if isinstance(ffn, DenseFFN):
        return T * (ffn.num_matrices - 1) * ffn.d_ff
    beside = T * max(ffn.shared_d_ff, ffn.dense_residual_d_ff)
    return (ffn.num_matrices - 1) * max(beside, share.rows(ffn) * ffn.d_ff)


def narrow_elements(count, d_model: int, layer: LayerConfig, share: Share, memory_mode: str) -> int:
    """Elements in the dtype of the computation among the bytes that `count` counts: `kept_bytes` or `tap_bytes`."""
    without = _Weightless(**share.__dict__)
    return (
        count(d_model, layer, share, memory_mode) - count(d_model, layer, without, memory_mode)
    ) // share.itemsize


class _Weightless(Share):
    """A share whose elements of the computation's dtype have no bytes: what remains is the rest."""

    @property
    def itemsize(self) -> int:
        return 0


def head(d_model: int, rows: int, backend: Backend) -> Phase:
    """Loss and its gradient for one microbatch, over `rows` of the vocabulary."""
    share = backend.share
    T, W = share.tokens, share.wide
    logits = T * rows * W
    of_weights = rows * d_model * W
    beside = 3 * T * d_model * W
    if not backend.widens:  # What the gradient of logits is narrowed to; that of the head is added in place.
        return Phase(logits=logits + T * rows * share.itemsize, workspace=beside)
    if backend.is_widened:
        return Phase(logits=2 * logits, workspace=of_weights + beside)
    return Phase(logits=2 * logits + max(0, logits - of_weights), workspace=min(logits, of_weights) + beside)
