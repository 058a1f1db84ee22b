"""Steps that nobody chose: random plans for scaled models, predicted and compiled, and how far apart that is.

python -m benchmarks.memory --random 100 --seed 7            compiles them, writes benchmarks/results/memory_random.csv
python -m benchmarks.memory --random 100 --seed 7 --reuse    predicts again beside the compiled bytes of that table
"""

import csv
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

from benchmarks.memory_cases import COLUMNS, Case, case, scaled
from models.presets import PRESETS
from piperjax.planner.dispatchers import DISPATCHERS
from piperjax.planner.plan import MEMORY_MODES
from piperjax.schedules import registry

TABLE = Path(__file__).resolve().parent / "results" / "memory_random.csv"
FIELDS = (
    "seed",
    "number",
    *COLUMNS,
    "d_model",
    "vocabulary size",
    "compiled_bytes",
    "predicted_bytes",
    "error",
)
MOST_DEVICES = 32
# `auto` searches for a schedule, which takes longer than to compile a step.
SCHEDULES = tuple(name for name in registry.names() if name != "auto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One random step: its place in the sequence of a seed, and bytes per device."""

    number: int
    one: Case
    compiled: int
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over compiled bytes, minus one."""
        return self.predicted / self.compiled - 1


def random_case(seed: int, number: int) -> Case:
    """The step of that number in the sequence of a seed: the first valid one that is drawn."""
    rng = random.Random(f"{seed}/{number}")
    while True:
        try:
            drawn = _draw(rng)
            drawn.model.check_trainable()
        except ValueError:  # A plan says itself what cannot be.
            continue
        return drawn


def _draw(rng: random.Random) -> Case:
    pipe, data, expert = rng.choice((1, 1, 2, 2, 3, 4)), rng.choice((1, 1, 2, 4)), rng.choice((1, 2, 4, 8))
    if pipe * data * expert > MOST_DEVICES:
        raise ValueError(f"more than {MOST_DEVICES} devices")
    schedule = rng.choice(SCHEDULES)
    takes_chunks = registry.ENTRIES[schedule].takes_chunks
    num_chunks = rng.choice((2, 3)) if takes_chunks and pipe > 1 else 0
    num_stages = pipe * registry.chunks_of(schedule, num_chunks)
    layers_per_stage = tuple(
        rng.choice(((1,), (2,), (3,), (1, 2), (1, 3))[:: rng.choice((1, -1))]) * num_stages
    )
    layers_per_stage = layers_per_stage[:num_stages]
    model = _model(rng, sum(layers_per_stage))
    if model.num_layers != sum(layers_per_stage):
        raise ValueError(f"{model.name} has too few layers")
    node = rng.choice([size for size in (1, 2, 4) if expert % size == 0])
    capacity = rng.choice((0, 0, 0, 1.0, 1.25, 2.0))
    return case(
        model,
        (pipe, data, expert),
        schedule=schedule,
        num_chunks=num_chunks,
        layers_per_stage=layers_per_stage,
        memory_mode=rng.choice(MEMORY_MODES),
        vocabulary=rng.choice(("split", "split", "whole")),
        overlap=rng.random() < 0.15,
        expert_factors=(1, node, expert // node),
        dispatch=rng.choice(("flat", "flat", "flat", *DISPATCHERS)),
        dispatch_chunks=rng.choice((1, 1, 1, 2, 4)),
        capacity_factor=capacity,
        overflow=rng.choice(("drop", "passes")) if capacity else "drop",
        dtype=rng.choice(("float32", "bfloat16")),
        num_microbatches=pipe * rng.choice((1, 2, 3, 4)) + rng.choice((0, 0, 1)),
        sequences=rng.choice((1, 2, 3, 4)),
        seq_len=rng.choice((64, 96, 128, 192, 256, 384, 768, 1024)),
    )


def _model(rng: random.Random, num_layers: int):
    return scaled(
        rng.choice(tuple(PRESETS)),
        d_model=rng.choice((192, 256, 320, 384)),
        num_layers=num_layers,
        num_experts=rng.choice((8, 16, 32)),
        vocab_size=rng.choice((512, 2048, 5000, 16_384)),
        embeddings=rng.choice(("untied", "untied", "tied")),
    )


def run(
    count: int,
    seed: int,
    *,
    known: dict[int, int],
    compiled_bytes: Callable[[Case], int],
    predicted_bytes: Callable[[Case], float],
) -> list[Row]:
    """Compiles and predicts the first `count` steps of a seed, except of which compiled bytes are known by number."""
    rows = []
    for number in range(count):
        one = random_case(seed, number)
        compiled = known.get(number) or compiled_bytes(one)
        rows.append(Row(number=number, one=one, compiled=compiled, predicted=predicted_bytes(one)))
        print(f"{number:4} {rows[-1].error:+7.1%} {compiled / 2**20:9.2f} MiB  {_described(one)}", flush=True)
    return rows


def _described(one: Case) -> str:
    return f"{' '.join(one.key)} d_model {one.model.d_model} vocabulary {one.model.vocab_size}"


def summary(rows: list[Row], *, under: float, over: float) -> str:
    """How far predictions are from what was compiled."""
    errors = sorted(row.error for row in rows)
    inside = sum(under <= error <= over for error in errors)
    low = sum(error < under for error in errors)
    return (
        f"{len(errors)} random steps: mean absolute error {sum(map(abs, errors)) / len(errors):.1%}, median "
        f"{errors[len(errors) // 2]:+.1%}, worst {errors[0]:+.1%} and {errors[-1]:+.1%}; {inside / len(errors):.0%} "
        f"within {under:+.0%} to {over:+.0%}, {low} below, {len(errors) - inside - low} above"
    )


def read_table(seed: int) -> dict[int, int]:
    """Compiled bytes of the committed table by number, of a seed."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="", encoding="utf-8") as file:
        return {
            int(row["number"]): int(row["compiled_bytes"])
            for row in csv.DictReader(file)
            if int(row["seed"]) == seed
        }


def write_table(rows: list[Row], seed: int) -> None:
    """Writes one line per step."""
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for row in rows:
            numbers = (row.compiled, round(row.predicted), f"{row.error:.4f}")
            model = row.one.model
            writer.writerow([seed, row.number, *row.one.key, model.d_model, model.vocab_size, *numbers])
