"""Schedules by name and from files: aliases, hints, numbers of chunks, and one sentence for every mistake."""

import re

import pytest

from piperjax.schedules import registry
from piperjax.schedules.classic import one_f_one_b
from piperjax.schedules.interleaved import interleaved


def test_every_builder_says_its_own_name_and_number_of_chunks():
    for name in registry.names():
        schedule = registry.build(name, 2, 4)
        assert schedule.name == name
        assert schedule.num_chunks == registry.chunks_of(name)


def test_aliases_are_the_schedule_itself():
    assert registry.build("1f1b", 2, 3) == registry.build("one_f_one_b", 2, 3) == one_f_one_b(2, 3)
    assert {registry.canonical(alias) for alias in registry.ALIASES} <= set(registry.names())
    assert registry.canonical("DualPipe-V") == "dualpipe_v"


def test_chunks_are_a_choice_only_where_they_are():
    assert registry.build("interleaved", 2, 4, 3) == interleaved(2, 4, 3)
    assert registry.chunks_of("interleaved", 4) == 4
    assert registry.chunks_of("zbv") == registry.chunks_of("zbv", 2) == 2
    with pytest.raises(ValueError, match="schedule 'zb_v' has 2 stages per pipe rank, got 3"):
        registry.build("zb_v", 2, 4, 3)
    with pytest.raises(ValueError, match="schedule 'gpipe' has one stage per pipe rank, got 2"):
        registry.chunks_of("gpipe", 2)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="no schedule named 'gpip'; schedules are .*; did you mean 'gpipe'"):
        registry.build("gpip", 2, 2)


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("separator", [" ", ",", ", , "])
def test_a_schedule_written_to_a_file_is_read_back(tmp_path, name, separator):
    schedule = registry.build(name, 2, 4)
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(separator.join(map(str, actions)) for actions in schedule.ranks))
    read = registry.build(str(path), 2, 4)
    assert read.ranks == schedule.ranks
    assert read.stage_of_chunk == schedule.stage_of_chunk
    assert read.clock == "ordered"
    assert registry.chunks_of(str(path)) == schedule.num_chunks


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"0F0 0B0\n1F0 hello", "mine.txt', line 2: an action is <stage><F|B|I|W><microbatch>"),
        (b"", "mine.txt': no actions found"),
        (bytes(range(128, 256)), "mine.txt is not text"),
        (b"0F0 0B0\n1B0 1F0", "mine.txt': deadlock"),
        (b"0F0 0B0", "is for 1 pipe ranks and 1 microbatches, but the run has 2 and 1"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        registry.build(str(path), 2, 1)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_one_sentence():
    with pytest.raises(ValueError, match="cannot read the schedule file no/such.txt: No such file"):
        registry.build("no/such.txt", 2, 2)


@pytest.mark.parametrize("name", registry.names())
def test_checks_and_placements_are_those_of_the_built_schedule(name):
    for ranks, microbatches in ((1, 1), (2, 3), (2, 4), (4, 4), (4, 8), (3, 7)):
        try:
            built = registry.build(name, ranks, microbatches)
        except ValueError as error:
            with pytest.raises(ValueError, match=re.escape(str(error))):
                registry.check(name, ranks, microbatches)
        else:
            assert registry.check(name, ranks, microbatches) == built.num_chunks
            assert registry.placement(name, ranks, microbatches) == built.stage_of_chunk
