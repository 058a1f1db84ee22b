"""This file is run.json: what a run was started with, and whether a checkpoint may go on under a configuration."""

import json
import os
import platform as host
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from piperjax.training.config import TrainConfig

RUN_FILE = "run.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# What a run must keep from its first step to its last; all else (mesh, schedule, steps, ...) may change on the way.
FIXED = (
    "model",
    "seed",
    "data.path",
    "data.tokenizer",
    "data.seq_len",
    "data.batch_size",
    "data.validation_fraction",
    "data.seed",
)

# What follows from other fields, or from where the directory lies, and would only lengthen the line.
_DERIVED = ("out", "plan.expert_factors", "plan.layers_per_stage")


def write_run_file(
    config: TrainConfig,
    *,
    platform: Mapping[str, Any],
    devices: Mapping[str, Any],
    prediction: Mapping[str, Any] | None = None,
) -> None:
    """Writes run.json into the run directory, whole or not at all.

    Args:
      config: the resolved configuration, plan included.
      platform: the machine description.
      devices: what the run found: backend, kind, number of devices and processes.
      prediction: what the planner expects of the plan: seconds and memory.
    """
    content = {
        "config": config.to_dict(),
        "platform": platform,
        "devices": devices,
        "prediction": prediction,
        "versions": {"python": host.python_version(), **_versions()},
        "git_commit": _git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    path = Path(config.out) / RUN_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, default=_plain) + "\n")
    os.replace(temporary, path)


def read_run_file(directory: Path | str) -> TrainConfig:
    """Returns the configuration of the run in a directory, with the directory itself as `out`.

    Raises:
      ValueError: if there is none, or it cannot be read.
    """
    path = Path(directory) / RUN_FILE
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{directory} is not the directory of a run, it has no {RUN_FILE}; "
            "give a directory that --out named before"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); repeat the command line that began the run"
        ) from None
    values = content.get("config") if isinstance(content, dict) else None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no configuration; repeat the command line that began the run")
    try:
        return TrainConfig.from_dict({**values, "out": str(directory)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_same_run(saved: Mapping[str, Any], config: TrainConfig, *, where: str) -> list[str]:
    """Compares the configuration in a checkpoint with the one asked for.

    Args:
      saved: `TrainConfig.to_dict` of the run that wrote the checkpoint.
      config: what is asked for now.
      where: the run directory, for the message.

    Returns:
      What else differs, for the log: "steps 300 -> 600".

    Raises:
      ValueError: if something differs that must stay; says what, and what to do.
    """
    differences = list(_differences(saved, json.loads(json.dumps(config.to_dict()))))
    for path, before, now in differences:
        if any(path == fixed or path.startswith((f"{fixed}.", f"{fixed}[")) for fixed in FIXED):
            raise ValueError(
                f"{where} holds a run in which {path} was {_short(before)}, but now it is {_short(now)}; "
                "choose another --out for a new run, or keep the old value to go on"
            )
    return [
        f"{path} {_short(before)} -> {_short(now)}"
        for path, before, now in differences
        if path not in _DERIVED
    ]


def _differences(before: Any, now: Any, path: str = "") -> Any:
    """Yields (dotted path, before, now) for every leaf that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif (
        path.startswith("model")
        and isinstance(before, list)
        and isinstance(now, list)
        and len(before) == len(now)
    ):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, f"{path}[{index}]")
    elif before != now:
        yield path, before, now


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str:
    """Returns the commit of the source tree, "" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
