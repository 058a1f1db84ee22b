"""Passes after the first: expectations against sampled routing, and what they add."""

from math import exp, factorial

import numpy as np
import pytest

from meshes.platform import load_platform
from models.config import MoEFFN
from piperjax.planner.collectives import all_reduce
from piperjax.planner.kept import Share
from piperjax.planner.later_passes import LaterPasses, exceeds, expected_passes, later_passes
from piperjax.planner.locality import Group


def share(*, tokens=256, expert=8, capacity_factor=1.25, **changes):
    return Share(
        sequences=1,
        seq_len=tokens,
        expert=expert,
        capacity_factor=capacity_factor,
        overflow="passes",
        **changes,
    )


FFN = MoEFFN(num_experts=32, experts_per_token=4, d_ff=16)


@pytest.mark.parametrize(("mean", "limit"), [(8.0, 3), (8.0, 8), (8.0, 12), (8.0, 30), (0.5, 0)])
def test_a_tail_is_that_of_poisson(mean, limit):
    exact = 1 - sum(exp(-mean) * mean**j / factorial(j) for j in range(limit + 1))
    # Where it is likely it is that of a normal distribution.
    tolerance = dict(rel=1e-3) if limit >= mean else dict(abs=0.03)
    assert exceeds(mean, limit) == pytest.approx(exact, **tolerance)
    assert exceeds(0.0, limit) == 0


def sampled(one, *, trials=300):
    """Mean number of passes after the first, one chunk, when every token takes k distinct experts at random."""
    rng = np.random.default_rng(0)
    P, E, k, T = one.expert, FFN.num_experts, FFN.experts_per_token, one.tokens
    places = one.buffers(FFN).experts / P
    chosen = rng.random((trials, P, T, E)).argpartition(k, axis=-1)[..., :k] // (E // P)
    counts = np.stack([(chosen == device).sum((2, 3)) for device in range(P)], axis=-1)
    return (np.ceil(counts.max((1, 2)) / places) - 1).mean()


@pytest.mark.parametrize("capacity_factor", [1.0, 1.1, 1.25, 1.35, 1.5])
def test_as_many_passes_are_expected_as_random_routing_needs(capacity_factor):
    one = share(tokens=64, capacity_factor=capacity_factor)
    expected, found = expected_passes(one, FFN, 1.0).number, sampled(one)
    # Rows of k distinct experts are a little more even than Poisson.
    assert found - 0.05 <= expected <= found + 0.35


def test_half_of_the_time_two_passes_is_half_a_pass_more():
    numbers = [expected_passes(share(capacity_factor=c), FFN, 1.0).number for c in np.arange(1.0, 2.01, 0.05)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > 0.99 and numbers[-1] < 1e-4 and any(0.2 < number < 0.8 for number in numbers)


def test_a_busy_device_decides():
    found = expected_passes(share(tokens=4096), FFN, 3.0)
    # Three times the rows through places for 1.25 times: three passes, and of these rows 1.75 of 3 later.
    assert found.number == pytest.approx(2, abs=1e-3)
    assert found.waiting_fraction == pytest.approx(1.75 / 3)
    assert expected_passes(share(tokens=4096), FFN, 1.2).number > 0.1
    assert expected_passes(share(tokens=4096), FFN, 1.0) == LaterPasses()


def test_later_passes_take_what_all_chunks_left():
    found = expected_passes(share(tokens=16384, dispatch_chunks=4), FFN, 2.5)
    # Four chunks left 1.25 times the rows of one each, and a later pass has room for 1.25.
    assert 3.9 < found.number < 5.1
    assert found.waiting_fraction == pytest.approx(0.5)


def test_rows_that_are_dropped_or_always_find_room_need_no_pass():
    dropping = Share(sequences=1, seq_len=256, expert=8, capacity_factor=1.0)
    assert expected_passes(dropping, FFN, 2.0) == LaterPasses()
    assert expected_passes(share(capacity_factor=8.0), FFN, 4.0) == LaterPasses()


def test_exchanges_are_those_of_every_pass():
    later = LaterPasses(number=0.5, waiting_fraction=0.1, agreement=0.25)
    # Forward: once, half of a pass of one of two chunks, and 1.5 questions whether there is one more.
    forward, backward = later.beside(2.0, 4.0, there=1.5, again=3.0, chunks=2)
    assert forward == 2.0 + 0.5 + 0.375
    # Backward: what is repeated, half of a pass of one chunk with its way there, and as many questions.
    assert backward == 4.0 + 3.0 + (1.5 + 4.0) / 4 + 0.375
    assert LaterPasses().beside(2.0, 4.0, there=1.0, again=2.0, chunks=1) == (2.0, 6.0)


def test_devices_agree_before_every_pass_by_one_number():
    platform, one = load_platform("frontier"), share()
    found = later_passes(platform, one, FFN, 1.5)
    assert found.agreement == all_reduce(platform, Group(8), 4).seconds > 0
    assert found._replace(agreement=0.0) == expected_passes(one, FFN, 1.5)
    dropless = share(capacity_factor=0.0)
    assert later_passes(platform, dropless, FFN, 1.5) == LaterPasses()
