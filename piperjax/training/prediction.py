"""This file is what the planner expects of a run, and how the run compares: seconds of a step, memory of a device."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from meshes.platform import Platform
from piperjax.planner.backends import installed_cpu
from piperjax.planner.explain import PART_WORDS
from piperjax.planner.memory import estimate_memory
from piperjax.planner.remedies import WORDS
from piperjax.planner.timing import Conditions, estimate_time
from piperjax.training.compile_check import Comparison
from piperjax.training.config import TrainConfig
from piperjax.training.metrics import gib, si

# The step that an estimate is compared with is the median of at least so many.
FEWEST_STEPS = 3
# Parts of a step or of memory that are named in a line.
NAMED_PARTS = 3
# Kinds of collectives that are named.
SENT_KINDS = 6


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is expected of a plan on a platform.

    Attributes:
      memory_bytes: by term, of the pipe rank that needs most.
      capacity_bytes: memory of a device; None where it is not known.
      step_seconds: one step; None where the platform does not say how fast it is, as are the next two.
      uncertainty_fraction: how far off `step_seconds` may be.
      parts: seconds by what they are spent on.
      notes: reservations about the seconds.
    """

    memory_bytes: Mapping[str, float]
    capacity_bytes: float | None = None
    step_seconds: float | None = None
    uncertainty_fraction: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> float:
        """Memory of the pipe rank that needs most."""
        return sum(self.memory_bytes.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for run.json."""
        return asdict(self)

    def memory_line(self) -> str:
        """What a device needs: "1.2 GiB of 16.0 GiB predicted in all, activations in flight 0.7 GiB, ..."."""
        capacity = f" of {gib(self.capacity_bytes)}" if self.capacity_bytes else ""
        return f"{gib(self.total_bytes)}{capacity} predicted in all, {_largest(self.memory_bytes, gib)}"

    def time_line(self) -> str:
        """How long a step takes and on what it is spent; "" where the platform says too little."""
        if self.step_seconds is None:
            return ""
        seconds = _largest(self.parts, lambda part: f"{part / self.step_seconds:.0%}")
        text = f"{self.step_seconds:.3g} s a step predicted, give or take {self.uncertainty_fraction:.0%}: {seconds}"
        return "; ".join([text, *self.notes])


def _largest(parts: Mapping[str, float], show: Callable[[float], str]) -> str:
    """The largest parts: "compute 70%, bubble 20%"."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])[:NAMED_PARTS]
    words = PART_WORDS | WORDS
    return ", ".join(f"{words.get(name, name)} {show(value)}" for name, value in ordered if value)


def predict(config: TrainConfig, platform: Platform, *, backend: str) -> Prediction:
    """Returns what is expected of a run.

    Args:
      config: with a plan.
      platform: the machine.
      backend: "cpu" or "gpu": what the step is compiled for.
    """
    model, plan, device = config.model, config.plan, platform.device
    ranks = estimate_memory(
        model,
        plan,
        dtype=config.dtype,
        backend=installed_cpu() if backend == "cpu" else "gpu",
        reserve_bytes=device.reserve_bytes,
    )
    fullest = max(ranks, key=lambda rank: rank.total)
    seconds: dict[str, Any] = {}
    if platform.rated(config.dtype):
        time = estimate_time(model, plan, platform, Conditions(dtype=config.dtype))
        seconds = {
            "step_seconds": time.step_seconds,
            "uncertainty_fraction": time.uncertainty_fraction,
            "parts": dict(time.parts),
            "notes": time.notes,
        }
    return Prediction(memory_bytes=dict(fullest.terms), capacity_bytes=device.memory_bytes, **seconds)


def compiled_lines(found: Comparison) -> str:
    """Returns what the compiler made of the step beside what was predicted, per device, in a few lines."""
    terms = found.predicted.terms
    lasting = {name: terms[name] for name in found.state_bytes}
    predicted = {
        **lasting,
        "temporaries": found.predicted.total - found.predicted.reserve - sum(lasting.values()),
    }
    compiled = {**found.state_bytes, "temporaries": found.memory.temporaries}
    classes = ", ".join(f"{name} {gib(predicted[name])} and {gib(compiled[name])}" for name in compiled)
    totals = f"{gib(sum(predicted.values()))} predicted, {gib(found.memory.total)} compiled"
    lines = [f"compiled  memory per device {totals} ({found.memory_error:+.1%}): {classes}"]
    if found.work is not None:
        error = f" ({found.predicted_flop / found.work.flop - 1:+.1%})" if found.work.flop else ""
        lines.append(
            f"FLOP of products {si(found.predicted_flop)} predicted, {si(found.work.flop)} compiled{error}"
        )
        sent = sorted(found.work.sent_bytes.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{axes} {operation} {gib(size)}" for (axes, operation), size in sent[:SENT_KINDS])
        lines += [f"sent in a step: {listed}"] if listed else []
    return f"\n{'':10}".join(lines)


def verdict(prediction: Prediction, measured_seconds: Sequence[float]) -> str | None:
    """Returns a sentence on how long steps took and were expected to take, None where there is too little to say.

    Args:
      prediction: what was expected.
      measured_seconds: of every step but the first.
    """
    if prediction.step_seconds is None or len(measured_seconds) < FEWEST_STEPS:
        return None
    measured = statistics.median(measured_seconds)
    ratio = measured / prediction.step_seconds
    within = abs(ratio - 1) <= prediction.uncertainty_fraction
    return (
        f"a step took {measured:.3g} s, the median of {len(measured_seconds)}, and {prediction.step_seconds:.3g} s was "
        f"predicted: {ratio:.2f} times as long, {'within' if within else 'outside'} the "
        f"{prediction.uncertainty_fraction:.0%} that the rates of the platform allow"
    )
