"""Report: the answer of a search as text that people read, and as plain values for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from math import floor, inf, log10
from typing import Any

from models import cost
from models.config import LatentAttention
from piperjax.planner.candidates import Order, Question, Rejection
from piperjax.planner.dispatchers import Way
from piperjax.planner.explain import PART_WORDS, Explanation, Variation
from piperjax.planner.remedies import WORDS
from piperjax.planner.scoring import capacity_bytes
from piperjax.planner.search import Candidate, SearchResult
from piperjax.planner.timing import UNCERTAINTY

GIB = 2**30
BAR = 30
MOST_VARIATIONS_PER_CHOICE = 4
PLAN_COLUMNS = ("", "pipe", "data", "expert", "schedule", "microb.", "memory", "dispatch", "places", "vocab.")
PRICE_COLUMNS = ("step s", "tokens/s", "MFU", "bubble", "a2a", "+-", "slower by")


def order_of(candidate: Candidate) -> Order:
    """In which order the ranks of a plan work."""
    plan = candidate.plan
    return Order(plan.schedule, len(plan.layers_per_stage) // plan.pipe, plan.overlap)


def summary(one: Candidate) -> str:
    """A plan on its mesh in one line."""
    plan = one.plan
    return (
        f"{order_of(one)}, {plan.num_microbatches} microbatch{'es' * (plan.num_microbatches > 1)}, "
        f"memory mode {plan.memory_mode}, {one.peak_bytes / GIB:.1f} GiB"
    )


def headline(question: Question) -> str:
    """What was asked, in two lines."""
    model, platform = question.model, question.platform
    numbers = cost.parameters(model)
    wished = ", ".join(f"{name}={value}" for name, value in question.wished.items())
    return (
        f"{model.name} ({short(numbers.total)} parameters, {short(numbers.active)} active) on "
        f"{question.num_devices:,} devices of {platform.name}: {platform.description}\n"
        f"{question.batch_size:,} sequences x {question.seq_len:,} = {short(question.tokens_per_step)} tokens per "
        f"step, {question.dtype}, expert load {question.imbalance:g} x even"
        + (f"; given: {wished}" if wished else "")
    )


def table(result: SearchResult, *, top: int = 5) -> str:
    """The best plan of each of the best meshes."""
    rows = [list(columns(result.question))]
    for number, one in enumerate(result.ranked[:top], start=1):
        rows.append([str(number), *cells_of(one)])
    return _aligned(rows, left={4, 6, 7, 9})


def columns(question: Question) -> tuple[str, ...]:
    """Heads of the table of plans."""
    capacity = capacity_bytes(question)
    room = f"GiB of {capacity / GIB:.0f}" if capacity < inf else "GiB"
    return (*PLAN_COLUMNS, room, *PRICE_COLUMNS)


def cells_of(one: Candidate) -> list[str]:
    """What a table says of a plan, in the order of its columns."""
    plan, time = one.plan, one.time
    sizes = [str(plan.pipe), str(plan.data), str(plan.expert)]
    choices = [
        str(order_of(one)),
        str(plan.num_microbatches),
        plan.memory_mode,
        str(Way(plan.dispatch, plan.dispatch_chunks)),
        f"{plan.capacity_factor:g}" if plan.capacity_factor else "all",
        plan.vocabulary,
    ]
    rates = [f"{one.peak_bytes / GIB:.1f}", f"{time.step_seconds:.4g}", short(time.tokens_per_second)]
    shares = [share(time.mfu), share(time.bubble_fraction), share(time.all_to_all_fraction)]
    margin = f"{one.margin:.1%}" if one.margin else "-"
    return [*sizes, *choices, *rates, *shares, f"{time.uncertainty_fraction:.0%}", margin]


def details(candidate: Candidate, question: Question) -> str:
    """Where the bytes and the seconds of one plan are."""
    plan, memory = candidate.plan, max(candidate.memory, key=lambda rank: rank.total)
    layers = sorted(set(plan.layers_per_stage))
    per_stage = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
    sequences = plan.microbatch_size // (plan.data * plan.expert)
    lines = [
        f"{len(plan.layers_per_stage)} stages of {per_stage} layers; a microbatch is {sequences} "
        f"sequence{'s' * (sequences > 1)} on a device; experts as group x node x local = "
        + " x ".join(map(str, plan.expert_factors))
        + f"; gradients are added up in {plan.gradient_dtype}",
        "",
        f"memory of a device: {memory.total / GIB:.1f} GiB" + _of_capacity(question),
    ]
    terms = [(WORDS.get(name, name), size / GIB) for name, size in memory.terms.items() if size]
    lines += _bars(sorted(terms, key=lambda term: -term[1]), "GiB", total=memory.total / GIB)
    time = candidate.time
    lines += ["", f"time of a step: {time.step_seconds:.4g} s, +- {time.uncertainty_fraction:.0%}"]
    parts = [(PART_WORDS.get(name, name), seconds) for name, seconds in time.parts.items() if seconds]
    lines += _bars(sorted(parts, key=lambda part: -part[1]), "s", total=time.step_seconds)
    return "\n".join(lines)


def choices(found: Sequence[Variation]) -> str:
    """What the single choices of the best plan are worth."""
    if not found:
        return ""
    rows = [["choice", "instead", "step", "GiB", ""]]
    shown: dict[str, int] = {}
    for one in found:
        shown[one.choice] = shown.get(one.choice, 0) + 1
        if shown[one.choice] <= MOST_VARIATIONS_PER_CHOICE:
            fits = "" if one.fits else "does not fit"
            rows.append([one.choice, one.value, f"{one.slower:+.1%}", f"{one.num_bytes / GIB:.1f}", fits])
    return _aligned(rows, left={0, 1, 4})


def explained(explanation: Explanation) -> str:
    """Why a mesh lost, with the parts of a step side by side."""
    asked = ", ".join(f"{name}={value}" for name, value in explanation.asked.items())
    if explanation.candidate is None:
        return f"{asked}: {explanation.sentence}"
    one = explanation.candidate
    lines = [
        f"{asked}: {explanation.sentence}",
        f"  {one.mesh}, {summary(one)}",
    ]
    rows = [["part of a step", "best", "this", "difference"]]
    rows += [
        [PART_WORDS.get(name, name), f"{best:.4g} s", f"{this:.4g} s", difference(best, this)]
        for name, best, this in explanation.parts
    ]
    return "\n".join([*lines, _aligned(rows, left={0}, indent="  ")])


def rejected(result: SearchResult) -> str:
    """What was left out and why."""
    meshes = f"{result.num_meshes} mesh{'es' * (result.num_meshes != 1)}"
    line = f"{result.num_plans:,} plans on {meshes} were priced, {result.num_fit:,} fit."
    rows = [
        [f"{one.count:,} {counted(one)}", one.reason, f"such as {one.example}"] for one in result.rejected
    ]
    return f"{line} Left out:\n{_aligned(rows, left={1, 2}, indent='  ')}" if rows else line


def counted(one: Rejection) -> str:
    """Of what a rejection counts."""
    return {"meshes": "mesh", "plans": "plan"}[one.what] if one.count == 1 else one.what


def difference(best: float, this: float) -> str:
    """Seconds more or less, without the noise of sums."""
    return "0 s" if abs(this - best) <= 1e-9 * max(best, this) else f"{this - best:+.4g} s"


def notes(result: SearchResult) -> list[str]:
    """Reservations: where numbers come from, what is outside of what was measured, what cannot be run yet."""
    question, best = result.question, result.best
    device, found = question.platform.device, []
    sources = {link.name: link.provenance for link in question.platform.links}
    for name in ("matmul", "grouped_matmul", "attention"):
        if getattr(device, name) is not None:
            sources[name] = getattr(device, name).provenance
    by_source: dict[str, list[str]] = {}
    for name, source in sources.items():
        by_source.setdefault(source, []).append(name)
    listed = "; ".join(
        f"{source} (+- {UNCERTAINTY[source]:.0%}): {', '.join(names)}" for source, names in by_source.items()
    )
    found.append(f"rates of {question.platform.name} are {listed}")
    found += [f"extrapolated: {note}" for note in best.time.notes]
    factor = best.plan.capacity_factor
    if factor:
        chosen = "" if "capacity_factor" in question.wished else "quicker than buffers for any routing: "
        found.append(
            (
                "nothing fits with buffers for any routing, hence "
                if "capacity_factor" in result.given_up
                else chosen
            )
            + f"capacity factor {factor:g}: a device accepts {factor:g} times the balanced number of rows from "
            f"another, more {'are dropped' if best.plan.overflow == 'drop' else 'travel in later passes'}"
        )
    if best.plan.gradient_dtype != "float32":
        found.append(
            (
                "nothing fits with gradients added up in float32, hence "
                * ("gradient_dtype" in result.given_up)
            )
            + f"gradients in {best.plan.gradient_dtype}: of their sums over microbatches and devices 8 bits remain"
        )
    if any(isinstance(layer.attention, LatentAttention) for layer in question.model.layers):
        found.append(
            f"{question.model.name} has latent attention, which is priced but not yet a layer that trains"
        )
    if device.concurrent_devices is not None:
        found.append(
            f"devices of {question.platform.name} are simulated and share the cores of one host: a rank that idles "
            "leaves them to the others, so that a bubble costs little or nothing here, unlike on devices of their own"
        )
    if best.time.mfu is None:
        found.append("no MFU: the platform file gives no peak that one could be stated against")
    return found


def to_dict(
    result: SearchResult, explanations: Sequence[Explanation] = (), found: Sequence[Variation] = ()
) -> dict[str, Any]:
    """Plain values for JSON: seconds, bytes and fractions, with what is not known as null."""
    question = result.question
    return {
        "model": question.model.name,
        "platform": question.platform.name,
        "num_devices": question.num_devices,
        "batch_size": question.batch_size,
        "seq_len": question.seq_len,
        "dtype": question.dtype,
        "imbalance": question.imbalance,
        "wished": dict(question.wished),
        "capacity_bytes": question.platform.device.memory_bytes,
        "ranked": [_candidate_dict(one) for one in result.ranked],
        "pareto": [{"plan": result.scores.plan(one.row).to_dict(), **asdict(one)} for one in result.pareto],
        "rejected": [asdict(one) for one in result.rejected],
        "num_meshes": result.num_meshes,
        "num_plans": result.num_plans,
        "num_fit": result.num_fit,
        "given_up": list(result.given_up),
        "choices": [asdict(one) for one in found],
        "explained": [
            {
                "asked": dict(one.asked),
                "sentence": one.sentence,
                "parts": [
                    {"part": name, "best_seconds": best, "seconds": seconds}
                    for name, best, seconds in one.parts
                ],
                "plan": _candidate_dict(one.candidate) if one.candidate else None,
            }
            for one in explanations
        ],
        "notes": notes(result),
    }


def _candidate_dict(one: Candidate) -> dict[str, Any]:
    time = asdict(one.time) | {"parts": dict(one.time.parts)}
    time |= {"bubble_fraction": one.time.bubble_fraction, "all_to_all_fraction": one.time.all_to_all_fraction}
    return {
        "plan": one.plan.to_dict(),
        "peak_bytes": one.peak_bytes,
        "memory_bytes": max(one.memory, key=lambda rank: rank.total).terms,
        "time": time,
        "margin": one.margin,
    }


def _of_capacity(question: Question) -> str:
    capacity = question.platform.device.memory_bytes
    return f" of {capacity / GIB:.1f}" if capacity else ""


def short(number: float) -> str:
    """Three figures and a letter: 67.1M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def share(fraction: float | None) -> str:
    """A fraction in percent, a dash for None."""
    return "-" if fraction is None else f"{fraction:.1%}"


def _bars(sizes: Sequence[tuple[str, float]], unit: str, *, total: float) -> list[str]:
    width = max(len(name) for name, _ in sizes)
    # Points below each other, with three figures of the total.
    decimals = max(0, 3 - floor(log10(total)))
    return [
        f"  {name:{width}s} {size:9.{decimals}f} {unit} {size / total:6.1%}  {'#' * round(BAR * size / total)}".rstrip()
        for name, size in sizes
    ]


def _aligned(rows: Sequence[Sequence[str]], *, left: set[int], indent: str = "") -> str:
    """Columns of equal width, those in `left` aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join((indent + line).rstrip() for line in lines)
