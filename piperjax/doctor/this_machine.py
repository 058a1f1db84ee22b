"""This file is this machine and process, gathered into an Environment; nothing here waits for long."""

import os
import platform
import re
import socket
import threading
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from meshes.platform import Platform
from piperjax.doctor.environment import Environment
from piperjax.doctor.software import PACKAGES
from piperjax.runtime.bounded_process import run_bounded
from piperjax.runtime.host_memory import host_memory_bytes
from piperjax.runtime.xla_flags import PLUGINS

ROOT = Path(__file__).parents[2]
# Name servers and network file systems that do not answer.
ANSWER_SECONDS = 5


def this_machine(*, out: Path, expected: Platform | None = None) -> Environment:
    """Returns the machine that we run on.

    Args:
      out: where checkpoints will be; it need not exist.
      expected: the platform that the user named.
    """
    hostname = socket.gethostname()
    return Environment(
        environ=dict(os.environ),
        python=tuple(map(int, re.findall(r"\d+", platform.python_version())))[:3],
        versions=_versions(),
        requirements=_requirements(),
        hostname=hostname,
        addresses=_in_time(lambda: _addresses(hostname)),
        limits=_limits(),
        cpus=frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset(),
        out=out,
        may_write=_in_time(lambda: os.access(_existing(out), os.W_OK | os.X_OK)) is not False,
        free_bytes={
            str(path): _in_time(lambda path=path: _free_bytes(path)) for path in (out, Path("/dev/shm"))
        },
        memory_bytes=host_memory_bytes(),
        expected=expected,
        run=lambda command, environ, seconds: run_bounded(command, environ=environ, limit_seconds=seconds),
    )


def _in_time(ask: Callable[[], Any]) -> Any:
    """Returns the answer, None if there is none in time; the thread that waits for it is left behind."""
    answers: list[Any] = []

    def wait() -> None:
        try:
            answers.append(ask())
        except OSError:
            answers.append(None)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] if answers else None


def _addresses(hostname: str) -> tuple[str, ...]:
    try:
        found = socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


def _free_bytes(path: Path) -> int:
    """Bytes free to us where `path` is, or will be."""
    stats = os.statvfs(_existing(path))
    return stats.f_bavail * stats.f_frsize


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _limits() -> dict[str, int | None]:
    try:
        import resource
    except ImportError:  # Not on every operating system.
        return {}
    names = {"nofile": resource.RLIMIT_NOFILE, "memlock": getattr(resource, "RLIMIT_MEMLOCK", None)}
    soft = {name: resource.getrlimit(which)[0] for name, which in names.items() if which is not None}
    return {name: None if value == resource.RLIM_INFINITY else value for name, value in soft.items()}


def _versions() -> dict[str, str]:
    plugins = [name for names in PLUGINS.values() for name in names]
    halves = [name.replace("-plugin", "-pjrt") for name in plugins]
    found = {}
    for name in (*PACKAGES, *plugins, *halves, "tensorflow", "tensorflow-rocm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _requirements() -> dict[str, str]:
    """What pyproject.toml beside the sources asks for, or what was installed says."""
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return read_requirements(project["requires-python"], project["dependencies"])
    except (OSError, ValueError, KeyError):
        pass
    try:
        about = metadata.metadata("piperjax")
    except metadata.PackageNotFoundError:
        return {}
    return read_requirements(about.get("Requires-Python") or "", metadata.requires("piperjax") or [])


def read_requirements(python: str, dependencies: list[str]) -> dict[str, str]:
    """Returns ranges by distribution, and under "python"; dependencies of extras are left out."""
    found = {"python": python}
    for line in dependencies:
        match = re.match(r"([A-Za-z0-9._-]+)\s*([^;]*)", line)
        if match and "extra" not in line:
            found[match[1].lower()] = match[2].strip(" ()")
    return found
