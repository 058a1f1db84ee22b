"""The classic schedules by name."""

import pytest

from piperjax.schedules.classic import BUILDERS, build, forward_only, gpipe, one_f_one_b


def test_names_and_aliases():
    assert build("gpipe", 2, 3) == gpipe(2, 3)
    assert build("1f1b", 2, 3) == build("one_f_one_b", 2, 3) == one_f_one_b(2, 3)


def test_every_builder_says_its_own_name():
    assert [builder(2, 4).name for builder in BUILDERS.values()] == list(BUILDERS)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="no schedule named 'gpip'; schedules are .*; did you mean 'gpipe'"):
        build("gpip", 2, 2)


def test_one_f_one_b_with_few_microbatches_is_still_valid():
    assert str(one_f_one_b(3, 1)) == "rank 0 | 0F0 0B0\nrank 1 | 1F0 1B0\nrank 2 | 2F0 2B0"


def test_forward_only_has_no_backward():
    assert {a.kind for actions in forward_only(3, 2).ranks for a in actions} == {"F"}


def test_no_stages_is_one_sentence():
    with pytest.raises(ValueError, match="needs at least one stage and one microbatch, got 2 stages and 0"):
        gpipe(2, 0)
