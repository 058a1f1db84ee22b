"""Interleaved 1F1B: drawn out, and its sentences."""

import pytest

from piperjax.schedules.interleaved import interleaved
from piperjax.schedules.ticks import pack


def test_interleaved_drawn_out():
    assert str(interleaved(2, 4)) == (
        "rank 0 | 0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3\n"
        "rank 1 | 1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3"
    )


def test_interleaved_in_ticks_drawn_out():
    assert str(pack(interleaved(2, 4))) == (
        "rank 0 | 0F0 0F1 2F0 2F1     0F2+2B0 0F3+2B1 2F2+0B0 2F3+0B1 2B2     2B3 0B2 0B3\n"
        "rank 1 | .   1F0 1F1 3F0+3B0 3F1+3B1 1F2+1B0 1F3+1B1 3F2+3B2 3F3+3B3 1B2 1B3 .  "
    )  # fmt: skip


def test_microbatches_come_in_groups_of_ranks():
    with pytest.raises(ValueError, match="must be a multiple of 4, got 6; use one_f_one_b"):
        interleaved(4, 6)
    with pytest.raises(ValueError, match="at least 2 chunks per pipe rank, got 1; use one_f_one_b"):
        interleaved(4, 8, 1)
