"""The named schedules: each exists once, and says before it is built what it is."""

import pytest

from piperjax.schedules.named import NAMED, build_all


@pytest.mark.parametrize("name", NAMED)
def test_an_entry_says_what_its_schedule_is(name):
    entry = NAMED[name]
    schedule = entry.build(4, 8, entry.num_chunks)
    assert schedule.name == name
    assert schedule.num_chunks == entry.num_chunks
    assert entry.placement(4, entry.num_chunks) == schedule.stage_of_chunk


def test_all_that_exist_for_given_numbers():
    assert {schedule.name for schedule in build_all(4, 8, 1)} == {
        "gpipe",
        "one_f_one_b",
        "zb_h1",
        "zb_h2",
        "zb_dual",
    }
    assert "dualpipe_v" not in {schedule.name for schedule in build_all(4, 7, 2)}, "needs 8 microbatches"
    assert [schedule.name for schedule in build_all(4, 8, 3)] == ["interleaved"]
    assert not build_all(4, 7, 3)
