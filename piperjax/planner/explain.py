"""Explanations: why a mesh lost, and what every single choice of the best plan is worth."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from piperjax.planner.candidates import AXES, Question, memory_modes, vocabularies
from piperjax.planner.cells import ways_on
from piperjax.planner.dispatchers import Way
from piperjax.planner.plan import GRADIENT_DTYPES
from piperjax.planner.scoring import Scores, capacity_bytes
from piperjax.planner.search import Candidate, SearchResult, answer, priced_as_it_is

PART_WORDS = {
    "compute": "computation",
    "exposed_all_to_all": "all-to-all that nothing hides",
    "head": "embedding and head",
    "pipeline_transfer": "exchanges between pipe ranks",
    "bubble": "bubble",
    "gradient_reduction": "reduction of gradients",
    "optimizer": "optimizer",
    "fresh_memory": "first touch of memory",
}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a mesh lost.

    Attributes:
      asked: sizes and other fields that were asked for.
      candidate: the best plan with them; None if there is none that fits.
      sentence: why it lost.
      parts: seconds of every part of a step that takes any, of the best plan and of this one; empty if none fits.
    """

    asked: Mapping[str, Any]
    candidate: Candidate | None
    sentence: str
    parts: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Variation:
    """The best plan with one choice made otherwise.

    Attributes:
      choice: which.
      value: what instead.
      slower: how much longer a step takes, as a fraction; negative if shorter.
      num_bytes: bytes on a device.
      fits: whether a device has them.
    """

    choice: str
    value: str
    slower: float
    num_bytes: float
    fits: bool


def explain(result: SearchResult, asked: Mapping[str, Any]) -> Explanation:
    """Searches again with some fields given, and compares with the best plan.

    Raises:
      ValueError: if a field is unknown or has an impossible value.
    """
    kept = {name: value for name, value in result.question.wished.items() if name not in AXES}
    question = replace(result.question, wished=kept | dict(asked))
    try:
        candidate = answer(question, keep=1).best
    except ValueError as error:
        return Explanation(asked=asked, candidate=None, sentence=str(error))
    best = result.best
    parts = tuple(
        (part, seconds, candidate.time.parts.get(part, 0.0))
        for part, seconds in best.time.parts.items()
        if seconds or candidate.time.parts.get(part)
    )
    return Explanation(
        asked=asked, candidate=candidate, sentence=_compared(best, candidate, parts), parts=parts
    )


def _compared(best: Candidate, candidate: Candidate, parts: tuple[tuple[str, float, float], ...]) -> str:
    if candidate.plan == best.plan:
        return "this is the best plan"
    difference = candidate.time.step_seconds - best.time.step_seconds
    share = difference / best.time.step_seconds
    if difference <= 0:
        return f"its best plan is {-share:.1%} quicker than the best of the search that was asked for"
    name, before, after = max(parts, key=lambda part: part[2] - part[1])
    saved = min(parts, key=lambda part: part[2] - part[1])
    sentence = (
        f"its best plan takes {candidate.time.step_seconds:.4g} s, {share:.1%} longer: most of it is "
        f"{PART_WORDS.get(name, name)}, {after:.4g} s instead of {before:.4g}"
    )
    if saved[2] < saved[1]:
        sentence += f", against {saved[1] - saved[2]:.4g} s less of {PART_WORDS.get(saved[0], saved[0])}"
    uncertainty = best.time.uncertainty_fraction
    if share < uncertainty / 2:
        sentence += f"; with +- {uncertainty:.0%} on either, a difference that only a measurement decides"
    return sentence


def variations(result: SearchResult) -> tuple[Variation, ...]:
    """The best plan with one choice made otherwise, from its schedule to the dtype of its gradients."""
    scores, question = result.scores, result.question
    best = scores.row_of(result.best.plan)
    columns = {
        "schedule": scores.order,
        "microbatches": scores.num_microbatches,
        "memory mode": scores.memory_mode,
        "vocabulary": scores.vocabulary,
    }
    same = {name: values == values[best] for name, values in columns.items()}
    on_mesh, same_way = scores.mesh == scores.mesh[best], scores.way == scores.way[best]
    found = []
    for choice in columns:
        others = np.logical_and.reduce([same[name] for name in columns if name != choice] + [on_mesh])
        # The way that is quickest with so many microbatches need not be the same.
        others &= _best_of_each(scores, others) if choice == "microbatches" else same_way
        rows = np.flatnonzero(others & ~same[choice])
        found += [
            Variation(
                choice=choice,
                value=_value(scores, question, choice, int(row)),
                slower=float(scores.seconds[row] / scores.seconds[best]) - 1,
                num_bytes=float(num_bytes),
                fits=bool(scores.fits[row]),
            )
            for row, num_bytes in zip(rows, scores.all_bytes(rows), strict=True)
        ]
    choices = [*columns, "dispatch", "gradients"]
    found += _dispatched(result) + _accumulated(result)
    return tuple(sorted(found, key=lambda one: (choices.index(one.choice), one.slower)))


def _best_of_each(scores: Scores, rows: np.ndarray) -> np.ndarray:
    """Of rows with as many microbatches, the quickest that fits, or else the leanest, bool `[rows]`."""
    num_bytes, open_rows = scores.num_bytes.copy(), np.flatnonzero(rows & scores.is_least)
    num_bytes[open_rows] = scores.all_bytes(open_rows)
    order = np.lexsort((np.where(scores.fits, scores.seconds, num_bytes), ~scores.fits))
    order = order[rows[order]]
    _, firsts = np.unique(scores.num_microbatches[order], return_index=True)
    best = np.zeros_like(rows)
    best[order[firsts]] = True
    return best


def _dispatched(result: SearchResult) -> list[Variation]:
    """The best plan with other dispatchers and numbers of chunks, each priced in full: a search keeps two of them."""
    question, best = result.question, result.best
    own = Way(best.plan.dispatch, best.plan.dispatch_chunks)
    return [
        _priced(result, "dispatch", str(way), dispatch=way.dispatch, dispatch_chunks=way.chunks)
        for way in ways_on(question, best.mesh, best.plan.tokens_per_device)
        if way != own
    ]


def _accumulated(result: SearchResult) -> list[Variation]:
    """The best plan with gradients added up in another dtype."""
    own = result.best.plan.gradient_dtype
    return [
        _priced(result, "gradients", dtype, gradient_dtype=dtype) for dtype in GRADIENT_DTYPES if dtype != own
    ]


def _priced(result: SearchResult, choice: str, value: str, **changes: Any) -> Variation:
    """The best plan with fields changed, priced in full."""
    question, best = result.question, result.best
    one = priced_as_it_is(question, replace(best.plan, **changes))
    return Variation(
        choice=choice,
        value=value,
        slower=one.time.step_seconds / best.time.step_seconds - 1,
        num_bytes=one.peak_bytes,
        fits=one.peak_bytes <= capacity_bytes(question),
    )


def _value(scores: Scores, question: Question, choice: str, row: int) -> str:
    if choice == "schedule":
        return str(scores.orders[scores.order[row]])
    if choice == "microbatches":
        return str(scores.num_microbatches[row])
    if choice == "memory mode":
        return memory_modes(question)[scores.memory_mode[row]]
    return vocabularies(question, scores.meshes[scores.mesh[row]].pipe)[scores.vocabulary[row]]
