"""This file is the memory that one phase of a step needs beside what lasts: a layer, the head, the reduction.

Phases follow one another, so the largest counts. Backward of a layer is the working set of autodiff: its weights,
their gradient before and after it is added to the accumulator, and the intermediate results that are alive together.
"""

from typing import NamedTuple

from models.config import DenseFFN, LayerConfig
from piperjax.planner.kept import Share, attention_widths
from piperjax.planner.storage import LayerWeights, Storage


class Workspace(NamedTuple):
    """Bytes of one phase.

    Attributes:
      dispatch: rows as they are sent and received.
      logits: logits, their exponentials and their gradient.
      workspace: everything else.
    """

    dispatch: int = 0
    logits: int = 0
    workspace: int = 0


def layer_backward(
    d_model: int, layer: LayerConfig, share: Share, weights: LayerWeights, *, wide: bool
) -> Workspace:
    """The backward of one layer, after its forward was run again."""
    D, T, W = d_model, share.tokens, share.wide
    w = W if wide else share.itemsize
    widths = attention_widths(layer.attention)
    scale = W / share.itemsize if wide else 1
    # The layer's slice of the weights, its gradient, and the slice of the accumulator that it is added to.
    of_weights = int(2 * (weights.dense + weights.experts) * scale) + weights.large * W
    scores = 3 * share.sequences * layer.attention.num_heads * share.seq_len**2 * W
    attention = T * (W * 4 * D + w * 2 * (widths.query + widths.key + widths.value + widths.output)) + scores
    if isinstance(layer.ffn, DenseFFN):
        ffn = T * w * (4 * D + (3 + layer.ffn.num_matrices) * layer.ffn.d_ff)
        return Workspace(workspace=of_weights + max(attention, ffn))
    R = share.rows(layer.ffn)
    beside = layer.ffn.shared_d_ff + layer.ffn.dense_residual_d_ff
    rows = R * w * (3 + layer.ffn.num_matrices) * layer.ffn.d_ff + T * w * (4 * D + 4 * beside)
    dispatch = 4 * R * D * w
    if attention > rows + dispatch:
        return Workspace(workspace=of_weights + attention)
    return Workspace(dispatch=dispatch, workspace=of_weights + rows)


def head(d_model: int, rows: int, share: Share, *, wide: bool) -> Workspace:
    """Loss and its gradient for one microbatch, over `rows` of the vocabulary."""
    T, W = share.tokens, share.wide
    w = W if wide else share.itemsize
    logits = T * rows * (2 * W + w)
    return Workspace(logits=logits, workspace=rows * d_model * W + T * d_model * (2 * W + 2 * w))


def reduction(storage: Storage) -> Workspace:
    """Gradients after they are reduced, while the accumulators are still there."""
    return Workspace(workspace=storage.at_rest)
