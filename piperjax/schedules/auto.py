"""A schedule for measured times and a memory limit: the best named one that fits, or a better one found greedily.

List scheduling: the rank that can start something first runs, of what its inputs and its memory allow, an input
gradient before a forward, and a weight gradient when nothing else would start soon. What "soon" means, how far
forwards may run ahead and which of F and I goes first are tried in turn; then neighbours that may be exchanged are,
as long as that shortens the step. No solver, and never worse than a named schedule within the limit.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise, product
from math import floor, inf
from typing import NamedTuple

from piperjax.schedules import named
from piperjax.schedules.schedule import Action, Schedule, loop_placement, v_placement
from piperjax.schedules.ticks import most_between, pack
from piperjax.schedules.timeline import ActionCosts, lockstep, simulate

PER_STAGE = (
    "forward",
    "backward",
    "input_gradient",
    "weight_gradient",
    "exposed_forward",
    "exposed_backward",
)
EXCHANGES_TRIED = 40
FEWEST_TRIALS, ACTIONS_TRIED = 8, 50_000
RECOMPUTING = ActionCosts(forward=1.0, backward=3.0, input_gradient=2.0, weight_gradient=1.0)


class Trial(NamedTuple):
    """How one greedy schedule is built.

    Attributes:
      stage_of_chunk: stages of each rank.
      most_held: per rank, chunks that may be held between F and W.
      patience: share of a W that a rank rather waits for an F or I.
      alternate: F goes before I right after an I.
    """

    stage_of_chunk: tuple[tuple[int, ...], ...]
    most_held: tuple[int, ...]
    patience: float
    alternate: bool


def auto(
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int = 2,
    *,
    costs: ActionCosts | None = None,
    memory_limit: float = inf,
    clock: str = "lockstep",
) -> Schedule:
    """Builds a schedule at least as short as the best named one that fits.

    Args:
      num_ranks: pipe ranks.
      num_microbatches: microbatches per step.
      num_chunks: stages per pipe rank; on two they go down the ranks and back up unless a loop is shorter.
      costs: seconds of a whole rank's share of the layers, one number or one per rank; if left out,
        a backward that recomputes its forward: F 1, I 2, W 1.
      memory_limit: most activations of such a share that a rank may hold between F and W.
      clock: what is shortened: "async", as `simulate` times it, or "lockstep", as the executor runs it.

    Raises:
      ValueError: if nothing fits the limit.
    """
    costs = costs or RECOMPUTING
    shortest = _least_seconds(num_ranks, num_microbatches, num_chunks, costs)
    best, best_seconds = None, inf
    for schedule in _candidates(num_ranks, num_microbatches, num_chunks, costs, memory_limit):
        for laid_out, seconds in _fitting(schedule, costs, memory_limit, clock):
            if seconds < best_seconds - 1e-12:
                best, best_seconds = laid_out, seconds
        if best_seconds <= shortest * (1 + 1e-9):
            break
    if best is None:
        raise ValueError(
            f"no schedule of {num_chunks} chunks on {num_ranks} pipe ranks holds at most {memory_limit:g} "
            "activations per rank; raise the limit or use v_min"
        )
    if clock == "async" and best_seconds > shortest * (1 + 1e-9):
        best = _exchanged(best, costs, memory_limit)
    return replace(best, name="auto")


def chunk_costs(schedule: Schedule, costs: ActionCosts) -> ActionCosts:
    """Costs of a schedule's stages from those of each rank's whole share, which its chunks divide evenly."""
    parts = {}
    for field in fields(costs):
        value = getattr(costs, field.name)
        if field.name in PER_STAGE and isinstance(value, tuple):
            parts[field.name] = tuple(value[rank] / schedule.num_chunks for rank in schedule.rank_of_stage)
        elif field.name in PER_STAGE:
            parts[field.name] = value / schedule.num_chunks
    return replace(costs, **parts)


def _candidates(P: int, M: int, v: int, costs: ActionCosts, limit: float) -> Iterator[Schedule]:
    """Every named schedule with v chunks per rank, then the greedy ones."""
    # Those that hold least come first: of two equally short ones the first is taken.
    yield from sorted(named.build_all(P, M, v), key=_most_held)
    placements = [loop_placement(P, v)] + ([v_placement(P)] if v == 2 else [])
    most = floor(min(limit, M) * v + 1e-9)
    # What wins most often comes first; large cases stop early.
    trials = [
        Trial(placement, cap, patience, alternate)
        for alternate, patience, cap, placement in product(
            (True, False), (0.5, 0.0, 1.0), dict.fromkeys(_caps(P, v, most)), placements
        )
    ]
    for trial in trials[: max(FEWEST_TRIALS, ACTIONS_TRIED // (3 * P * M * v))]:
        found = _greedy(trial, M, costs)
        if found is not None:
            yield found


def _least_seconds(P: int, M: int, v: int, costs: ActionCosts) -> float:
    """What no schedule can undercut: a rank's work after the first microbatch has reached it."""
    arrival, least = 0.0, 0.0
    for rank in range(P):
        work = M * sum(costs.seconds(Action(kind, rank, 0)) for kind in "FIW")
        least = max(least, arrival + work)
        arrival += costs.seconds(Action("F", rank, 0)) / v + costs.transfer
    return least


def _caps(P: int, v: int, most: int) -> Iterator[tuple[int, ...]]:
    """Per rank, how many chunks may be held: up to the limit, or like 1F1B with one or two hops to spare."""
    for ahead in (most, v * P, 2 * v * P - 1, v * P + 1):
        yield (min(most, ahead),) * P
    for hops in (1, 2):
        yield tuple(min(most, v * (hops * (P - rank - 1) + 1)) for rank in range(P))


def _fitting(
    schedule: Schedule, costs: ActionCosts, limit: float, clock: str
) -> Iterator[tuple[Schedule, float]]:
    """The schedule if it fits the limit, on each clock that does, and the seconds of a step."""
    allowed, per_chunk = limit * schedule.num_chunks + 1e-9, chunk_costs(schedule, costs)
    if clock == "async":
        if _most_held(schedule) <= allowed:
            yield schedule, simulate(schedule, per_chunk).step_seconds
        return
    # Two actions per tick make the same wave of any order on a V, and that one has a name already.
    known = schedule.name == "auto" and schedule.stage_of_chunk == v_placement(schedule.num_ranks)
    for slots in ("single",) if known else ("dual", "single"):
        laid_out = replace(schedule, clock=slots)
        table = pack(laid_out)
        if max(table.peak_held()) <= allowed:
            yield laid_out, lockstep(table, per_chunk).step_seconds


def _most_held(schedule: Schedule) -> int:
    return max(most_between("F", "BW", actions) for actions in schedule.ranks)


def _greedy(trial: Trial, num_microbatches: int, costs: ActionCosts) -> Schedule | None:
    """The schedule of one trial, or None if its memory does not let it finish."""
    ranks = _ListScheduling(trial, num_microbatches, costs).run()
    if ranks is None:
        return None
    return Schedule(
        name="auto",
        num_stages=sum(map(len, trial.stage_of_chunk)),
        num_microbatches=num_microbatches,
        ranks=ranks,
        stage_of_chunk=trial.stage_of_chunk,
        clock="single",
    )


class _ListScheduling:
    """Working state of `_greedy`: when each action ended and what each rank could run next."""

    def __init__(self, trial: Trial, num_microbatches: int, costs: ActionCosts):
        self.trial, self.M, self.transfer = trial, num_microbatches, costs.transfer
        self.placement = trial.stage_of_chunk
        self.rank_of = {stage: rank for rank, held in enumerate(self.placement) for stage in held}
        self.last = len(self.rank_of) - 1
        share = len(self.placement[0])
        self.seconds = {
            (kind, stage): costs.seconds(Action(kind, rank, 0)) / share
            for stage, rank in self.rank_of.items()
            for kind in "FIW"
        }
        self.count = dict.fromkeys(self.seconds, 0)
        self.end: dict[Action, float] = {}
        self.free, self.held = [0.0] * len(self.placement), [0] * len(self.placement)
        self.orders: list[list[Action]] = [[] for _ in self.placement]

    def run(self) -> tuple[tuple[Action, ...], ...] | None:
        following = [self._next(rank) for rank in range(len(self.placement))]
        for _ in range(3 * self.M * len(self.rank_of)):
            start, rank = min((choice[0], rank) for rank, choice in enumerate(following))
            if start == inf:
                return None
            action = following[rank][1]
            self._commit(rank, action, start)
            stale = {rank, self.rank_of.get(action.stage + 1, rank), self.rank_of.get(action.stage - 1, rank)}
            for other in stale:
                following[other] = self._next(other)
        return tuple(map(tuple, self.orders))

    def _commit(self, rank: int, action: Action, start: float):
        self.orders[rank].append(action)
        self.count[action.kind, action.stage] += 1
        self.held[rank] += {"F": 1, "I": 0, "W": -1}[action.kind]
        self.free[rank] = self.end[action] = start + self.seconds[action.kind, action.stage]

    def _next(self, rank: int) -> tuple[float, Action]:
        """(start, action) that a rank would run next; the start is infinite if nothing can."""
        free, stages = self.free[rank], self.placement[rank]
        weights = [
            Action("W", stage, self.count["W", stage])
            for stage in stages
            if self.count["W", stage] < self.count["I", stage]
        ]
        room = self.trial.most_held[rank] - self.held[rank]
        # The shallowest chunk leaves room for the deepest, or nothing could ever come back.
        forwards = [stage for stage in stages if room > (stage != max(stages))]
        choices = [self._start("I", stage, rank) for stage in stages]
        choices += [self._start("F", stage, rank) for stage in forwards]
        soonest = min((start for start, _ in choices), default=inf)
        weight = self.seconds["W", stages[0]]
        if weights and soonest > free + self.trial.patience * weight:
            return free, min(weights, key=lambda action: (action.microbatch, -action.stage))
        ready = [choice for choice in choices if choice[0] <= soonest]
        if soonest == inf:
            return inf, Action("F", 0, 0)
        after_i = bool(self.orders[rank]) and self.orders[rank][-1].kind != "F"
        first = "F" if self.trial.alternate and after_i else "I"
        return min(ready, key=lambda choice: (choice[1].kind != first, -choice[1].stage))

    def _start(self, kind: str, stage: int, rank: int) -> tuple[float, Action]:
        """(earliest start, action) of the next F or I of a stage; infinite while its inputs have no end."""
        microbatch = self.count[kind, stage]
        action = Action(kind, stage, microbatch)
        if microbatch == self.M:
            return inf, action
        needs = []
        if kind == "I":
            needs.append(Action("F", stage, microbatch))
        source = stage - 1 if kind == "F" else stage + 1
        if 0 <= source <= self.last:
            needs.append(Action(kind, source, microbatch))
        start = self.free[rank]
        for need in needs:
            sent = self.transfer if self.rank_of[need.stage] != rank else 0.0
            start = max(start, self.end.get(need, inf) + sent)
        return start, action


def _exchanged(schedule: Schedule, costs: ActionCosts, limit: float) -> Schedule:
    """Exchanges neighbours on the rank that ends last while that shortens the step and fits the limit."""
    per_chunk = chunk_costs(schedule, costs)
    best = simulate(schedule, per_chunk)
    for _ in range(EXCHANGES_TRIED):
        gaps = _gaps(best.schedule, best.start_seconds, best.end_seconds)
        better = None
        for rank, at in gaps[:4]:
            try:
                trial = _with_exchange(best.schedule, rank, at)
            except ValueError:
                continue  # The exchange would deadlock.
            timeline = simulate(trial, per_chunk)
            fits = max(timeline.peak_held()) <= limit * trial.num_chunks + 1e-9
            if fits and timeline.step_seconds < best.step_seconds - 1e-12:
                better = timeline
                break
        if better is None:
            break
        best = better
    return best.schedule


def _gaps(schedule: Schedule, start: dict[Action, float], end: dict[Action, float]) -> list[tuple[int, int]]:
    """(rank, position) of actions that begin after an idle moment, longest first."""
    waits = [
        (start[after] - end[before], rank, at)
        for rank, actions in enumerate(schedule.ranks)
        for at, (before, after) in enumerate(pairwise(actions), start=1)
    ]
    return [(rank, at) for wait, rank, at in sorted(waits, reverse=True) if wait > 1e-9]


def _with_exchange(schedule: Schedule, rank: int, at: int) -> Schedule:
    actions = list(schedule.ranks[rank])
    later = min(at + 1, len(actions) - 1)
    actions[at], actions[later] = actions[later], actions[at]
    ranks = (*schedule.ranks[:rank], tuple(actions), *schedule.ranks[rank + 1 :])
    return replace(schedule, ranks=ranks)
