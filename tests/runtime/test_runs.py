"""Runs: layers of uneven stages and several kinds drawn out; walks forward, backward and in pairs."""

import numpy as np
import pytest

from piperjax.runtime.runs import Runs, Walk, runs_of

DENSE, MOE, NONE = 0, 1, 2


def drawn(runs: Runs) -> list[str]:
    """Per rank and chunk its rounds, runs as first+count by kind."""
    pipe, chunks, rounds, kinds = runs.count.shape
    return [
        " | ".join(
            " ".join(
                f"{runs.first[rank, chunk, number, kind]}+{runs.count[rank, chunk, number, kind]}"
                for kind in range(kinds)
            )
            for number in range(rounds)
        )
        for rank in range(pipe)
        for chunk in range(chunks)
    ]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([[[MOE, MOE]], [[MOE, NONE]]], ["0+0 0+2", "0+0 0+1"]),
        ([[[DENSE, DENSE, MOE]], [[MOE, MOE, MOE]]], ["0+2 2+1", "0+0 0+3"]),
        ([[[DENSE, MOE, DENSE, MOE]]], ["0+1 1+1 | 2+1 3+1"]),
        ([[[MOE, DENSE, MOE]], [[DENSE, MOE, NONE]]], ["0+0 0+1 | 1+1 2+1", "0+1 1+1 | 0+0 0+0"]),
        ([[[DENSE], [MOE]]], ["0+1 0+0", "0+0 0+1"]),
    ],
)
def test_runs_drawn_out(kinds, expected):
    runs = runs_of(np.array(kinds), 2)
    assert drawn(runs) == expected
    assert runs.count.sum() == (np.array(kinds) != NONE).sum()


def test_runs_that_are_the_same_everywhere_are_known():
    uneven = runs_of(np.array([[[MOE, MOE, MOE]], [[DENSE, MOE, MOE]]]), 2)
    assert uneven.fixed_count(DENSE) is None
    assert uneven.fixed_count(MOE) is None
    alternating = runs_of(np.array([[[DENSE, MOE] * 2], [[DENSE, MOE] * 2]]), 2)
    assert (alternating.fixed_count(DENSE), alternating.fixed_count(MOE)) == (1, 1)
    assert alternating.fixed_first(MOE) is None
    alike = runs_of(np.zeros((2, 2, 3), int), 1)
    assert (alike.fixed_first(0), alike.fixed_count(0), alike.num_rounds) == (0, 3, 1)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([[[MOE, MOE]], [[MOE, NONE]]], [[[[0, 1]]], [[[0, 1]]]]),
        ([[[DENSE, DENSE, MOE], [DENSE, NONE, NONE]]], [[[[0, 1]], [[1, 0]]]]),
        ([[[DENSE, MOE, DENSE, MOE]], [[DENSE, MOE, DENSE, NONE]]], [[[[0, 0], [0, 1]]], [[[0, 0], [1, 0]]]]),
    ],
)
def test_the_run_of_the_last_layer_of_every_chunk(kinds, expected):
    runs = runs_of(np.array(kinds), 2)
    np.testing.assert_array_equal(runs.last, expected)
    assert runs.fixed_last(MOE) == (1 if np.all(runs.last[..., MOE]) else None)


def positions(walk, count=None):
    return [walk.position(np.int32(turn)) for turn in range(walk.count if count is None else count)]


def test_walks():
    walk = Walk(np.int32(2), np.int32(4))
    assert positions(walk) == [2, 3, 4, 5]
    assert positions(walk.reversed()) == [5, 4, 3, 2]
    assert positions(walk.reversed().reversed()) == [2, 3, 4, 5]
    assert positions(walk.reversed().after(np.int32(3))) == [2]
    assert positions(walk.without(np.int32(1))) == [2, 3, 4] and positions(walk.last(np.int32(1))) == [5]
    assert positions(walk.without(np.int32(0))) == [2, 3, 4, 5] and positions(walk.last(np.int32(0))) == []
    empty = Walk(np.int32(0), np.int32(0))
    assert positions(empty.reversed()) == []
    assert walk.pairs(walk.after(np.int32(1)).reversed()) == 3
