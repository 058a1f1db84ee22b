"""Tests of `python -m piperjax doctor`: every check on made-up machines, exit codes, and this machine in time."""

import argparse
import json
import time

import pytest

from meshes.platform import known_platforms, load_platform
from piperjax.doctor import command, devices, environment, flags
from piperjax.doctor.command import CHECKS, add_arguments, examine, main
from piperjax.doctor.finding import error, ok
from piperjax.doctor.this_machine import this_machine
from piperjax.runtime.bounded_process import Ended


def arguments(*flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


@pytest.mark.parametrize("name", known_platforms())
def test_every_check_survives_an_empty_machine(machine, name):
    """Nothing installed, nothing readable, every process fails."""
    env = machine(
        versions={},
        requirements={},
        probe=Ended(returncode=1),
        trial=Ended(returncode=None),
        expected=load_platform(name),
        addresses=None,
    )
    findings = examine(env)
    assert not [finding for finding in findings if finding.check == "doctor"]
    assert any(finding.level == "error" for finding in findings)


def test_every_check_survives_odd_variables(machine):
    names = (
        "XLA_FLAGS",
        "NCCL_SOCKET_IFNAME",
        "NCCL_IB_HCA",
        "SLURM_JOB_ID",
        "SLURM_LOCALID",
        "SLURM_STEP_NUM_TASKS",
    )
    names += ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "ROCM_PATH", "JAX_PLATFORMS")
    for value in ("", " ", ",", "=", "^", "-1", "é\n", "0,x"):
        env = machine.rocm(
            files=["sys/class/net/lo", "sys/class/infiniband/a"], environ=dict.fromkeys(names, value)
        )
        assert not [finding for finding in examine(env) if finding.check == "doctor"], value


def test_a_good_machine_has_no_complaints(machine):
    findings = examine(machine(free_bytes={"runs": 2**40}, memory_bytes=2**34, limits={"nofile": 65536}))
    assert [finding.sentence for finding in findings if finding.level in ("warning", "error")] == []
    assert len(findings) >= 8
    assert len(machine.asked) == 2  # One process tried flags, one started JAX.


def test_a_check_that_fails_is_a_finding(machine):
    def broken(env):
        raise KeyError("what")

    first, second = examine(machine(), [broken, lambda env: [ok("a", "b")]])
    assert first.level == "warning" and first.found == "the check broken failed: KeyError: 'what'"
    assert second.level == "ok"


def test_exit_codes(monkeypatch, capsys, machine):
    monkeypatch.setattr(command, "this_machine", lambda **_: machine())
    monkeypatch.setattr(command, "examine", lambda env: [ok("a", "good")])
    assert main(arguments()) == 0
    assert capsys.readouterr().out.startswith("ok       a  good\n\n0 errors, 0 warnings, 0 notes, 1 ok, in ")
    monkeypatch.setattr(command, "examine", lambda env: [error("a", "bad", "mend it")])
    assert main(arguments("--json")) == 2
    assert json.loads(capsys.readouterr().out)["counts"]["error"] == 1


def test_a_platform_that_nobody_knows():
    with pytest.raises(ValueError, match="no platform named 'fronteir', did you mean 'frontier'"):
        main(arguments("--platform", "fronteir"))


def test_this_machine_in_seconds(tmp_path, capfd):
    start = time.monotonic()
    code = main(arguments("--out", str(tmp_path), "--json"))
    out, err = capfd.readouterr()
    value = json.loads(out)
    assert err == "" and code == (2 if value["counts"]["error"] else 0)
    assert {"python", "packages", "devices", "disk"} <= {finding["check"] for finding in value["findings"]}
    assert not [finding for finding in value["findings"] if finding["check"] == "doctor"]
    assert (
        time.monotonic() - start < 60
    )  # Two on an idle machine; processes of their own start Python and JAX.


def test_what_hangs_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "DEVICES_SECONDS", 0.1)  # JAX takes longer to start.
    monkeypatch.setattr(flags, "TRIAL_SECONDS", 0.001)
    findings = examine(this_machine(out=tmp_path), [*flags.CHECKS, *devices.CHECKS])
    sentences = [finding.sentence for finding in findings if finding.level in ("error", "note")]
    assert any("did not end in time" in sentence for sentence in sentences), sentences
    assert any(
        "nothing happened for 0.1 s while JAX started its devices" in sentence for sentence in sentences
    )


def test_every_check_says_what_it_looks_at():
    assert all(check.__doc__ for check in CHECKS) and len(set(CHECKS)) == len(CHECKS) >= 25
