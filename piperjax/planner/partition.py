"""Partition: which layers a stage holds."""

import numpy as np

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
