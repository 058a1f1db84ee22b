"""Tests of findings as text and as JSON."""

import json

from piperjax.doctor.finding import error, note, ok, warning
from piperjax.doctor.report import json_report, text_report

FINDINGS = [
    ok("python", "Python 3.11.7"),
    warning(
        "slingshot",
        "three variables are not set",
        "export FI_A=1 FI_B=2 FI_C=3, or load the module that does",
    ),
    note("slurm", "one process outside srun"),
    error("disk", "0 MiB free", "choose another --out"),
    error("hostname", "node1 resolves to nothing", "name it"),
]


def test_the_worst_comes_first_in_columns():
    assert (
        text_report(FINDINGS, seconds=1.25, width=60)
        == """\
error    disk       0 MiB free; choose another --out
error    hostname   node1 resolves to nothing; name it
warning  slingshot  three variables are not set; export
                    FI_A=1 FI_B=2 FI_C=3, or load the module
                    that does
note     slurm      one process outside srun
ok       python     Python 3.11.7

2 errors, 1 warning, 1 note, 1 ok, in 1.2 s"""
    )


def test_colours_are_for_terminals():
    assert "\033" not in text_report(FINDINGS, seconds=1)
    assert "\033[31merror  \033[0m  disk" in text_report(FINDINGS, seconds=1, colour=True)


def test_json():
    value = json.loads(json_report(FINDINGS, seconds=1.25))
    assert value["counts"] == {"error": 2, "warning": 1, "note": 1, "ok": 1} and value["seconds"] == 1.25
    assert value["findings"][0] == {
        "level": "error",
        "check": "disk",
        "found": "0 MiB free",
        "advice": "choose another --out",
    }


def test_nothing_to_report():
    assert text_report([], seconds=0) == "\n0 errors, 0 warnings, 0 notes, 0 ok, in 0.0 s"
