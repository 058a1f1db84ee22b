"""Partition: exact, on drawn cases and against brute force."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from meshes.platform import load_platform
from models import cost
from models.presets import preset
from piperjax.planner.partition import (
    partition_layers,
    partition_model,
    partition_with_edges,
    vocabulary_flop,
)
from piperjax.planner.plan import default_plan


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


def test_a_whole_vocabulary_takes_layers_from_the_first_and_last_stage():
    # The head costs as much as two layers, the embedding as much as one.
    assert partition_with_edges((1.0,) * 13, 4, first=1.0, last=2.0) == (3, 4, 4, 2)
    assert partition_with_edges((1.0,) * 13, 4) == partition_layers((1.0,) * 13, 4)


def test_on_a_v_the_rank_with_both_edges_holds_less_in_both_stages():
    sizes = partition_with_edges((1.0,) * 32, 8, last=3.0, forward_fraction=1 / 3)
    ranks = [sizes[rank] + sizes[7 - rank] for rank in range(4)]
    assert sum(sizes) == 32 and ranks[0] == min(ranks) < 8
    assert ticks_of_a_v(sizes, 1 / 3, last=3.0) < ticks_of_a_v(
        partition_layers((1.0,) * 32, 8), 1 / 3, last=3.0
    )


@pytest.mark.parametrize("last", [0.0, 1.0, 2.5])
def test_on_a_v_ticks_are_nearly_as_short_as_brute_force_can_make_them(last):
    for num_layers in (6, 9, 11):
        found = partition_with_edges((1.0,) * num_layers, 6, last=last, forward_fraction=1 / 4)
        edges = ([0, *cuts, num_layers] for cuts in combinations(range(1, num_layers), 5))
        best = min(ticks_of_a_v(np.diff(e), 1 / 4, last=last) for e in edges)
        assert ticks_of_a_v(found, 1 / 4, last=last) <= 1.1 * best


def ticks_of_a_v(sizes, forward_fraction, *, last):
    """Both kinds of tick of the steady phase, layers of cost one."""
    P, b = len(sizes) // 2, 1 - forward_fraction
    one = max(forward_fraction * sizes[r] + b * sizes[-1 - r] for r in range(P))
    return one + max(forward_fraction * sizes[-1 - r] + b * sizes[r] + last * (r == 0) for r in range(P))


def test_dense_layers_before_experts_are_cheaper():
    deepseek = preset("deepseek_v3")  # Three dense layers first.
    sizes = partition_model(deepseek, 6, 4096)
    assert sum(sizes) == 61 and sizes[0] == max(sizes)


def test_the_edges_of_a_model_are_priced_for_a_whole_vocabulary_only():
    model = preset("olmoe_1b_7b")
    split = partition_model(model, 4, 2048)
    whole = partition_model(model, 4, 2048, "whole")
    assert split == (4, 4, 4, 4) and whole[-1] < 4
    embedding, head = vocabulary_flop(model)
    layer = 3 * cost.flop_per_token(model, 2048).layers[0].total
    assert embedding < 0.1 * layer
    assert 6 * model.vocab_size * model.d_model < head < 1.5 * 6 * model.vocab_size * model.d_model
    # A backward that runs its forward again makes layers dearer, not the head.
    assert partition_model(model, 4, 2048, "whole", recomputes=True)[-1] >= whole[-1]


def test_the_default_plan_prices_them():
    options = dict(batch_size=64, seq_len=2048, pipe=4, data=1, expert=2, num_microbatches=32)
    plans = {
        vocabulary: default_plan(
            preset("olmoe_1b_7b"), load_platform("cpu8"), 8, vocabulary=vocabulary, **options
        )
        for vocabulary in ("split", "whole")
    }
    assert plans["split"].layers_per_stage == (4, 4, 4, 4)
    assert plans["whole"].layers_per_stage[-1] < 4
