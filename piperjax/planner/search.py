"""Search: the best plans for a model on a machine, in two stages.

Every candidate is priced quickly (`scoring`); the quickest that fit, one for each mesh, are then priced as `timing` and
`memory` do, with stages divided by seconds instead of FLOP where that helps. `choose_plan` is what training asks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np

from meshes.platform import Platform
from models.config import ModelConfig
from piperjax.planner.candidates import AXES, Mesh, Question, Rejection, Rejections, check_some, meshes
from piperjax.planner.cells import memory_backend
from piperjax.planner.dispatchers import DISPATCHERS
from piperjax.planner.memory import RankMemory, estimate_memory
from piperjax.planner.partition import partition_layers
from piperjax.planner.plan import Plan, default_plan
from piperjax.planner.remedies import SMALLER_BUFFERS, check_room, concessions, least_bytes
from piperjax.planner.scoring import Scores, capacity_bytes, score
from piperjax.planner.timing import TimeEstimate, estimate_time, stage_seconds

# Up to so many (rank, microbatch, chunk) triples the tick table itself is timed; above, its counts are.
LARGEST_TIMED_TABLE = 512
KEPT = 10
# Where nobody says how large buffers are, a usual size is tried on so many meshes, and others on the best of these.
OTHER_CAPACITY_FACTORS = (1.5, 2.0, 3.0)
PROMISING_MESHES = 6
MESHES_FOR_OTHER_SIZES = 2
# Where no mesh holds even what lasts, plain plans on so many of the leanest show how much is lacking.
LEANEST_MESHES = 4
BUFFERS = frozenset(SMALLER_BUFFERS)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan with its price.

    Attributes:
      plan: the plan.
      memory: bytes by pipe rank.
      time: seconds of a step.
      margin: how much longer its step takes than the best one's, as a fraction.
    """

    plan: Plan
    memory: tuple[RankMemory, ...]
    time: TimeEstimate
    margin: float = 0.0

    @property
    def mesh(self) -> Mesh:
        """Sizes of its axes."""
        return Mesh(self.plan.pipe, self.plan.data, self.plan.expert)

    @property
    def peak_bytes(self) -> float:
        """Bytes on the device that needs most."""
        return max(rank.total for rank in self.memory)


@dataclass(frozen=True, kw_only=True)
class Compromise:
    """A candidate that no other beats in both memory and time.

    Attributes:
      row: its row of the scores.
      num_bytes: bytes on a device.
      flop_per_second: useful FLOP per second and device.
      mfu: as a fraction of the peak; None where the platform has no peak.
    """

    row: int
    num_bytes: float
    flop_per_second: float
    mfu: float | None


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
      question: what was asked.
      ranked: the best candidate of each of the best meshes, quickest first.
      rejected: what was left out, by reason.
      pareto: compromises of memory and speed, least memory first; fewest bytes to most.
      scores: every candidate with its quick price.
      num_meshes: meshes that were possible.
      num_plans, num_fit: candidates that were priced, and that fit.
      given_up: fields of the plan that have values which nobody wished for, because nothing fits without.
    """

    question: Question
    ranked: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]
    pareto: tuple[Compromise, ...]
    scores: Scores
    num_meshes: int
    num_plans: int
    num_fit: int
    given_up: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate:
        """The quickest plan that fits."""
        return self.ranked[0]


def search(
    model: ModelConfig,
    platform: Platform,
    num_devices: int,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str = "bfloat16",
    wished: Mapping[str, Any] | None = None,
    dispatchers: Sequence[str] = tuple(DISPATCHERS),
    imbalance: float = 1.0,
    keep: int = KEPT,
) -> SearchResult:
    """Finds the best plans.

    Args:
      model: what is trained.
      platform: what it runs on.
      num_devices: devices to use, all of them.
      batch_size: sequences per step over all devices.
      seq_len: tokens per sequence.
      dtype: of activations and matrix products.
      wished: fields of the plan that are given, by name; the others are searched.
      dispatchers: names of the dispatchers that may be chosen.
      imbalance: rows of the device with the busiest experts over the mean.
      keep: most plans to return, each on another mesh.

    Raises:
      ValueError: if nothing is possible or nothing fits; the sentence names the nearest that is and does.
    """
    question = Question(
        model=model,
        platform=platform,
        num_devices=num_devices,
        batch_size=batch_size,
        seq_len=seq_len,
        dtype=dtype,
        wished={name: value for name, value in (wished or {}).items() if value is not None},
        dispatchers=tuple(dispatchers),
        imbalance=imbalance,
    )
    return answer(question, keep=keep)


def answer(question: Question, *, keep: int = KEPT, advise: bool = True) -> SearchResult:
    """Finds the best plans; see `search`.

    Where nothing fits with buffers for any routing, and gradients added up in float32, either is given up, or both
    (`concessions`). No row is dropped for that: those that find no room travel in later passes. Where something fits,
    smaller buffers are tried on the quickest meshes, and taken if that is quicker: elementwise work and exchanges go
    through all places of a buffer.

    Args:
      question: what is asked.
      keep: most plans to return.
      advise: look for the nearest that fits where nothing does, which takes a few more searches.
    """
    rejections = Rejections()
    possible = meshes(question, rejections)
    check_some(question, possible, rejections)
    listed, given_up = rejections.copy(), {}
    scores = _scored(question, possible, listed)
    tried = [scores]
    for less in () if scores.fits.any() else concessions(question.wished):
        changed = _with(question, less)
        if roomy := _roomy(changed, possible):
            among = rejections.copy()
            tried.append(_scored_on(changed, roomy, possible, among))
            if tried[-1].fits.any():
                scores, given_up, listed = tried[-1], less, among
                break
    check_room(question, tried, advise=advise)
    found = [scores]
    if _may_limit_buffers(question):
        found += _with_smaller_buffers(scores, possible, listed)
    ranked, own = _ranked(found, keep)
    return SearchResult(
        question=scores.question,
        ranked=ranked,
        rejected=listed.listed(),
        pareto=_pareto(own, ranked[0]),
        scores=own,
        num_meshes=len(possible),
        num_plans=sum(len(one.seconds) for one in found),
        num_fit=sum(int(one.fits.sum()) for one in found),
        given_up=tuple(given_up),
    )


def _scored(question: Question, possible: list[Mesh], rejections: Rejections) -> Scores:
    """Scores on the meshes on which a device holds at least its parameters; on the leanest if there are none."""
    roomy = _roomy(question, possible)
    if not roomy:
        leanest = sorted(possible, key=lambda mesh: least_bytes(question, mesh))[:LEANEST_MESHES]
        plainest = _simplest(question)
        if "memory_mode" in plainest:
            plainest["memory_mode"] = "stage"
        scores = score(_with(question, plainest), leanest, Rejections())
        # What is wished for may not exist on these.
        return scores if len(scores.seconds) else score(question, possible, rejections)
    return _scored_on(question, roomy, possible, rejections)


def _scored_on(question: Question, roomy: list[Mesh], possible: list[Mesh], rejections: Rejections) -> Scores:
    """Scores on some of the possible meshes; the others are counted."""
    for mesh in possible:
        if mesh not in roomy:
            reason = "a device must have room for its parameters, their moments and their gradients"
            rejections.add(reason, mesh)
    return score(question, roomy, rejections)


def _roomy(question: Question, possible: list[Mesh]) -> list[Mesh]:
    room = capacity_bytes(question)
    return [mesh for mesh in possible if least_bytes(question, mesh) <= room]


def _may_limit_buffers(question: Question) -> bool:
    """Whether smaller buffers may be chosen for speed: not on simulated devices, where passes are not measured."""
    is_simulated = question.platform.device.concurrent_devices is not None
    return bool(question.model.num_experts) and not is_simulated and not BUFFERS & question.wished.keys()


def _with(question: Question, changes: Mapping[str, Any]) -> Question:
    return replace(question, wished=dict(question.wished) | changes)


def _with_smaller_buffers(scores: Scores, possible: list[Mesh], rejections: Rejections) -> list[Scores]:
    """Scores with buffers of a usual size and later passes on promising meshes, of other sizes on the best of these."""
    question, found = scores.question, []
    last = scores
    if "capacity_factor" not in question.wished:
        leaner = _with(question, SMALLER_BUFFERS)
        simple = _scored(_with(leaner, _simplest(question)), possible, Rejections())
        last = score(leaner, _best_meshes(simple, PROMISING_MESHES), rejections)
        found.append(last)
    meshes = _best_meshes(last, MESHES_FOR_OTHER_SIZES)
    for size in OTHER_CAPACITY_FACTORS:
        limited = _with(question, SMALLER_BUFFERS | {"capacity_factor": size})
        found.append(score(limited, meshes, rejections))
    return found


def _simplest(question: Question) -> dict[str, Any]:
    """Choices by which meshes are compared, but for what is wished."""
    usual = {"schedule": "one_f_one_b", "overlap": False, "vocabulary": "split", "memory_mode": "layer"}
    if {"num_chunks", "overlap"} & question.wished.keys():
        del usual["schedule"]
    return {name: value for name, value in usual.items() if name not in question.wished}


def _best_meshes(scores: Scores, count: int) -> list[Mesh]:
    return [scores.meshes[scores.mesh[row]] for row in _quickest(scores)[:count]]


def _quickest(scores: Scores) -> np.ndarray:
    """Of every mesh the quickest row that fits, quickest first."""
    order = np.argsort(np.where(scores.fits, scores.seconds, inf), kind="stable")[: int(scores.fits.sum())]
    _, firsts = np.unique(scores.mesh[order], return_index=True)
    return order[np.sort(firsts)]


def _ranked(found: Sequence[Scores], keep: int) -> tuple[tuple[Candidate, ...], Scores]:
    """The quickest row of every mesh priced in full, as many as are kept; and the scores that the best is from."""
    quickest: dict[Mesh, tuple[float, Scores, int]] = {}
    for scores in found:
        for row in map(int, _quickest(scores)):
            mesh, seconds = scores.meshes[scores.mesh[row]], float(scores.seconds[row])
            if mesh not in quickest or seconds < quickest[mesh][0]:
                quickest[mesh] = seconds, scores, row
    rows = sorted(quickest.values(), key=lambda one: one[0])[:keep]
    pairs = [(priced(scores.question, scores.plan(row)), scores) for _, scores, row in rows]
    # Extended counts of slots may be a slot short: the full price decides.
    fitting = [pair for pair in pairs if pair[0].peak_bytes <= capacity_bytes(pair[1].question)]
    pairs = sorted(fitting or pairs, key=lambda pair: pair[0].time.step_seconds)
    best, own = pairs[0]
    margins = [one.time.step_seconds / best.time.step_seconds - 1 for one, _ in pairs]
    return tuple(replace(one, margin=margin) for (one, _), margin in zip(pairs, margins, strict=True)), own


def priced(question: Question, plan: Plan) -> Candidate:
    """A plan with its price, its stages divided by FLOP or by seconds, whichever is quicker and fits."""
    as_it_is = priced_as_it_is(question, plan)
    if plan.pipe == 1:
        return as_it_is
    by_seconds = replace(plan, layers_per_stage=_layers_by_seconds(question, plan))
    if by_seconds == plan:
        return as_it_is
    other = priced_as_it_is(question, by_seconds)
    quicker = other.time.step_seconds < as_it_is.time.step_seconds
    return other if quicker and other.peak_bytes <= capacity_bytes(question) else as_it_is


def priced_as_it_is(question: Question, plan: Plan) -> Candidate:
    """A plan with its price, its stages divided as they are."""
    small = (
        plan.pipe * plan.num_microbatches * (len(plan.layers_per_stage) // plan.pipe) <= LARGEST_TIMED_TABLE
    )
    time = estimate_time(
        question.model,
        plan,
        question.platform,
        question.conditions,
        clock="lockstep" if small else "profile",
    )
    memory = estimate_memory(
        question.model,
        plan,
        dtype=question.dtype,
        backend=memory_backend(question),
        reserve_bytes=question.platform.device.reserve_bytes,
    )
    return Candidate(plan=plan, memory=memory, time=time)


def _layers_by_seconds(question: Question, plan: Plan) -> tuple[int, ...]:
    """Layers per stage so that the stage that takes longest takes as short as possible."""
    by_layer = replace(
        plan,
        pipe=question.model.num_layers,
        data=1,
        schedule="one_f_one_b",
        num_chunks=0,
        overlap=False,
        layers_per_stage=(1,) * question.model.num_layers,
        batch_size=plan.batch_size // plan.data,
    )
    priced_layers = stage_seconds(question.model, by_layer, question.platform, question.conditions)
    # Each priced by itself; on a device most have others of their kind.
    return partition_layers(tuple(layer.cut().total for layer in priced_layers), len(plan.layers_per_stage))


def _pareto(scores: Scores, best: Candidate) -> tuple[Compromise, ...]:
    """Rows with fewer bytes than all that are as quick."""
    rows = np.flatnonzero(scores.fits)
    rows = rows[np.lexsort((scores.seconds[rows], scores.num_bytes[rows]))]
    quickest = np.minimum.accumulate(scores.seconds[rows])
    front = rows[np.flatnonzero(np.diff(quickest, prepend=inf) < 0)]
    work = best.time.flop_per_second * best.time.step_seconds
    compromises = []
    for row in front:
        rate = work / float(scores.seconds[row])
        peak = scores.question.platform.device.known_peak(scores.question.dtype)
        compromises.append(
            Compromise(
                row=int(row),
                num_bytes=float(scores.num_bytes[row]),
                flop_per_second=rate,
                mfu=rate / peak if peak else None,
            )
        )
    return tuple(compromises)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The plan that a run takes.

    Attributes:
      plan: the plan.
      result: the search it comes from; None where the simple rule of `default_plan` was used.
      reason: why the simple rule was used; empty otherwise.
    """

    plan: Plan
    result: SearchResult | None = None
    reason: str = ""


def choose_plan(
    model: ModelConfig,
    platform: Platform,
    num_devices: int,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str = "bfloat16",
    wished: Mapping[str, Any] | None = None,
) -> Choice:
    """The plan to train with: the best that a search finds, or the simple rule where the platform has no rates.

    Raises:
      ValueError: if what is wished for is impossible or does not fit.
    """
    wished = {name: value for name, value in (wished or {}).items() if value is not None}
    shape = dict(batch_size=batch_size, seq_len=seq_len)
    reason = ""
    if not platform.rated(dtype):
        reason = f"no rates of {platform.name} in {dtype} are known; python -m piperjax measure writes them"
    elif num_devices > 1 and not platform.links:
        reason = f"no links of {platform.name} are known; python -m piperjax measure writes them"
    if reason:
        return Choice(plan=default_plan(model, platform, num_devices, **shape, **wished), reason=reason)
    try:
        result = search(model, platform, num_devices, **shape, dtype=dtype, wished=wished)
    except ValueError:
        if set(AXES) <= wished.keys() or "num_microbatches" in wished:
            # What is wrong with three sizes, or with microbatches, is said best where they are put together.
            default_plan(model, platform, num_devices, **shape, **wished)
        raise
    return Choice(plan=result.best.plan, result=result)
