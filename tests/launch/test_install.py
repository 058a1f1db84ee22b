"""The installer: it installs when the requirements changed and not otherwise, and says what goes wrong."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installer(tmp_path, monkeypatch):
    """The installer, working on an empty project in which creating .venv and running pip are recorded only."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "launch" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in module.REQUIREMENTS:
        (tmp_path / name).write_text("x")
    venv = tmp_path / ".venv"
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", venv)
    monkeypatch.setattr(module, "PYTHON", venv / "bin" / "python")
    monkeypatch.setattr(module, "RECORD", venv / "installed.json")
    module.done = []

    def create():
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / "python").touch()
        module.done.append("create")
        return 0

    def install(extras):
        module.done.append(("install", *extras))
        return 0

    monkeypatch.setattr(module, "_create_venv", create)
    monkeypatch.setattr(module, "_install", install)
    return module


def test_installs_once(installer):
    assert installer.main(["dev"]) == 0
    assert installer.main(["dev"]) == 0
    assert installer.main([]) == 0  # nothing is missing for it
    assert installer.done == ["create", ("install", "dev")]


def test_extras_add_up(installer):
    installer.main([])
    installer.main(["dev"])
    installer.main(["cuda"])
    assert installer.done == ["create", ("install",), ("install", "dev"), ("install", "cuda", "dev")]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_installs_again_when_the_requirements_change(installer, name):
    installer.main([])
    (installer.ROOT / name).write_text("y")
    installer.main([])
    assert installer.done == ["create", ("install",), ("install",)]


def test_another_python_or_a_broken_record_starts_afresh(installer):
    installer.main(["dev"])
    record = json.loads(installer.RECORD.read_text())
    installer.RECORD.write_text(json.dumps({**record, "python": [3, 10]}))
    installer.main([])
    installer.RECORD.write_text("{")
    installer.main([])
    assert installer.done == ["create", ("install", "dev"), "create", ("install",), "create", ("install",)]


def test_a_failed_install_is_not_recorded(installer, monkeypatch):
    monkeypatch.setattr(installer, "_install", lambda extras: 2)
    assert installer.main([]) == 2
    assert not installer.RECORD.exists()


def test_unknown_extra(installer, capsys):
    assert installer.main(["gpu"]) == 2
    assert capsys.readouterr().err == "there is no extra 'gpu'; choose from cpu, cuda, rocm, dev\n"


def test_gpus_are_pointed_out_once(installer, monkeypatch, capsys):
    monkeypatch.setattr(installer.shutil, "which", lambda tool: tool == "nvidia-smi")
    installer.main([])
    installer.main([])
    assert capsys.readouterr().out == (
        "Installed for the CPU; nvidia-smi is here, so `make train EXTRA=cuda` may train on GPUs.\n"
    )
    installer.main(["cuda"])
    assert capsys.readouterr().out == ""


PIP = """\
Collecting jax==0.10.2 (from -c constraints.txt)
  Downloading jax-0.10.2-py3-none-any.whl.metadata (13 kB)
  Downloading https://files.example/jaxlib-0.10.2-cp311-linux.whl (85.1 MB)
Collecting tqdm
  Downloading tqdm-4.70.1-py3-none-any.whl (78 kB)
Installing collected packages: tqdm, jaxlib, jax
ERROR: No matching distribution found for jaxlib
"""


def test_progress_without_a_terminal_names_large_downloads(installer, capsys):
    log = io.StringIO()
    errors = installer._show_progress(PIP.splitlines(keepends=True), log, terminal=False)
    assert log.getvalue() == PIP
    assert errors == "No matching distribution found for jaxlib"
    assert capsys.readouterr().out == "  package 1: jaxlib (85.1 MB)\n"


def test_progress_on_a_terminal_is_one_changing_line(installer, capsys):
    installer._show_progress(PIP.splitlines(keepends=True), io.StringIO(), terminal=True)
    shown = [text.strip() for text in capsys.readouterr().out.split("\r")]
    assert shown[1:-1] == [
        "package 1: jax==0.10.2",
        "package 1: jax (13 kB)",
        "package 1: jaxlib (85.1 MB)",
        "package 2: tqdm",
        "package 2: tqdm (78 kB)",
        "unpacking 3 packages",
        "",
    ]


def test_the_python_without_ensurepip_is_told_what_to_install(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("install", ROOT / "launch" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert module._create_venv() == 2
    error = capsys.readouterr().err
    assert (
        "its module ensurepip is missing; install it (Debian and Ubuntu: apt install python3-venv)" in error
    )
    assert error.count("\n") == 1
