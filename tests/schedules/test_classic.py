"""The classic schedules by name."""

import pytest

from piperjax.schedules.classic import forward_only, forward_only_like, gpipe, one_f_one_b
from piperjax.schedules.interleaved import interleaved
from piperjax.schedules.ticks import pack
from piperjax.schedules.v_shaped import zb_v


def test_one_f_one_b_with_few_microbatches_is_still_valid():
    assert str(one_f_one_b(3, 1)) == "rank 0 | 0F0 0B0\nrank 1 | 1F0 1B0\nrank 2 | 2F0 2B0"


def test_forward_only_has_no_backward():
    assert {a.kind for actions in forward_only(3, 2).ranks for a in actions} == {"F"}


def test_no_stages_is_one_sentence():
    with pytest.raises(ValueError, match="needs at least one stage and one microbatch, got 2 stages and 0"):
        gpipe(2, 0)


def test_forward_only_follows_any_placement():
    assert forward_only_like(one_f_one_b(4, 4), 6) == forward_only(4, 6)
    for training in (interleaved(4, 8, 3), zb_v(4, 8), interleaved(2, 4)):
        for M in (1, 3, 8, 33):
            evaluation = forward_only_like(training, M)
            assert evaluation.stage_of_chunk == training.stage_of_chunk
            assert {a.kind for actions in evaluation.ranks for a in actions} == {"F"}
            fewest = training.num_chunks * M + training.num_ranks - 1
            assert len(pack(evaluation, "single").ticks) <= fewest + training.num_stages
            assert sum(map(len, evaluation.ranks)) == training.num_stages * M
