"""Tests of the program that starts JAX and lets two devices exchange data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from piperjax.runtime import device_probe

ROOT = Path(__file__).parents[2]


def test_two_devices_exchange_what_was_sent():
    assert device_probe.exchange(jax.devices()[:2]) > 0


def test_another_result_is_told(monkeypatch):
    monkeypatch.setattr(device_probe.jax.lax, "all_to_all", lambda x, *_, **__: x)
    with pytest.raises(ValueError, match="brought other numbers than were sent"):
        device_probe.exchange(jax.devices()[:2])


def test_what_is_told_of_devices():
    assert device_probe.describe(jax.devices()[:2]) == {
        "backend": "cpu",
        "kinds": ["cpu", "cpu"],
        "memory_bytes": None,
    }


@pytest.mark.parametrize(
    ("environ", "code", "key"),
    [
        ({"JAX_PLATFORMS": "cpu"}, 0, "exchange_seconds"),
        ({"JAX_PLATFORMS": "nonsense"}, 1, "problem"),
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_no_such_flag=1"}, 1, "problem"),
    ],
)
def test_the_program_prints_json_whatever_happens(environ, code, key):
    given = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "piperjax.runtime.device_probe"],
        cwd=ROOT,
        env=given | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == code and key in last and "Traceback" not in done.stderr
