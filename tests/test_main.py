"""`python -m piperjax`: what it draws, and one sentence for every mistake."""

import re
from pathlib import Path

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


def test_the_picture_of_the_readme_is_what_runs(tmp_path, capsys):
    root, picture = Path(__file__).parents[1], tmp_path / "a.svg"
    (command,) = re.findall(
        r"python -m piperjax (show .*) --svg docs/one_f_one_b.svg", (root / "README.md").read_text()
    )
    assert main([*command.split(), "--svg", str(picture)]) == 0
    assert picture.read_text() == (root / "docs/one_f_one_b.svg").read_text()


def test_show_knows_chunks_clocks_and_times(tmp_path, capsys):
    picture = tmp_path / "a.svg"
    drawing = ["--svg", str(picture)]
    assert main(["show", "interleaved", "--chunks", "3", "--pipe", "2", "--microbatches", "4", *drawing]) == 0
    assert "interleaved: 6 stages on 2 pipe ranks" in capsys.readouterr().out
    assert "in lockstep" in picture.read_text()
    assert main(["show", "zbv", "--clock", "async", "--cost", "weight_gradient=0.5", *drawing]) == 0
    assert "zb_v: 8 stages on 4 pipe ranks, 8 microbatches" in capsys.readouterr().out
    assert "asynchronous" in picture.read_text() and "weight gradient" in picture.read_text()


def steps(out):
    """(asynchronous, executed) seconds of a step as printed."""
    return tuple(
        float(line.removeprefix(label).split()[0])
        for label in ("asynchronous", "as executed")
        for line in out.splitlines()
        if line.startswith(f"{label} ")
    )


def test_show_prices_what_it_is_told(capsys):
    one = ["show", "one_f_one_b", "--pipe", "2", "--microbatches", "4"]
    assert main(one) == 0
    assert steps(capsys.readouterr().out) == (15.0, 15.0)
    # Four microbatches and one more for the pipeline to fill, of F 1 and B 2, and a head for each microbatch.
    assert main([*one, "--cost", "head=0.5", "--cost", "embedding=0.25"]) == 0
    asynchronous, executed = steps(capsys.readouterr().out)
    assert executed == 15 + 4 * 0.75 and asynchronous == pytest.approx(4 * 3.5 + 1.25 + 2)
    assert main([*one, "--cost", "forward=1,2", "--cost", "backward=2,4"]) == 0
    assert steps(capsys.readouterr().out) == (4 * 6 + 3, 4 * 6 + 3)
    assert main([*one, "--cost", "exposed-forward=0.5", "--cost", "exposed_backward=0,1"]) == 0
    assert steps(capsys.readouterr().out) == (4 * 4.5 + 3.5, 4 * 4.5 + 3.5)


def test_show_auto_keeps_within_a_limit_and_knows_the_times(capsys):
    auto = ["show", "auto", "--chunks", "1", "--microbatches", "12"]
    assert main([*auto, "--cost", "backward=3", "--cost", "input_gradient=2"]) == 0
    free = capsys.readouterr().out
    assert main([*auto, "--cost", "backward=3", "--cost", "input_gradient=2", "--memory-limit", "3"]) == 0
    limited = capsys.readouterr().out
    assert steps(free)[1] < steps(limited)[1]
    held = limited.splitlines()[-1].split("%")[1].split()
    assert max(map(int, held)) <= 3


def test_doctor_looks_at_this_machine(tmp_path, capsys):
    code = main(["doctor", "--out", str(tmp_path)])
    *lines, empty, last = capsys.readouterr().out.splitlines()
    assert "errors" in last or "1 error" in last
    assert code == (0 if last.startswith("0 errors") else 2) and empty == ""
    assert any(line.startswith("ok       packages") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "gpip"], "did you mean 'gpipe'?"),
        (["show", "gpipe", "--pipe", "0"], "at least one stage"),
        (["show", "interleaved", "--microbatches", "6"], "must be a multiple of 4, got 6"),
        (["show", "zb_v", "--chunks", "3"], "has 2 stages per pipe rank, got 3"),
        (["show", "dualpipe_v", "--pipe", "8"], "at least two microbatches per pipe rank, 16 in all, got 8"),
        (["show", "v_min", "--cost", "weight_gradient=-1"], "weight_gradient seconds must not be negative"),
        (["show", "nowhere.csv"], "cannot read the schedule file nowhere.csv"),
        (["show", "gpipe", "--microbatches", "-3"], "at least one stage and one microbatch"),
        (["show", "gpipe", "--cost", "forward=0"], "must be positive"),
        (["show", "gpipe", "--cost", "transfer=-1"], "transfer seconds must not be negative"),
        (["show", "gpipe", "--cost", "hed=1"], "no cost named 'hed'; costs are forward, backward"),
        (["show", "gpipe", "--cost", "hed=1"], "did you mean 'head'?"),
        (["show", "gpipe", "--cost", "head"], "--cost takes head=SECONDS, or one number per stage with comm"),
        (["show", "gpipe", "--cost", "head=1,2"], "head is the same for all stages, got 2 numbers; give one"),
        (
            ["show", "gpipe", "--cost", "forward=1,2"],
            "forward seconds must be one number or one per stage, got 2",
        ),
        (
            ["show", "auto", "--cost", "forward=1,2"],
            "must be one number or one per pipe rank, got 2 for 4 ranks",
        ),
        (
            ["show", "auto", "--pipe", "0"],
            "auto needs at least one pipe rank and one microbatch, got 0 and 8",
        ),
        (["show", "auto", "--memory-limit", "0.1"], "holds at most 0.1 activations per rank"),
        (["show", "zb_v", "--memory-limit", "3"], "--memory-limit is what auto keeps within, but zb_v keeps"),
        (["show", "gpipe", "--svg", "no/such/folder/a.svg"], "cannot write no/such/folder/a.svg"),
        (["show", "gpipe", "--pipe", "two"], "invalid int value: 'two'"),
        (["show"], "the following arguments are required: schedule"),
        (["shwo"], "did you mean show?; see `python -m piperjax --help`"),
        (["show", "gpipe", "--clock", "asnc"], "did you mean async?; see `python -m piperjax show --help`"),
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
