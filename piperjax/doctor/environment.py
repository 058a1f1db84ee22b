"""This file is the machine as checks see it: a value, so that a test can make up any machine."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from meshes.platform import Platform, detect_platform
from piperjax.runtime.bounded_process import Ended
from piperjax.runtime.xla_flags import PLUGINS, Backend, detect_backend

# Starting JAX takes a second or two, all the GPUs of a busy node some tens; after this, something hangs.
DEVICES_SECONDS = 90

Run = Callable[[Sequence[str], Mapping[str, str], float], Ended]


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What JAX told of its devices, from a process of its own.

    Attributes:
      backend: "cpu", "cuda" or "rocm"; "" if it did not come so far.
      kinds: `device_kind` of each device of this process.
      memory_bytes: of the first device, None if it does not tell.
      exchange_seconds: of an all-to-all between two devices, compiled; None if there was none.
      problem: what went wrong, "" if nothing.
      warnings: lines that JAX printed meanwhile.
    """

    backend: str = ""
    kinds: tuple[str, ...] = ()
    memory_bytes: int | None = None
    exchange_seconds: float | None = None
    problem: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A machine, and the process that would train on it.

    Attributes:
      environ: environment variables.
      root: where the file system begins.
      python: version of Python.
      versions: of installed distributions, by name.
      requirements: what we need of them, such as {"jax": ">=0.10,<0.13", "python": ">=3.11"}.
      hostname: of this machine.
      addresses: what it resolves to, () if to nothing; None if nobody answered in time.
      limits: soft limits by name, "nofile" and "memlock"; None is unlimited.
      cpus: numbers of those that this process may run on.
      out: where checkpoints will be.
      may_write: whether this user may write there, or make it.
      free_bytes: bytes free there, and in /dev/shm, by path; None if nobody answered.
      memory_bytes: of the host, or of the container if that is less; None if unknown.
      expected: the platform that was named, None if it is to be recognised.
      run: runs a command with environment variables and a limit in seconds.
    """

    environ: Mapping[str, str] = field(default_factory=dict)
    root: Path = Path("/")
    python: tuple[int, ...] = (3, 11)
    versions: Mapping[str, str] = field(default_factory=dict)
    requirements: Mapping[str, str] = field(default_factory=dict)
    hostname: str = "localhost"
    addresses: tuple[str, ...] | None = ()
    limits: Mapping[str, int | None] = field(default_factory=dict)
    cpus: frozenset[int] = frozenset()
    out: Path = Path("runs")
    may_write: bool = True
    free_bytes: Mapping[str, int | None] = field(default_factory=dict)
    memory_bytes: int | None = None
    expected: Platform | None = None
    run: Run

    @cached_property
    def backend(self) -> Backend:
        """What JAX would start, by its plugins and device files."""
        return detect_backend(self.environ, self.versions, self.root)

    @cached_property
    def has_gpu(self) -> bool:
        """Whether there is a GPU and a plugin for it, be it hidden by JAX_PLATFORMS."""
        return detect_backend({}, self.versions, self.root) != "cpu"

    @cached_property
    def plugin(self) -> str:
        """Name of the installed plugin that gives JAX a GPU, "" if there is none."""
        return next((name for names in PLUGINS.values() for name in names if name in self.versions), "")

    @cached_property
    def devices(self) -> Devices:
        """Starts JAX in a process of its own, once."""
        command = [sys.executable, "-m", "piperjax.runtime.device_probe"]
        # Wherever we were started: the process must find these very modules.
        source = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [source, self.environ.get("PYTHONPATH", "")]))
        # Memory is left to whoever else is on the devices.
        more = {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        ended = self.run(command, {**self.environ, **more}, DEVICES_SECONDS)
        return read_devices(ended)

    @cached_property
    def platform(self) -> Platform | None:
        """The platform that was named, or that the devices are recognised by; None for a CPU or an unknown device."""
        if self.expected is not None:
            return self.expected
        if not self.devices.kinds or self.devices.backend == "cpu":
            return None
        count = len(self.devices.kinds)
        found = detect_platform("gpu", self.devices.kinds[0], num_devices=count, devices_per_process=count)
        return None if found.name == "generic" else found

    @cached_property
    def num_nodes(self) -> int:
        """Nodes of the SLURM job, 1 outside one."""
        return self.number("SLURM_JOB_NUM_NODES") or self.number("SLURM_NNODES") or 1

    def number(self, name: str) -> int | None:
        """Returns a variable that is a whole number, None if it is not."""
        text = self.environ.get(name, "")
        return int(text) if text.isdigit() else None

    def text(self, path: str) -> str:
        """Returns what is in a small file below the root, "" if it cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def names(self, path: str) -> list[str]:
        """Returns the names in a folder below the root, [] if it cannot be listed."""
        try:
            return sorted(entry.name for entry in (self.root / path).iterdir())
        except OSError:
            return []

    def library(self, *names: str) -> Path | None:
        """Returns the first shared library that begins with one of `names` where the linker or ROCm has libraries."""
        folders = [Path(entry) for entry in self.environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
        rocm = self.environ.get("ROCM_PATH")
        folders += [Path(rocm) / "lib"] if rocm else []
        folders += [
            Path("/opt/rocm/lib"),
            Path("/usr/lib/x86_64-linux-gnu"),
            Path("/usr/lib64"),
            Path("/usr/lib"),
        ]
        for folder in folders:
            inside = self.root / folder.relative_to("/") if folder.is_absolute() else folder
            for name in names:
                found = sorted(inside.glob(f"{name}*")) if inside.is_dir() else []
                if found:
                    return found[0]
        return None


def read_devices(ended: Ended) -> Devices:
    """Returns what `piperjax.runtime.device_probe` printed: one JSON object per line, each adding to the last."""
    told: dict = {}
    for line in ended.stdout.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            told |= value
    noise = tuple(line.strip() for line in ended.stderr.splitlines() if line.strip())
    problem = str(told.get("problem", ""))
    if not problem and ended.returncode is None:
        where = "while two devices exchanged data" if told.get("kinds") else "while JAX started its devices"
        problem = f"nothing happened for {DEVICES_SECONDS} s {where}"
    elif not problem and ended.returncode != 0:
        problem = noise[-1] if noise else f"the process ended with code {ended.returncode}"
    return Devices(
        backend=str(told.get("backend", "")),
        kinds=tuple(map(str, told.get("kinds", ()))),
        memory_bytes=told.get("memory_bytes"),
        exchange_seconds=told.get("exchange_seconds"),
        problem=" ".join(problem.split())[:300],
        warnings=noise,
    )
