"""This file is the installer behind the Makefile: it creates .venv, and installs only when the requirements changed.

    python3.11 launch/install.py [extra ...]

It runs outside .venv, so it needs nothing but Python 3.11 or newer.
"""

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
RECORD = VENV / "installed.json"
REQUIREMENTS = ("pyproject.toml", "constraints.txt")
EXTRAS = ("cpu", "cuda", "rocm", "dev")
LARGE_MEGABYTES = 10
TOOLS = {"nvidia-smi": "cuda", "rocm-smi": "rocm"}


def main(extras: list[str]) -> int:
    """Brings .venv up to date with the project and `extras`; returns the exit code."""
    for extra in extras:
        if extra not in EXTRAS:
            return _complain(f"there is no extra '{extra}'; choose from {', '.join(EXTRAS)}")
    found = _installed()
    python = list(sys.version_info[:2])
    content = b"".join((ROOT / name).read_bytes() for name in REQUIREMENTS)
    wanted = {
        "python": python,
        "requirements": hashlib.sha256(content).hexdigest(),
        "extras": sorted(set(extras)),
    }
    code = 0
    if found.get("python") == python:
        wanted["extras"] = sorted({*extras, *found["extras"]})
    else:
        code = _create_venv()
    if found != wanted:
        code = code or _install(wanted["extras"])
        if code == 0:
            RECORD.write_text(json.dumps(wanted))
            _suggest(wanted["extras"])
    return code


def _complain(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


def _installed() -> dict[str, Any]:
    """Returns what was last installed in .venv, or an empty dict if nothing usable is there."""
    try:
        return json.loads(RECORD.read_text()) if PYTHON.exists() else {}
    except (OSError, ValueError):
        return {}


def _create_venv() -> int:
    # When this runs on the Python of a half-made .venv, that is about to be removed: use the one it came from.
    python = getattr(sys, "_base_executable", sys.executable)
    try:
        importlib.import_module("ensurepip")
    except ImportError:
        return _complain(
            f"{python} cannot create virtual environments, because its module ensurepip is missing; install it "
            "(Debian and Ubuntu: apt install python3-venv) or name another Python: make train PYTHON=python3.12"
        )
    print("Creating .venv with Python {}.{} ...".format(*sys.version_info), flush=True)
    command = [python, "-m", "venv", "--clear", str(VENV)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        return _complain(f"cannot create {VENV}: {' '.join(done.stdout.split())}")
    return 0


def _install(extras: list[str]) -> int:
    log_name = LOG.relative_to(ROOT)
    print(f"Installing JAX and what else PiperJAX needs (minutes, once; log in {log_name}) ...", flush=True)
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    project = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    command += ["--constraint", str(ROOT / "constraints.txt"), "--editable", project]
    with LOG.open("w") as log:
        pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        errors = _show_progress(pip.stdout, log, terminal=sys.stdout.isatty())
        code = pip.wait()
    if code:
        return _complain(f"pip could not install PiperJAX: {errors}; all of its output is in {log_name}")
    return 0


def _suggest(extras: list[str]) -> None:
    """Tells once how to use the GPUs that seem to be there."""
    for tool, extra in TOOLS.items():
        if shutil.which(tool) and not set(extras) & set(TOOLS.values()):
            print(f"Installed for the CPU; {tool} is here, so `make train EXTRA={extra}` may train on GPUs.")


def _show_progress(lines: Iterable[str], log: TextIO, *, terminal: bool) -> str:
    """Copies pip's output to the log and its news to one changing line, or without a terminal the large downloads.

    Returns:
      pip's errors as one text.
    """
    errors, count = [], 0
    for line in lines:
        log.write(line)
        if line.startswith("ERROR:"):
            errors.append(line.removeprefix("ERROR:").strip())
        count += line.startswith("Collecting")
        news, megabytes = _news(line.split(), count)
        if news and terminal:
            print(f"\r  {news[:76]:76}", end="", flush=True)
        elif megabytes >= LARGE_MEGABYTES:
            print(f"  {news}", flush=True)
    if terminal:
        print("\r" + " " * 78, end="\r")
    return " ".join(errors[:2]) or "it gave no reason"


def _news(words: list[str], count: int) -> tuple[str, float]:
    """Returns what a line of pip's output tells someone who waits, if anything, and the size of a download in MB."""
    match words:
        case ["Collecting", requirement, *_]:
            return f"package {count}: {requirement}", 0
        case ["Downloading", file, size, unit]:
            name = file.rsplit("/", 1)[-1].split("-")[0]
            megabytes = float(size.lstrip("(")) if unit == "MB)" else 0
            return f"package {count}: {name} {size} {unit}", megabytes
        case ["Installing", "collected", "packages:", *packages]:
            return f"unpacking {len(packages)} packages", 0
        case _:
            return "", 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
