"""`python -m piperjax`: what it draws, and one sentence for every mistake."""

import pytest

from piperjax.__main__ import main


def test_show_draws_the_schedule(capsys):
    assert main(["show", "one_f_one_b", "--pipe", "2", "--microbatches", "3"]) == 0
    out = capsys.readouterr().out
    assert "one_f_one_b: 2 stages on 2 pipe ranks, 3 microbatches" in out
    assert "rank 0 | 0F0 0F1 0B0 0F2 0B1 0B2" in out
    assert "asynchronous" in out
    assert "25.0%" in out  # (P - 1) / (M + P - 1)


def test_show_reads_a_file_and_writes_svg(tmp_path, capsys):
    text, picture = tmp_path / "mine.txt", tmp_path / "mine.svg"
    text.write_text("0F0 0B0\n1F0 1B0\n")
    assert main(["show", str(text), "--svg", str(picture)]) == 0
    assert "mine: 2 stages on 2 pipe ranks, 1 microbatches" in capsys.readouterr().out
    assert picture.read_text().startswith("<svg")


def test_show_knows_chunks_clocks_and_times(tmp_path, capsys):
    picture = tmp_path / "a.svg"
    drawing = ["--svg", str(picture)]
    assert main(["show", "interleaved", "--chunks", "3", "--pipe", "2", "--microbatches", "4", *drawing]) == 0
    assert "interleaved: 6 stages on 2 pipe ranks" in capsys.readouterr().out
    assert "in lockstep" in picture.read_text()
    assert main(["show", "zbv", "--clock", "async", "--weight-gradient", "0.5", *drawing]) == 0
    assert "zb_v: 8 stages on 4 pipe ranks, 8 microbatches" in capsys.readouterr().out
    assert "asynchronous" in picture.read_text() and "weight gradient" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "gpip"], "did you mean 'gpipe'?"),
        (["show", "gpipe", "--pipe", "0"], "at least one stage"),
        (["show", "interleaved", "--microbatches", "6"], "must be a multiple of 4, got 6"),
        (["show", "zb_v", "--chunks", "3"], "has 2 stages per pipe rank, got 3"),
        (["show", "dualpipe_v", "--pipe", "8"], "at least two microbatches per pipe rank, 16 in all, got 8"),
        (["show", "v_min", "--weight-gradient", "-1"], "weight_gradient seconds must not be negative"),
        (["show", "nowhere.csv"], "cannot read the schedule file nowhere.csv"),
        (["show", "gpipe", "--microbatches", "-3"], "at least one stage and one microbatch"),
        (["show", "gpipe", "--forward", "0"], "must be positive"),
        (["show", "gpipe", "--transfer", "-1"], "transfer seconds must not be negative"),
        (["show", "gpipe", "--svg", "no/such/folder/a.svg"], "cannot write no/such/folder/a.svg"),
        (["show", "gpipe", "--pipe", "two"], "invalid int value: 'two'"),
        (["show"], "the following arguments are required: schedule"),
        (["shwo"], "invalid choice: 'shwo'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("piperjax: error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_broken_file_is_one_sentence(tmp_path, capsys):
    for name, content, words in (
        ("wrong.txt", b"0F0 hello", "an action is <stage><F|B|I|W><microbatch>"),
        ("empty.txt", b"", "no actions found"),
        ("binary.txt", bytes(range(128, 256)), "is not text"),
        ("stuck.txt", b"0B0 0F0", "deadlock"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert main(["show", str(path)]) == 2
        assert words in capsys.readouterr().err
