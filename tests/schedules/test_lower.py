"""Lowering: replaying the columns moves every value to where it is read; slots are never more than needed."""

import numpy as np
import pytest

from piperjax.schedules.classic import forward_only, gpipe, one_f_one_b
from piperjax.schedules.lower import lower
from piperjax.schedules.schedule import parse
from piperjax.schedules.ticks import pack

V_SHAPED = "0F0 3F0 3B0 0B0 0F1 3F1 3B1 0B1\n1F0 2F0 2B0 1B0 1F1 2F1 2B1 1B1"
SCHEDULES = [b(P, M) for b in (gpipe, one_f_one_b, forward_only) for P in (1, 2, 4, 8) for M in (1, 3, 8, 32)]
SCHEDULES += [parse(V_SHAPED, name="v")]


def replay(lowered):
    """Runs the columns on names instead of arrays; every read asserts that the right value is there."""
    schedule = lowered.table.schedule
    P, last = schedule.num_ranks, schedule.num_stages - 1
    rank, tick = lowered.rank_columns, lowered.tick_columns
    inputs = [[None] * (lowered.num_input_slots + 1) for _ in range(P)]
    gradients = [[None] * (lowered.num_gradient_slots + 1) for _ in range(P)]
    stash = [[None] * lowered.num_stash_slots for _ in range(P)]
    y, g, done = [None] * P, [None] * P, []

    def head(t):
        if tick.head_on[t]:
            owners = [r for r in range(P) if rank.head_owner[t, r]]
            assert len(owners) == 1 and y[owners[0]] == ("y", last, tick.head_microbatch[t])
            for r in range(P):
                gradients[r][rank.head_gradient[t, r]] = ("g", last, tick.head_microbatch[t])

    for t in range(lowered.num_ticks):
        sent_y, sent_g = list(y), list(g)
        for r in range(P):
            for c, shift in enumerate(lowered.forward_channels):
                inputs[r][rank.input_arrival[t, r, c]] = sent_y[(r - shift) % P]
            for c, shift in enumerate(lowered.backward_channels):
                gradients[r][rank.gradient_arrival[t, r, c]] = sent_g[(r - shift) % P]
        if lowered.head_comes_first:
            head(t)
        for r in range(P):
            if rank.forward_on[t, r]:
                m = rank.forward_microbatch[t, r]
                stage = schedule.stage_of_chunk[r][rank.forward_chunk[t, r]]
                if rank.forward_is_first[t, r]:
                    assert stage == 0 and tick.embedding_on[t] and tick.embedding_microbatch[t] == m
                else:
                    assert inputs[r][rank.forward_input[t, r]] == ("y", stage - 1, m)
                y[r] = ("y", stage, m)
                if lowered.has_backward:
                    stash[r][rank.forward_stash[t, r]] = (stage, m)
                done.append(("F", stage, m))
        if not lowered.head_comes_first:
            head(t)
        for r in range(P):
            if rank.backward_on[t, r]:
                m = rank.backward_microbatch[t, r]
                stage = schedule.stage_of_chunk[r][rank.backward_chunk[t, r]]
                assert gradients[r][rank.backward_gradient[t, r]] == ("g", stage, m)
                assert stash[r][rank.backward_stash[t, r]] == (stage, m)
                g[r] = ("g", stage - 1, m)
                if rank.backward_is_first[t, r]:
                    assert stage == 0 and tick.embedding_gradient_on[t]
                    assert tick.embedding_gradient_microbatch[t] == m
                done.append(("B", stage, m))
    return done


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{s.num_ranks}-{s.num_microbatches}")
def test_replay_reads_what_was_written(schedule):
    lowered = lower(pack(schedule))
    done = replay(lowered)
    assert sorted(done) == sorted(tuple(action) for actions in schedule.ranks for action in actions)


def test_slots_are_the_peak_in_flight():
    for P in (1, 2, 4, 8):
        for M in (4 * P, 8 * P):
            lowered = lower(pack(one_f_one_b(P, M)))
            assert lowered.num_stash_slots == 2 * P - 1 == max(lowered.table.peak_in_flight())
            assert lowered.num_gradient_slots == 1
            assert lowered.num_input_slots == (P > 1)
            assert lower(pack(gpipe(P, M))).num_stash_slots == M


def test_columns_are_int32_and_finite_in_number():
    lowered = lower(pack(one_f_one_b(4, 8)))
    for columns in (lowered.rank_columns, lowered.tick_columns):
        assert {array.dtype for array in vars(columns).values()} == {np.dtype(np.int32)}
    assert lowered.num_ticks == 8 + 2 * 3


def test_split_backward_gets_slots_for_what_weight_gradients_need():
    lowered = lower(pack(parse("0F0 0I0 0F1 0I1 0W0 0W1", name="split")))
    columns = lowered.rank_columns
    assert lowered.num_tap_slots == 2
    on = columns.weight_gradient_on.astype(bool)
    done = [
        (int(columns.weight_gradient_microbatch[place]), int(columns.weight_gradient_taps[place]))
        for place in zip(*on.nonzero(), strict=True)
    ]
    written = {
        int(columns.backward_microbatch[tick, 0]): int(columns.backward_taps[tick, 0])
        for tick in columns.backward_on[:, 0].nonzero()[0]
    }
    assert dict(done) == written
    assert sorted(written.values()) == [0, 1]


def test_a_full_backward_among_split_ones_is_both_in_one_tick():
    lowered = lower(pack(parse("0F0 0B0 0F1 0I1 0W1", name="mixed")))
    columns = lowered.rank_columns
    tick = int((columns.backward_microbatch[:, 0] + 10 * (1 - columns.backward_on[:, 0])).argmin())
    assert columns.weight_gradient_microbatch[tick, 0][columns.weight_gradient_on[tick, 0] == 1].tolist() == [
        0
    ]
    assert columns.weight_gradient_on.sum() == 2


def test_without_split_backward_there_are_no_taps():
    lowered = lower(pack(one_f_one_b(2, 4)))
    assert lowered.num_tap_slots == lowered.weight_gradients_per_tick == 0
    assert lowered.rank_columns.weight_gradient_on.shape[2] == 0
