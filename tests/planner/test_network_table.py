"""The table of `python -m piperjax simulate`: its rows are simulations, and it says where they are not."""

import pytest

from meshes.platform import load_platform
from piperjax.planner import network_table
from piperjax.planner.collectives import all_to_all
from piperjax.planner.locality import Group
from piperjax.planner.network_simulation import simulate_all_to_all
from piperjax.planner.network_table import table_row, with_alpha

FRONTIER = load_platform("frontier")


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
