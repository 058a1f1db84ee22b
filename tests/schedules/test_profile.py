"""Profiles: counted and extended ones give what the built tick table gives."""

import numpy as np
import pytest

from piperjax.schedules import registry
from piperjax.schedules.lower import lower
from piperjax.schedules.profile import profile
from piperjax.schedules.ticks import pack
from piperjax.schedules.timeline import ActionCosts, lockstep

COSTS = (
    ActionCosts(forward=1, backward=2, input_gradient=1, weight_gradient=1),
    ActionCosts(forward=1, backward=3, input_gradient=2, weight_gradient=1),
    ActionCosts(forward=2, backward=5, input_gradient=4.2, weight_gradient=1.3, overlap=0.7),
)
STAGE_SECONDS = np.array(
    [[c.forward, c.backward, c.input_gradient, c.weight_gradient, c.overlap] for c in COSTS]
)
SIZES = [
    (1, 1),
    (1, 5),
    (2, 1),
    (2, 9),
    (4, 2),
    (4, 12),
    (4, 37),
    (6, 9),
    (8, 3),
    (8, 24),
    (12, 18),
    (16, 8),
    (16, 48),
]
SCHEDULES = [
    ("gpipe", 0, None),
    ("one_f_one_b", 0, None),
    ("one_f_one_b", 0, "overlap"),
    ("interleaved", 2, None),
    ("interleaved", 3, "overlap"),
    ("zb_h1", 0, None),
    ("zb_h1", 0, "overlap"),
    ("zb_h2", 0, None),
    ("zb_dual", 0, None),
    ("zb_v", 0, None),
    ("v_half", 0, None),
    ("v_min", 0, None),
    ("dualpipe_v", 0, None),
]


@pytest.mark.parametrize(("name", "num_chunks", "slots"), SCHEDULES)
def test_time_and_slots_are_those_of_the_built_table(name, num_chunks, slots):
    for num_ranks, num_microbatches in SIZES:
        try:
            table = pack(registry.build(name, num_ranks, num_microbatches, num_chunks), slots)
        except ValueError:
            with pytest.raises(ValueError, match="microbatches"):
                profile(name, num_ranks, num_microbatches, num_chunks, slots)
            continue
        lowered = lower(table)
        found = profile(name, num_ranks, num_microbatches, num_chunks, slots)
        exact = [lockstep(table, costs).step_seconds for costs in COSTS]
        np.testing.assert_allclose(found.seconds(STAGE_SECONDS), exact, rtol=1e-9)
        assert found.num_ticks == pytest.approx(len(table.ticks) if num_ranks > 1 else 0)
        assert found.slots.stash == pytest.approx(lowered.num_stash_slots)
        assert found.slots.taps == pytest.approx(lowered.num_tap_slots)
        # Arrivals that wait are few; their number jumps with the parity of the ranks.
        assert abs(found.slots.inputs - lowered.num_input_slots) <= max(2, num_ranks / 4)
        assert abs(found.slots.gradients - lowered.num_gradient_slots) <= max(2, num_ranks / 4)


def test_exchanges_embedding_and_head_are_counted_apart():
    costs = ActionCosts(transfer=0.1, head=0.3, embedding=0.02, embedding_gradient=0.01)
    found = profile("one_f_one_b", 4, 12)
    around = found.num_ticks * 0.1 + found.num_microbatches * (0.3 + 0.02 + 0.01)
    table = pack(registry.build("one_f_one_b", 4, 12))
    step = float(found.seconds(np.array([1.0, 2.0, 1.0, 1.0, 0.0]))) + around
    assert step == pytest.approx(lockstep(table, costs).step_seconds)


def test_thousands_of_ranks_take_no_time():
    found = profile("one_f_one_b", 1024, 4096)
    assert found.seconds(np.array([1.0, 2.0, 1.0, 1.0, 0.0])) == pytest.approx((4096 + 1023) * 3)
    assert found.slots.stash == pytest.approx(2 * 1024 - 1)


@pytest.mark.parametrize(
    ("name", "num_microbatches", "sentence"),
    [
        ("interleaved", 30, "must be a multiple of 16, got 30"),
        ("dualpipe_v", 30, "at least two microbatches per pipe rank, 32 in all, got 30"),
        ("1f3b", 30, "no schedule named '1f3b'"),
    ],
)
def test_what_no_builder_would_build_has_no_profile(name, num_microbatches, sentence):
    with pytest.raises(ValueError, match=sentence):
        profile(name, 16, num_microbatches)
