"""Partition: exact, on drawn cases and against brute force."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from piperjax.planner.partition import partition_layers


def test_equal_layers_split_evenly():
    assert partition_layers((1.0,) * 8, 4) == (2, 2, 2, 2)
    assert sorted(partition_layers((1.0,) * 6, 4)) == [1, 1, 2, 2]


def test_costly_layers_stand_alone():
    assert partition_layers((1.0, 1.0, 1.0, 5.0), 2) == (3, 1)


def test_never_worse_than_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(30):
        costs = tuple(rng.uniform(0.5, 3.0, 9))
        stages = int(rng.integers(1, 6))
        found = partition_layers(costs, stages)
        assert sum(found) == 9 and min(found) >= 1
        assert worst(costs, np.cumsum(found)[:-1]) == pytest.approx(
            min(worst(costs, cuts) for cuts in combinations(range(1, 9), stages - 1))
        )


def worst(costs, cuts):
    edges = [0, *cuts, len(costs)]
    return max(sum(costs[a:b]) for a, b in pairwise(edges))


def test_fewer_layers_than_stages_is_one_sentence():
    with pytest.raises(
        ValueError, match="a pipeline of 4 stages needs at least 4 layers, got 2; use --pipe 2 or"
    ):
        partition_layers((1.0, 1.0), 4)
