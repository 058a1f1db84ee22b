"""This file is what a run reports: one record per step, its printed line, the progress bar and metrics.jsonl."""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from piperjax.training.state import StepMetrics

Record = dict[str, Any]
METRICS_FILE = "metrics.jsonl"


# What a record calls rows beyond a capacity factor, by what becomes of them, and what a line calls them.
OVERFLOW_FIELDS = {"drop": "dropped_fraction", "passes": "later_fraction"}
OVERFLOW_WORDS = (("dropped", "dropped_fraction"), ("later", "later_fraction"))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step amounts to, to turn seconds into rates.

    Attributes:
      tokens: positions of a step over all devices.
      flop: model FLOP of a step over all devices, forward and backward, recomputation not counted.
      num_devices: devices of the mesh.
      peak_flop_per_second: matmul rate of one device in the run's dtype; 0 if the platform does not say.
      predicted_step_seconds: what the planner expects of a step; 0 if the platform says too little.
      overflow: what becomes of rows beyond a capacity factor, as in a plan.
      all_to_all_bytes: bytes of rows that a device sends to experts and back, by how far (`planner/sent_bytes.py`).
    """

    tokens: int
    flop: float
    num_devices: int
    peak_flop_per_second: float
    predicted_step_seconds: float = 0.0
    overflow: str = "drop"
    all_to_all_bytes: Mapping[str, float] = field(default_factory=dict)


def step_record(metrics: StepMetrics, *, step: int, step_seconds: float, work: Work) -> Record:
    """Returns the JSON record of one step.

    Rates are per second, of all devices for tokens and per device for FLOP. `load_imbalance` has one number
    per MoE layer: rows of the busiest expert over the mean.
    """
    load = np.asarray(metrics.load, np.float64)
    routed = load.sum()
    imbalance = load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9) if load.size else np.zeros(0)
    flop_per_second = work.flop / step_seconds / work.num_devices
    record = {
        "step": step,
        "loss": float(metrics.loss),
        "aux_loss": float(metrics.aux_loss),
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": float(metrics.learning_rate),
        "step_seconds": step_seconds,
        "tokens_per_second": work.tokens / step_seconds,
        "flop_per_second_per_device": flop_per_second,
        "load_imbalance": [round(float(value), 4) for value in imbalance],
        OVERFLOW_FIELDS[work.overflow]: float(metrics.overflow) / routed if routed else 0.0,
    }
    if work.all_to_all_bytes:
        record["all_to_all_bytes"] = dict(work.all_to_all_bytes)
    if work.predicted_step_seconds:
        record["predicted_step_seconds"] = work.predicted_step_seconds
    if work.peak_flop_per_second:
        record["mfu"] = flop_per_second / work.peak_flop_per_second
    if memory := peak_memory_bytes():
        record["peak_memory_bytes"] = memory
    return record


def peak_memory_bytes() -> int:
    """Returns the most memory that any local device has used so far, 0 where the backend does not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((entry.get("peak_bytes_in_use", 0) for entry in stats), default=0)


def step_line(record: Record, *, num_steps: int) -> str:
    """Returns the printed line of a step's record."""
    width = len(str(num_steps))
    parts = [
        f"step {record['step']:>{width}}/{num_steps}",
        f"loss {record['loss']:.4f}",
        f"aux {record['aux_loss']:.4f}",
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['learning_rate']:.2e}",
        _seconds(record),
        f"{si(record['tokens_per_second'])} tokens/s",
        f"{record['flop_per_second_per_device'] / 1e12:.3g} TFLOP/s/device",
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record["load_imbalance"]:
        parts.append(f"load {max(record['load_imbalance']):.2f}x mean")
        parts += [f"{word} {record[name]:.1%}" for word, name in OVERFLOW_WORDS if name in record]
    if sent := record.get("all_to_all_bytes"):
        parts.append("all-to-all " + ", ".join(f"{gib(sent[level])} {level}" for level in sent))
    if "peak_memory_bytes" in record:
        parts.append(f"memory {record['peak_memory_bytes'] / 2**30:.2f} GiB")
    return " | ".join(parts)


def _seconds(record: Record) -> str:
    predicted = record.get("predicted_step_seconds")
    return f"{record['step_seconds']:.3g} s" + (f" (predicted {predicted:.3g})" if predicted else "")


def validation_line(record: Record) -> str:
    """Returns the printed line of a validation record."""
    return (
        f"step {record['step']} validation loss {record['validation_loss']:.4f} "
        f"({record['bits_per_byte']:.3f} bits per byte; unigram entropy {record['unigram_entropy']:.4f})"
    )


def is_finite(metrics: StepMetrics) -> bool:
    """False if the loss or the gradients have overflowed."""
    return math.isfinite(float(metrics.loss)) and math.isfinite(float(metrics.grad_norm))


def si(value: float) -> str:
    """Returns three digits with a decimal unit: 12.3k, 4.56M."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def gib(num_bytes: float) -> str:
    """Returns a number of bytes for people."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


class MetricsFile:
    """metrics.jsonl: one record per step and per validation, in order, no step twice.

    Args:
      directory: run directory.
      resume_step: records of later steps are removed, because those steps will run again.
    """

    def __init__(self, directory: Path, *, resume_step: int):
        self._path = directory / METRICS_FILE
        kept = [record for record in read_metrics(directory) if record["step"] <= resume_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self._path)
        self._stream = self._path.open("a")

    def write(self, record: Record) -> None:
        """Appends a record, so that it is on its way to the disk when this returns."""
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def read_metrics(directory: Path | str) -> list[Record]:
    """Returns the records of a run, in order; a last line that was cut off by a crash is passed over."""
    path = Path(directory) / METRICS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] += 0
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is not a metrics record; move the file away") from None
        records.append(record)
    return records


class Printer:
    """Prints lines, and from the first step on a progress bar below them where there is a terminal.

    Args:
      mode: as `LogConfig.progress`.
      num_steps: length of the run.
      stream: where lines go; standard output by default. The bar goes to standard error.
    """

    def __init__(self, mode: str, *, num_steps: int, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._is_silent = mode == "none"
        self._has_bar = mode == "bar" or (mode == "auto" and sys.stderr.isatty())
        self._num_steps = num_steps
        self._bar: tqdm | None = None

    def line(self, text: str) -> None:
        """Prints a line."""
        if self._is_silent:
            return
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def advance(self, record: Record) -> None:
        """Moves the bar on by one step."""
        if not self._has_bar:
            return
        if self._bar is None:
            # Not before the first step, or the time to compile would count as time of steps.
            done = {"initial": record["step"] - 1, "total": self._num_steps}
            self._bar = tqdm(**done, unit="step", dynamic_ncols=True, leave=False)
        self._bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def load_table(records: Sequence[Record]) -> np.ndarray:
    """Returns `[steps, num_moe_layers]`: busiest expert over mean, for plots."""
    return np.array([record["load_imbalance"] for record in records if "load_imbalance" in record])
