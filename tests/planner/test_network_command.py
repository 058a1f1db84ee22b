"""`python -m piperjax simulate`: what it prints and draws, and one sentence for every mistake."""

import re
from xml.etree import ElementTree

import pytest

from meshes.platform import load_platform
from piperjax.__main__ import main
from piperjax.planner.network_simulation import simulate_all_to_all
from piperjax.planner.network_table import with_alpha

FRONTIER = load_platform("frontier")


def test_the_table_says_that_it_is_simulated(capsys):
    arguments = ["--platform", "frontier", "--nodes", "2,8", "--bytes", "64kB,8MB", "--alpha", "15us,5us"]
    assert main(["simulate", "alltoall", *arguments, "--experts", "64,6"]) == 0
    out = capsys.readouterr().out
    assert "simulated, not a measurement and not a reproduction of one" in out
    assert "a further message between nodes costs 15 us" in out and "halo2_dedup" in out
    rows = [line for line in out.splitlines() if line.strip().startswith(("64 kB", "8 MB"))]
    assert [line.split()[2] for line in rows] == ["2", "8", "2", "8"]
    flat = simulate_all_to_all(with_alpha(FRONTIER, 15e-6), 8, 64e3)
    assert f"{flat * 1e3:.3f}" in rows[1]
    assert "closed form" not in out


def test_a_range_of_nodes_doubles(capsys):
    assert main(["simulate", "alltoall", "--nodes", "2..9,12", "--bytes", "1MB"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("1 MB")]
    assert [row[2] for row in rows] == ["2", "4", "8", "12"]


def test_it_draws_what_it_prints(tmp_path, capsys):
    file = tmp_path / "curves.svg"
    assert main(["simulate", "alltoall", "--nodes", "2..8", "--bytes", "1MB", "--svg", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"wrote {file}\n")
    text = "".join(ElementTree.fromstring(file.read_text()).itertext())
    best = [line.split()[8] for line in out.splitlines() if line.strip().startswith("1 MB")]
    assert len(best) == 3
    assert all(f"{nodes} nodes: {speedup}" in text for nodes, speedup in zip((2, 4, 8), best, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--platform", "fronteir"], "no platform named 'fronteir', did you mean 'frontier'"),
        (["--bytes", "8 parsecs"], "--bytes takes positive numbers.* units B, kB, KB, MB.* got '8 parsecs'"),
        (["--nodes", "2,x"], "--nodes takes positive numbers with commas between them, got 'x'"),
        (["--nodes", "0"], "--nodes takes positive numbers"),
        (["--nodes", "8..2"], "the first and the last of a range as in 2..128, got '8..2'"),
        (
            ["--svg", "/no/such/folder/a.svg"],
            "cannot write /no/such/folder/a.svg: .*give a file in an existing",
        ),
        (["--alpha", "5 parsecs"], "--alpha takes positive numbers"),
        (["--experts", "64"], "--experts takes two numbers, experts and experts per token, got '64'"),
        (["--platform", "cpu8"], "platform 'cpu8' does not say what a message between nodes costs"),
        (["--nodes", "20000", "--bytes", "1MB"], "joins at most 78848 devices"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words, capsys):
    assert main(["simulate", "alltoall", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(words, error)
