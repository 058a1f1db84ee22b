"""`python -m piperjax simulate`: what the table says, and one sentence for every mistake."""

import pytest

from meshes.platform import load_platform
from piperjax.__main__ import main
from piperjax.planner import network_table
from piperjax.planner.collectives import all_to_all
from piperjax.planner.locality import Group
from piperjax.planner.network_simulation import simulate_all_to_all
from piperjax.planner.network_table import table_row, with_alpha

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


def test_a_row_is_the_simulation_and_sensitive_to_the_cost_of_a_message():
    row = table_row(FRONTIER, 1e6, 16, (15e-6, 1e-6))
    platform = with_alpha(FRONTIER, 15e-6)
    assert row.seconds["flat"] == simulate_all_to_all(platform, 16, 1e6)
    assert row.seconds["halo3"] == simulate_all_to_all(platform, 16, 1e6, "halo3")
    assert row.seconds["halo2"] <= simulate_all_to_all(platform, 16, 1e6, "halo2")
    assert row.speedups[0] > 2 * row.speedups[1]
    assert row.closed == ()


def test_many_messages_are_answered_by_the_closed_form(monkeypatch):
    monkeypatch.setattr(network_table, "MOST_MESSAGES", 10_000)
    row = table_row(FRONTIER, 1e6, 16, (5e-6,))
    assert row.closed == ("flat",)
    expected = all_to_all(with_alpha(FRONTIER, 5e-6), Group(128), 1e6).seconds
    assert row.seconds["flat"] == pytest.approx(expected)
    assert "* closed form" in network_table.report(FRONTIER, [row], (5e-6,))


def test_experts_that_do_not_divide_are_a_dash():
    rows = [table_row(FRONTIER, 1e6, nodes, (5e-6,), experts=(64, 6)) for nodes in (2, 16)]
    assert "halo2_dedup" in rows[0].seconds and "halo2_dedup" not in rows[1].seconds
    text = network_table.report(FRONTIER, rows, (5e-6,))
    assert "- the experts do not divide over the devices" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--platform", "fronteir"], "no platform named 'fronteir', did you mean 'frontier'"),
        (["--bytes", "8 parsecs"], "--bytes takes positive numbers.* units B, kB, KB, MB.* got '8 parsecs'"),
        (["--nodes", "2,x"], "--nodes takes positive numbers with commas between them, got 'x'"),
        (["--nodes", "0"], "--nodes takes positive numbers"),
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
    assert __import__("re").search(words, error)
