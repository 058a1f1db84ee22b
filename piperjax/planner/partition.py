"""Partition: which layers a stage holds."""

from itertools import accumulate


def partition_layers(costs: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    """Splits consecutive layers into stages so that the costliest stage is cheapest.

    Exact, by dynamic programming over (stages, layers); among equal splits the one whose stage costs have
    the least sum of squares is taken.

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
    prefix = (0.0, *accumulate(costs))
    # best[n] = ((max cost, sum of squares), layers per stage) for the first n layers in the stages so far.
    best = {n: ((prefix[n], prefix[n] ** 2), (n,)) for n in range(1, num_layers + 1)}
    for stages in range(2, num_stages + 1):
        best = {
            n: min(_extended(best[m], prefix[n] - prefix[m], n - m) for m in range(stages - 1, n))
            for n in range(stages, num_layers + 1)
        }
    return best[num_layers][1]


def _extended(split: tuple, cost: float, layers: int) -> tuple:
    (largest, squares), sizes = split
    return (max(largest, cost), squares + cost**2), (*sizes, layers)
