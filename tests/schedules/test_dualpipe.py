"""DualPipeV: its eight phases, its pairs, and its sentence."""

import pytest

from piperjax.schedules.dualpipe import dualpipe_v
from piperjax.schedules.schedule import dependencies
from piperjax.schedules.ticks import pack
from piperjax.schedules.v_shaped import zb_v


def test_dualpipe_v_drawn_out():
    assert str(dualpipe_v(2, 4)) == (
        "rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3\n"
        "rank 1 | 1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3"
    )


def test_the_main_phase_pairs_a_forward_with_a_backward_of_another_microbatch():
    for P, M in ((2, 4), (3, 8), (4, 16), (8, 64)):
        schedule = dualpipe_v(P, M)
        for rank, actions in enumerate(schedule.ranks):
            start = 2 * (P - rank - 1) + 2 * (rank + 1) + 3 * (P - rank - 1)
            main = actions[start : start + 4 * (M - 2 * P + rank + 1)]
            assert "".join(action.kind for action in main) == "FB" * (len(main) // 2)
            # No backward waits for the forward right before it, so the two may overlap.
            for forward, backward in zip(main[::2], main[1::2], strict=True):
                needs = {need for group in dependencies(backward, 2 * P) for need in group}
                assert forward not in needs or rank == P - 1


def test_in_ticks_every_backward_is_split_and_the_table_is_that_of_zb_v():
    table = pack(dualpipe_v(4, 9))
    assert table.ticks == pack(zb_v(4, 9)).ticks
    assert {action.kind for action in table.tick_of()} == {"F", "I", "W"}
    assert table.head_comes_first and pack(zb_v(4, 9), "overlap").ticks == table.ticks


def test_too_few_microbatches_are_refused():
    with pytest.raises(ValueError, match="at least two microbatches per pipe rank, 8 in all, got 7"):
        dualpipe_v(4, 7)
