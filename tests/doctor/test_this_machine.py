"""Tests of what is gathered of the machine that the tests run on."""

import os
import sys
import time
from pathlib import Path

from piperjax.doctor import this_machine as module
from piperjax.doctor.this_machine import read_requirements, this_machine


def test_this_machine(tmp_path):
    env = this_machine(out=tmp_path / "not/yet")
    assert env.python == sys.version_info[:3]
    assert env.versions["jax"] and env.requirements["jax"].startswith(">=0.10")
    assert env.requirements["python"] == ">=3.11" and "pyarrow" in env.requirements
    assert env.free_bytes[str(tmp_path / "not/yet")] > 0
    assert env.may_write and module._existing(env.out) == tmp_path
    assert env.limits["nofile"] is None or env.limits["nofile"] > 0
    assert env.environ["PATH"] == os.environ["PATH"] and len(env.cpus) >= 1 and env.hostname
    assert env.run([sys.executable, "-c", "print(1)"], {"A": "b"}, 20).stdout == "1\n"


def test_what_does_not_answer_is_left(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.05)
    assert module._in_time(lambda: time.sleep(5)) is None
    assert module._in_time(lambda: 3) == 3

    def refuse():
        raise PermissionError

    assert module._in_time(refuse) is None


def test_a_name_that_nobody_knows():
    assert module._addresses("no such name.invalid") == ()


def test_requirements_of_extras_are_left_out():
    lines = ["jax<0.13,>=0.10", "Flax (>=0.12)", "tqdm", 'pytest>=8; extra == "dev"']
    assert read_requirements(">=3.11", lines) == {
        "python": ">=3.11",
        "jax": "<0.13,>=0.10",
        "flax": ">=0.12",
        "tqdm": "",
    }


def test_the_sources_have_the_requirements():
    assert (Path(module.ROOT) / "pyproject.toml").exists()
