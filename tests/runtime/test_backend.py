"""Tests of what is settled before JAX starts: flags in time, devices asked for, trials remembered."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from piperjax.runtime import backend
from piperjax.runtime.xla_flags import Trial

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os
from piperjax.runtime.backend import prepare
for line in prepare(3):
    print(line)
import jax
print(len(jax.devices()), os.environ["XLA_FLAGS"])
"""
CPU_FLAGS = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)


def started(tmp_path, flags, program=PROGRAM):
    environ = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )


def test_flags_and_devices_are_set_in_time(tmp_path):
    done = started(tmp_path, "--xla_cpu_enable_fast_math=false")
    assert done.stdout.splitlines() == [
        f"{CPU_FLAGS} added to XLA_FLAGS for cpu",
        f"3 --xla_cpu_enable_fast_math=false {CPU_FLAGS}",
    ], done.stderr
    assert len(json.loads((tmp_path / "piperjax/xla_flags.json").read_text())) == 1


def test_a_lone_device_needs_no_flags(tmp_path):
    program = (
        "import os; from piperjax.runtime.backend import prepare; print(prepare(), os.environ['XLA_FLAGS'])"
    )
    assert started(tmp_path, "", program).stdout == "() \n" and not list(tmp_path.iterdir())


def test_asking_whether_jax_has_started_changes_nothing(tmp_path):
    program = (
        "import jax; from piperjax.runtime.backend import has_started; a = jax.config.jax_num_cpu_devices; "
        "print(has_started(), has_started(), a == jax.config.jax_num_cpu_devices, len(jax.devices()), has_started())"
    )
    assert started(tmp_path, "", program).stdout == "False False True 1 True\n"


def test_a_flag_that_would_end_the_process_is_a_sentence(tmp_path):
    done = started(tmp_path, "--xla_gpu_enable_async_all_to_all=true")
    assert (
        "ValueError: XLA_FLAGS has --xla_gpu_enable_async_all_to_all=true, which was removed" in done.stderr
    )


def test_once_jax_runs_flags_stay_as_they_are():
    assert len(jax.devices()) == 8 and backend.has_started()
    before = os.environ["XLA_FLAGS"]
    assert backend.prepare() == () and os.environ["XLA_FLAGS"] == before
    with pytest.raises(ValueError, match="16 CPU devices must be asked for before JAX starts"):
        backend.prepare(16)


@pytest.mark.parametrize(
    ("given", "fraction", "lines"),
    [
        ({}, "0.93", 1),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, "0.5", 0),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, None, 0),
    ],
)
def test_jax_takes_most_of_a_gpu_unless_the_user_says_how_much(monkeypatch, given, fraction, lines):
    for name in backend.MEMORY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert backend._set_memory("cpu") == ()
    assert len(backend._set_memory("rocm")) == lines
    assert os.environ.get("XLA_CLIENT_MEM_FRACTION") == fraction
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """Counts trials instead of making them."""
    made = []

    def trial(text, name):
        made.append(text)
        return (
            Trial(rejected=frozenset({"xla_b"})) if "xla_b" in text else Trial(failure="" if text else "hung")
        )

    monkeypatch.setattr(backend, "_trial", trial)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return made


def test_trials_are_remembered_by_versions_and_text(trials):
    for text, version in [
        ("--xla_b", "1"),
        ("--xla_b", "1"),
        ("--xla_b", "2"),
        ("--xla_c", "2"),
        ("--xla_b", "2"),
    ]:
        trial = backend._remembered_trial(text, "rocm", {"jaxlib": version})
        assert trial.rejected == ({"xla_b"} if "xla_b" in text else set())
    assert trials == ["--xla_b", "--xla_b", "--xla_c"]


def test_a_trial_that_told_nothing_is_made_again(trials):
    for _ in range(2):
        assert backend._remembered_trial("", "rocm", {}).failure == "hung"
    assert trials == ["", ""]


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 3}', "\xff"])
def test_a_broken_file_of_trials_is_no_reason_to_stop(trials, content):
    backend.cache_file().parent.mkdir()
    backend.cache_file().write_text(content, encoding="latin-1")
    for _ in range(2):
        assert backend._remembered_trial("--xla_c", "cpu", {}) == Trial()


def test_where_nothing_can_be_written_flags_are_tried_again(trials, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert backend._remembered_trial("--xla_c", "cpu", {}) == Trial()
    assert len(trials) == 2


def test_only_exchanges_between_processes_are_told_apart(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)

    def options(processes, chunks):
        devices = [SimpleNamespace(platform="cpu", process_index=process) for process in processes]
        return backend.compiler_options(SimpleNamespace(devices=np.array(devices)), chunks=chunks)

    assert options((0, 1), 2) == {"xla_multiheap_size_constraint_per_heap": "1"}
    assert options((0, 0), 2) == options((0, 1), 1) == {}
    # XLA takes them as they are.
    assert jax.jit(lambda x: x + 1, compiler_options=options((0, 1), 2))(1) == 2
