"""Fits to a part of the published rows: what is left out is left out, and constants that rows determine are found."""

import sys
from dataclasses import replace

import pytest

from benchmarks import refit
from benchmarks.validate import GOLDEN, load

ROWS = list(refit.rows_of([line.row for line in load(GOLDEN)]))
OF_BRIDGE = [row for row in ROWS if row.framework == "Bridge" and row.record.platform == "gb200_nvl72"]


def test_halves_are_halves_of_every_platform():
    (_, one), (_, other) = refit.halves(ROWS, seed=3)
    assert sorted(map(id, one + other)) == sorted(map(id, ROWS))
    for platform in {row.record.platform for row in ROWS}:
        sizes = [sum(row.record.platform == platform for row in half) for half in (one, other)]
        assert abs(sizes[0] - sizes[1]) <= 1
    assert list(map(id, one)) != list(map(id, refit.halves(ROWS, seed=4)[0][1]))


def test_groups_leave_nothing_out():
    groups = refit.WAYS["release"](ROWS, 0)
    assert sum(len(rows) for _, rows in groups) == len(ROWS)
    assert {"Bridge 26.02", "Bridge 26.06"} <= {name for name, _ in groups}
    # On Hopper later releases are as fast as this one.
    assert not any(row.release == "Bridge 26.06" and row.record.platform == "h100_pod" for row in ROWS)


def test_a_release_without_rows_is_as_the_last_one_before():
    constants = {
        ("Bridge 25.11", "streams"): 3.0,
        ("Bridge 26.04", "streams"): 1.0,
        ("Primus", "streams"): 9.0,
    }
    for release, streams in {"25.09": 3.0, "25.11": 3.0, "26.02": 3.0, "26.04": 1.0, "26.08": 1.0}.items():
        assert refit._known((f"Bridge {release}", "streams"), constants) == streams
    assert refit._known(("MaxText", "streams"), constants) == refit.BEGINNING["streams"]


def test_rows_that_follow_from_constants_give_them_back():
    """Rows are made from other constants: a fit to some predicts the rest, which the beginning does not."""
    truth = {key: refit.BEGINNING[key[1]] for row in OF_BRIDGE for key in row.keys}
    truth |= {(owner, name): 0.5 for owner, name in truth if name == "products"}
    made = [
        replace(row, record=replace(row.record, published=refit.predicted(row, truth)))
        for row in OF_BRIDGE[:4]
    ]
    known = {id(row): refit.parts(row) for row in made}
    constants = refit.fitted(made[:3], known)
    for row in made:
        exact = row.record.published / refit.predicted(row, constants | truth)
        assert refit._seconds(row, known[id(row)], constants | truth) == pytest.approx(exact, rel=0.02)
    before = refit.predicted(made[3], {}) / made[3].record.published
    after = refit.predicted(made[3], constants) / made[3].record.published
    assert before > 1.1 and abs(after - 1) < 0.05


def test_too_few_rows_are_refused(tmp_path, capsys, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("[]\n")
    monkeypatch.setattr(sys, "argv", ["refit", str(file)])
    assert refit.main() == 2
    assert "a fit needs at least 4 rows" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["refit", str(tmp_path / "nowhere.jsonl")])
    assert refit.main() == 2
