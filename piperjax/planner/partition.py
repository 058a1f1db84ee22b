"""Partition: which layers a stage holds.

A tick of the executor lasts as long as its slowest rank, so what counts is the costliest stage. With the vocabulary
split over the pipe ranks, embedding, head and loss are work of all ranks alike and move no layer. Whole, they are
work of the first and of the last stage, which then hold fewer layers.

On a V, ranks hold two stages and a tick runs a forward of one and a backward of the other: the ticks are of two kinds,
forward going down while backward goes down too, and both going up, and each kind lasts as long as its slowest rank.
Rank 0 holds the first and the last stage: embedding gradient and head are in the same kind of tick. So both of its
stages hold less, but each enough not to be idle in the ticks of the other kind.
"""

from collections.abc import Callable

import numpy as np

from models import cost
from models.config import ModelConfig
from piperjax.schedules.schedule import v_placement

# What a device computes while its memory moves a byte, to price what is no product: 120 (MI250X) to 300 (H100) FLOP.
FLOP_PER_BYTE = 200
FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2
# F and B of the layers, in FLOP of a forward; B is the larger if it runs the forward again.
FORWARD_AND_BACKWARD = 3

# Costs that differ by less are equal: sums in another order must not decide.
_TOLERANCE = 1e-12


def partition_layers(costs: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    """Splits consecutive layers into stages so that the costliest stage is cheapest.

    Exact, by dynamic programming over (stages, layers); among equal splits one whose stage costs have the least sum of
    squares is taken.

    Args:
      costs: seconds, FLOP or any additive cost of each layer, in order.
      num_stages: number of stages.

    Returns:
      Layers per stage, each at least 1.

    Raises:
      ValueError: if there are fewer layers than stages.
    """
    num_layers = len(costs)
    if num_layers < num_stages:
        raise ValueError(
            f"a pipeline of {num_stages} stages needs at least {num_stages} layers, got {num_layers}; "
            f"use --pipe {num_layers} or fewer"
        )
    prefix = np.concatenate([[0.0], np.cumsum(costs)])
    # last[m, n]: cost of a last stage that holds layers m to n; infinite where it would hold none.
    last = np.where(np.tri(num_layers + 1, k=-1, dtype=bool).T, prefix - prefix[:, None], np.inf)
    largest, squares = last[0], last[0] ** 2
    begins = []
    for _ in range(1, num_stages):
        all_largest = np.maximum(largest[:, None], last)
        least = all_largest.min(axis=0)
        tied = all_largest <= least * (1 + _TOLERANCE)
        all_squares = np.where(tied, squares[:, None] + last**2, np.inf)
        begin = all_squares.argmin(axis=0)
        begins.append(begin)
        largest, squares = least, all_squares[begin, np.arange(num_layers + 1)]
    sizes, end = [], num_layers
    for begin in reversed(begins):
        sizes.append(int(end - begin[end]))
        end = begin[end]
    return (int(end), *reversed(sizes))


def partition_model(
    model: ModelConfig,
    num_stages: int,
    seq_len: int,
    vocabulary: str = "split",
    *,
    stages_of_rank: tuple[tuple[int, ...], ...] | None = None,
    recomputes: bool = False,
) -> tuple[int, ...]:
    """Splits a model's layers over stages by FLOP so that ticks are short.

    Args:
      model: its layers may differ in cost, such as dense ones before experts.
      num_stages: number of stages.
      seq_len: tokens per sequence; attention costs more for long ones.
      vocabulary: "split" over the pipe ranks, or "whole" on the ranks of the first and last stage.
      stages_of_rank: stages of each pipe rank; one each if left out.
      recomputes: whether a backward runs its forward again. The head's never does.

    Returns:
      Layers per stage, each at least 1.

    Raises:
      ValueError: if there are fewer layers than stages.
    """
    units = FORWARD_AND_BACKWARD + recomputes
    layers = tuple(units * float(layer.total) for layer in cost.flop_per_token(model, seq_len).layers)
    first, last = vocabulary_flop(model) if vocabulary == "whole" else (0.0, 0.0)
    on_a_v = stages_of_rank is not None and len(stages_of_rank) > 1
    on_a_v = on_a_v and stages_of_rank == v_placement(num_stages // 2)
    return partition_with_edges(
        layers, num_stages, first=first, last=last, forward_fraction=1 / units if on_a_v else None
    )


def vocabulary_flop(model: ModelConfig) -> tuple[float, float]:
    """Cost of embedding with its gradient, and of head and loss with theirs, per token in FLOP.

    Rows of the embedding are read, written, and their gradients added in float32. The head is three products; its
    logits are written, read for their maximum, read and written as exponentials, and read for the gradient. Whatever
    is moved costs `FLOP_PER_BYTE`.
    """
    V, D = model.vocab_size, model.d_model
    embedding = (2 * BFLOAT16_BYTES + 4 * FLOAT32_BYTES) * D * FLOP_PER_BYTE
    logits = 5.5 * FLOAT32_BYTES * V * FLOP_PER_BYTE
    heads = 1 + model.prediction_layers
    return float(embedding), heads * (6.0 * V * D + logits)


def partition_with_edges(
    costs: tuple[float, ...],
    num_stages: int,
    *,
    first: float = 0.0,
    last: float = 0.0,
    forward_fraction: float | None = None,
) -> tuple[int, ...]:
    """Splits layers where the first and the last stage have work beside their layers.

    Args:
      costs: F and B of each layer, in order.
      num_stages: number of stages.
      first: embedding and its gradient.
      last: head and loss with their gradient.
      forward_fraction: share of F in the costs of a layer, if stages go down the ranks and back up (a V).

    Returns:
      Layers per stage, each at least 1: exact for stages that are alone on their rank; on a V no layer can be taken
      from one stage and given to another to make ticks shorter.
    """
    if forward_fraction is None:
        return _split_beside(costs, num_stages, first, last)
    prefix = np.concatenate([[0.0], np.cumsum(costs)])

    def ticks(sizes: np.ndarray) -> tuple[float, float]:
        return _ticks_of_a_v(sizes, prefix, first + last, forward_fraction)

    # The rank of the edges may do without layers in either stage: begin with all of them taken from one, or shared.
    starts = {
        _split_beside(costs, num_stages, first + (1 - part) * last, part * last) for part in (1, 0.5, 0)
    }
    return min(
        (_improved(np.array(start), ticks) for start in sorted(starts)),
        key=lambda sizes: ticks(np.array(sizes)),
    )


def _split_beside(costs: tuple[float, ...], num_stages: int, first: float, last: float) -> tuple[int, ...]:
    return partition_layers((costs[0] + first, *costs[1:-1], costs[-1] + last), num_stages)


def _improved(sizes: np.ndarray, ticks: Callable[[np.ndarray], tuple[float, float]]) -> tuple[int, ...]:
    """Takes a layer from one stage for another as long as that makes ticks shorter."""
    moves = np.eye(len(sizes), dtype=int)[:, None] - np.eye(len(sizes), dtype=int)
    moves = moves.reshape(-1, len(sizes))
    seconds = ticks(sizes)
    while True:
        trials = [trial for trial in sizes + moves if trial.min() >= 1]
        all_seconds = [ticks(trial) for trial in trials]
        at = min(range(len(trials)), key=all_seconds.__getitem__)
        if not _is_shorter(all_seconds[at], seconds):
            return tuple(map(int, sizes))
        sizes, seconds = trials[at], all_seconds[at]


def _ticks_of_a_v(
    sizes: np.ndarray, prefix: np.ndarray, edges: float, forward_fraction: float
) -> tuple[float, float]:
    """Cost of a tick of either kind on their slowest ranks, and the sum of squares over ranks and kinds."""
    ends = np.cumsum(sizes)
    stages = prefix[ends] - prefix[ends - sizes]
    down, up = stages[: len(stages) // 2], stages[: len(stages) // 2 - 1 : -1]
    one = forward_fraction * down + (1 - forward_fraction) * up
    other = forward_fraction * up + (1 - forward_fraction) * down
    other[0] += edges
    return float(one.max() + other.max()), float((one**2).sum() + (other**2).sum())


def _is_shorter(trial: tuple[float, float], best: tuple[float, float]) -> bool:
    if abs(trial[0] - best[0]) > _TOLERANCE * best[0]:
        return trial[0] < best[0]
    return trial[1] < best[1] * (1 - _TOLERANCE)
