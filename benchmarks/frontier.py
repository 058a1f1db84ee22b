"""Published rows of Frontier: single layers, models whose parallelism is not published, and what ran out of memory.

Where a row does not say how the devices were divided, two answers must reach what was published and should not exceed
it by more than half: the best division of the devices for the framework that ran, and our planner's best plan for our
own executor, which pads what it sends. Its schedules are better than Piper's, and exceeding Piper by more than half
for that is no error of the time model; so beside that plan stands the best that has no other means than Piper's.
The authors of X-MoE published the scripts of their runs, so these are priced as they were; what our planner finds for
these models stands beside them, and is not judged.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.frameworks import Run, predict
from benchmarks.frontier_layers import profiled_layer
from benchmarks.frontier_runs import (
    SCRIPTS,
    SEQUENCES,
    SYSTEMS,
    Script,
    System,
    counted_flop,
    counted_layer_flop,
    moe_bytes_per_token,
    moe_layer,
    needed_bytes,
)
from benchmarks.record import UnknownRowError, model_of, platform_of, positive, whole
from benchmarks.records import is_of_frontier
from meshes.axes import divisors
from models.config import ModelConfig
from models.cost import flop_per_token
from piperjax.planner.candidates import Question
from piperjax.planner.dispatchers import DISPATCHERS, Way
from piperjax.planner.layer_time import layer_seconds
from piperjax.planner.search import answer

# Tokens per device of the single layers, which are not published.
SINGLE_LAYER_TOKENS = 16_384
# Sequences of a step where they are not published; those of X-MoE are.
GLOBAL_BATCH = 1_024
# In weak scaling a device has as much to do in every run, so sequences grow with devices; the largest run, on 1,024,
# is taken to have as many as others.
WEAK_SEQUENCES_PER_DEVICE = GLOBAL_BATCH // 1_024
OWN, OWN_LIKE_PIPER, OWN_BESIDE = "own planner", "own, as Piper", "own, beside"
FORWARD = "forward"
# 1F1B of one stage a rank, and nothing beside anything else (sections 4 and 5 of the paper).
MEANS_OF_PIPER = {"schedule": "one_f_one_b", "overlap": False, "dispatch_chunks": 1}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row of Frontier beside its prediction.

    Attributes:
      label: what was run.
      kind: "layer", "known plan", "best division", "own planner", "own, as Piper" (our planner with Piper's means),
        "own, beside" (our planner where a plan is known), "memory" (GiB a layer keeps), "fits" or "forward"
        (milliseconds of a layer).
      published, predicted: in the unit of the row; for "fits" 1 if it ran, 0 if it ran out of memory.
      note: the plan that was found, or bytes.
    """

    label: str
    kind: str
    published: float
    predicted: float
    note: str = ""

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted / self.published if self.published else 1.0 + self.predicted

    @property
    def is_judged(self) -> bool:
        """Whether there is a bar for such a row: our planner may be better than a plan that is known.

        Profiles are judged together.
        """
        return self.kind not in (OWN_BESIDE, FORWARD)

    @property
    def is_met(self) -> bool:
        """Whether the bar for this kind of row is met."""
        if self.kind == "fits":
            return self.published == self.predicted
        if self.kind in ("best division", OWN, OWN_LIKE_PIPER):
            return 1.0 <= self.ratio <= 1.5
        return abs(self.ratio - 1) <= 0.2


def outcomes(row: Mapping[str, Any]) -> Iterator[Outcome]:
    """What a row of Piper or X-MoE says, beside what is predicted.

    Raises:
      UnknownRowError: if it is none of those, or says too little.
    """
    name = str(row.get("model", ""))
    if not is_of_frontier(str(row.get("src") or "")):
        raise UnknownRowError("not a form of measurement with known parallelism")
    row = _checked(row)
    if "forward_ms" in row:
        yield Outcome(kind=FORWARD, **profiled_layer(row)._asdict())
        return
    if name.startswith("piper-weak"):
        row = {"gbs": WEAK_SEQUENCES_PER_DEVICE * row.get("gpus", 0) or None} | row
        name = {"E16": "weak_110b", "E128": "weak_862b", "E256": "weak_1_7t"}.get(
            name.rsplit(maxsplit=1)[-1], name
        )
    model, strategy = model_of(name), row.get("strategy", "Piper")
    if "peak_gb_without_ssmb" in row:
        raise UnknownRowError("read off a figure, of an unpublished number of layers")
    if strategy not in SYSTEMS:
        raise UnknownRowError(f"framework {strategy!r} is not described")
    system, label = SYSTEMS[strategy], f"{strategy} {name}"
    if "activation_per_moe_layer_gb" in row:
        if name not in SEQUENCES:
            raise UnknownRowError(f"the tokens of a device are not published for {name!r}")
        kept = SEQUENCES[name] * moe_bytes_per_token(model, system, SEQUENCES[name]) / 2**30
        yield Outcome(
            label=label, kind="memory", published=row["activation_per_moe_layer_gb"], predicted=kept
        )
    elif str(row.get("scope", "")).startswith("single layer"):
        yield _single_layer(model, row, label)
    else:
        yield from _whole_models(model, row, system)


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says, without nulls; its numbers are such that make sense."""
    row = {name: value for name, value in row.items() if value is not None}
    row |= {count: whole(row, count) for count in ("gpus", "seq", "gbs") if count in row}
    for measured in ("tflops", "activation_per_moe_layer_gb"):
        if measured in row:
            positive(measured, row[measured])
    if not isinstance(row.get("strategy", "Piper"), str):
        raise UnknownRowError(f"framework {row['strategy']!r} is not described")
    if row.get("recompute") not in (None, "none", "full"):
        raise UnknownRowError(f"recomputation {row['recompute']!r} is not described; there are none and full")
    return row


def _whole_models(model: ModelConfig, row: Mapping[str, Any], system: System) -> Iterator[Outcome]:
    """Whether a model fits, and how fast it is."""
    name, strategy, devices = row["model"], row.get("strategy", "Piper"), row.get("gpus")
    seq_len = row.get("seq") or SEQUENCES.get(name, 4096)
    if devices and strategy != "Piper":
        yield _fits(model, row, system, devices, seq_len)
    if "tflops" not in row or strategy not in ("Piper", "X-MoE"):
        return
    script = SCRIPTS.get((strategy, name, devices))
    # A row that names other sequences or recomputation is of another run.
    if script and not row.keys() & {"seq", "recompute"}:
        yield _known_plan(model, row, system, script)
        yield _own_plan(model, row, devices, seq_len, kind=OWN_BESIDE)
        return
    yield _best_division(model, row, system, seq_len)
    if devices:
        yield _own_plan(model, row, devices, seq_len)
        if strategy == "Piper":
            yield _own_plan(model, row, devices, seq_len, kind=OWN_LIKE_PIPER, wished=MEANS_OF_PIPER)


def _single_layer(model: ModelConfig, row: Mapping[str, Any], label: str) -> Outcome:
    platform, tokens = platform_of(row["hw"]), SINGLE_LAYER_TOKENS
    layer, devices = moe_layer(model), row["gpus"]
    if layer.ffn.num_experts % devices:
        raise UnknownRowError(f"{layer.ffn.num_experts} experts do not divide by {devices} devices")
    found = layer_seconds(
        model,
        layer,
        platform,
        tokens=tokens,
        seq_len=4096,
        expert_factors=platform.expert_factors(expert=devices, pipe=1, data=1),
        memory_mode="stash",
        rows="exact",
    )
    seconds = found.forward + found.backward + found.exchange_forward + found.exchange_backward
    flop = 3 * counted_layer_flop(model, layer, 4096) * tokens
    return Outcome(label=label, kind="layer", published=row["tflops"], predicted=flop / seconds / 1e12)


def _divisions(
    model: ModelConfig, row: Mapping[str, Any], system: System, devices: int, seq_len: int
) -> Iterator[Run]:
    """Every way to run the model on the devices."""
    recompute = row.get("recompute")
    modes = {"none": ("stash",), "full": ("layer",)}.get(recompute, ("stash", "layer"))
    batch = row.get("gbs") or -(-GLOBAL_BATCH // devices) * devices
    for pipe, tensor, microbatch, mode in product(
        divisors(devices), (1, 2, 4, 8), (1, 2, 4), modes if system.recomputes else ("stash",)
    ):
        if (pipe > 1 and not system.pipelines) or pipe > model.num_layers or tensor > system.tensor:
            continue
        for expert in divisors(model.num_experts):
            if not system.replicates and pipe * expert != devices:
                continue
            try:
                yield Run(
                    model=model,
                    platform=platform_of(row["hw"]),
                    software=system.software,
                    devices=devices,
                    tensor=tensor,
                    pipe=pipe,
                    expert=expert,
                    microbatch=microbatch,
                    global_batch=batch,
                    seq_len=seq_len,
                    memory_mode=mode,
                )
            except ValueError:
                continue


def _fits(model: ModelConfig, row: Mapping[str, Any], system: System, devices: int, seq_len: int) -> Outcome:
    """Whether the most economical division fits; the row says whether it did."""
    row = {"gbs": GLOBAL_BATCH, **row}
    runs = list(_divisions(model, row, system, devices, seq_len))
    if not runs:
        raise UnknownRowError(f"nothing divides {devices} devices for {row['strategy']}")
    least = min(needed_bytes(model, system, run) for run in runs)
    return Outcome(
        label=f"{row['strategy']} {row['model']} {devices} devices",
        kind="fits",
        published=float(not row.get("oom")),
        predicted=float(least <= runs[0].platform.device.memory_bytes),
        note=f"{least / 2**30:.1f} GiB",
    )


def _known_plan(model: ModelConfig, row: Mapping[str, Any], system: System, script: Script) -> Outcome:
    """A run as its script has it."""
    run = script.run(model, row, system)
    return Outcome(
        label=f"{row['strategy']} {row['model']} {row['gpus']} devices",
        kind="known plan",
        published=row["tflops"],
        predicted=_counted(run),
        note=f"expert {run.expert}, tensor {run.tensor}, {run.microbatch} of {run.global_batch} sequences, "
        f"{run.memory_mode}",
    )


def _counted(run: Run) -> float:
    """TFLOP/s of a device, as they are counted."""
    return predict(run).tokens_per_second * counted_flop(run.model, run.seq_len) / 1e12


def _best_division(model: ModelConfig, row: Mapping[str, Any], system: System, seq_len: int) -> Outcome:
    """The quickest division that fits; on the fewest devices that allow one where the row does not say how many."""
    numbers = [row["gpus"]] if row.get("gpus") else [2**i for i in range(3, 12)]
    for devices in numbers:
        runs = [
            run
            for run in _divisions(model, row, system, devices, seq_len)
            if needed_bytes(model, system, run) <= run.platform.device.memory_bytes
        ]
        if runs:
            best = max(runs, key=_counted)
            break
    else:
        raise UnknownRowError(f"no division fits for {row.get('strategy', 'Piper')}")
    mode = "recomputing" if best.memory_mode == "layer" else "keeping everything"
    return Outcome(
        label=f"{row.get('strategy', 'Piper')} {row['model']} {devices} devices",
        kind="best division",
        published=row["tflops"],
        predicted=_counted(best),
        note=f"pipe {best.pipe}, expert {best.expert}, tensor {best.tensor}, {best.microbatch} sequences, {mode}",
    )


def _own_plan(
    model: ModelConfig,
    row: Mapping[str, Any],
    devices: int,
    seq_len: int,
    *,
    kind: str = OWN,
    wished: Mapping[str, Any] | None = None,
) -> Outcome:
    """What `python -m piperjax plan` prints; it drops nothing."""
    label = f"{row.get('strategy', 'Piper')} {row['model']} {devices} devices"
    batch = row.get("gbs") or -(-GLOBAL_BATCH // devices) * devices
    question = Question(
        model=model,
        platform=platform_of(row["hw"]),
        num_devices=devices,
        batch_size=batch,
        seq_len=seq_len,
        wished=wished or {},
        dispatchers=tuple(DISPATCHERS),
    )
    try:
        best = answer(question, keep=1, advise=False).best
    except ValueError as error:
        note = str(error).partition(";")[0]
        return Outcome(label=label, kind=kind, published=row["tflops"], predicted=0.0, note=note)
    plan = best.plan
    counted = counted_flop(model, seq_len) / flop_per_token(model, seq_len).step
    rest = {"passes": "the rest in later passes", "drop": "the rest dropped"}[plan.overflow]
    limit = f", places for {plan.capacity_factor:g} of balanced rows, {rest}" if plan.capacity_factor else ""
    narrow = "" if plan.gradient_dtype == "float32" else f", gradients in {plan.gradient_dtype}"
    order = f"{plan.schedule}{' overlapped' if plan.overlap else ''}"
    return Outcome(
        label=label,
        kind=kind,
        published=row["tflops"],
        predicted=best.time.flop_per_second * counted / 1e12,
        note=f"pipe {plan.pipe}, expert {plan.expert}, {order}, {plan.memory_mode}, "
        f"{Way(plan.dispatch, plan.dispatch_chunks)}{limit}{narrow}",
    )
