"""Schedules: validation, printing and parsing."""

import pytest

from piperjax.schedules.classic import gpipe, one_f_one_b
from piperjax.schedules.schedule import Action, Schedule, loop_placement, parse

GRID = [(P, M) for P in (1, 2, 3, 4, 7, 8, 16) for M in (1, 2, 5, 8, 33, 64)]


def test_action_prints_and_parses():
    assert str(Action("F", 2, 0)) == "2F0"
    assert Action.parse("12W7") == Action("W", 12, 7)
    with pytest.raises(ValueError, match="an action is <stage><F|B|I|W><microbatch> such as 2F0, got '2X0'"):
        Action.parse("2X0")


def test_one_f_one_b_drawn_out():
    assert str(one_f_one_b(2, 3)) == (
        "rank 0 | 0F0 0F1 0B0 0F2 0B1 0B2\n"
        "rank 1 | 1F0 1B0 1F1 1B1 1F2 1B2"
    )  # fmt: skip


def test_gpipe_drawn_out():
    assert str(gpipe(2, 2)) == (
        "rank 0 | 0F0 0F1 0B0 0B1\n"
        "rank 1 | 1F0 1F1 1B0 1B1"
    )  # fmt: skip


@pytest.mark.parametrize("builder", [gpipe, one_f_one_b])
def test_print_then_parse_is_identity(builder):
    for P, M in GRID:
        schedule = builder(P, M)
        assert parse(str(schedule), name=schedule.name, clock="dual") == schedule


def test_parse_reads_commas_comments_and_blank_lines():
    text = "# two ranks\n0F0, 0B0\n\n1F0,1B0  # last stage\n"
    assert parse(text).ranks == one_f_one_b(2, 1).ranks


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "0F0 0F0 0B0",
            "stage 0, microbatch 0 must run F and either B or I.W exactly once, but it runs F×2, B×1",
        ),
        ("0F0 0F1 0B0", "stage 0, microbatch 1 must run F and either B or I.W exactly once, but it runs F×1"),
        ("0B0 0F0", "deadlock, rank 0 waits at 0B0; reorder these actions"),
        ("1F0 1B0 0F0 0B0", "deadlock, rank 0 waits at 1F0"),
        ("0F0 0B0\n0F1 0B1", "each of the 1 stages must be held by exactly one of 2 pipe ranks"),
        (
            "0F0 1F0 1B0 0B0\n2F0 2B0",
            "every pipe rank must hold the same number of stages, but they hold .2, 1.",
        ),
        ("   ", "no actions found"),
        ("0F0 0I0", "must run F and either B or I.W exactly once, but it runs F×1, I×1"),
    ],
)
def test_an_invalid_schedule_cannot_exist(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse(text, name="broken")


def test_rank_may_only_run_stages_it_holds():
    with pytest.raises(ValueError, match=r"rank 0 runs 1F0 but holds stages \[0\]"):
        Schedule(
            name="broken",
            num_stages=2,
            num_microbatches=1,
            ranks=tuple(tuple(Action.parse(a) for a in row.split()) for row in ("0F0 1F0 1B0 0B0", "")),
            stage_of_chunk=loop_placement(2),
        )


def test_v_shaped_placement_is_understood():
    schedule = parse("0F0 3F0 3B0 0B0\n1F0 2F0 2B0 1B0")
    assert schedule.stage_of_chunk == ((0, 3), (1, 2))
    assert schedule.rank_of_stage == (0, 1, 1, 0)
    assert schedule.chunk_of_stage == (0, 0, 1, 1)
