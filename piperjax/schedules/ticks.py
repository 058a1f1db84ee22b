"""The lockstep clock: laying a schedule out in ticks that all ranks step through together.

The executor exchanges activations and gradients with the neighbours at the start of every tick, so all
ranks step together and a tick lasts as long as its slowest rank. With one action per tick a rank that runs
F waits for its neighbour that runs B; with one F *and* one B per tick nobody waits, and 1F1B takes exactly
(M + S - 1)(F + B): F(i) runs on stage s at tick i + s, B(i) at tick i + 2(S - 1) - s.

    S=2, M=3   rank 0 | 0F0 0F1     0F2+0B0 0B1     0B2
               rank 1 | .   1F0+1B0 1F1+1B1 1F2+1B2 .        (columns are ticks)

A tick runs F, then B or I, then W. What it sends to another rank is there from the next tick on, what stays
on the rank in the same tick.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Literal

from piperjax.schedules.dualpipe import dualpipe_v
from piperjax.schedules.filling import (
    MAX_WEIGHT_GRADIENTS_PER_TICK,
    UNITS,
    Ticks,
    fill_weight_gradients,
)
from piperjax.schedules.schedule import Action, Schedule, v_placement


@dataclass(frozen=True, kw_only=True)
class TickTable:
    """A schedule on the lockstep clock.

    Attributes:
      schedule: the schedule that was packed.
      ticks: for each tick, for each pipe rank, its actions in the order F, B or I, W.
    """

    schedule: Schedule
    ticks: tuple[tuple[tuple[Action, ...], ...], ...]

    def tick_of(self) -> dict[Action, int]:
        """Tick of every action."""
        return {a: tick for tick, row in enumerate(self.ticks) for actions in row for a in actions}

    def rank_orders(self) -> tuple[tuple[Action, ...], ...]:
        """Per rank: its actions in the order the table runs them."""
        return tuple(
            tuple(action for row in self.ticks for action in row[rank])
            for rank in range(self.schedule.num_ranks)
        )

    @cached_property
    def head_comes_first(self) -> bool:
        """Whether no backward follows the forward of its own microbatch within a tick.

        The head can then begin the next tick, where all ranks meet anyway, instead of standing between F and B.
        """
        tick_of, last = self.tick_of(), self.schedule.num_stages - 1
        backwards = [(a, tick) for a, tick in tick_of.items() if a.kind in "BI" and a.stage == last]
        return bool(backwards) and all(tick > tick_of[a._replace(kind="F")] for a, tick in backwards)

    @cached_property
    def before_head(self) -> frozenset[Action]:
        """Weight gradients that run before the head: at most one per rank and tick, in place of a forward.

        All ranks meet at the head. A rank that runs a W where others run F must do it before, not after.
        """
        if self.head_comes_first:
            return frozenset()
        tick_of, early = self.tick_of(), set()
        for tick, row in enumerate(self.ticks):
            for actions in row:
                if not any(action.kind == "F" for action in actions):
                    older = (
                        a for a in actions if a.kind == "W" and tick_of.get(a._replace(kind="I"), tick) < tick
                    )
                    early.update(islice(older, 1))
        return frozenset(early)

    def peak_in_flight(self) -> tuple[int, ...]:
        """Per rank: most (stage, microbatch) pairs whose forward has run and whose backward has not ended."""
        return tuple(most_between("F", "BI", actions) for actions in self.rank_orders())

    def peak_held(self) -> tuple[int, ...]:
        """Per rank: most (stage, microbatch) pairs between F and the end of B or W, what the papers count."""
        return tuple(most_between("F", "BW", actions) for actions in self.rank_orders())

    def peak_waiting(self) -> tuple[int, ...]:
        """Per rank: most (stage, microbatch) pairs between I and the end of W."""
        return tuple(most_between("I", "W", actions) for actions in self.rank_orders())

    @property
    def units(self) -> float:
        """Lockstep cost at equal times: F, I and W one unit each, B two."""
        return self.cost(UNITS)

    def cost(self, units: Mapping[str, float]) -> float:
        """Lockstep cost at given times of F, B, I and W, where all ranks meet at the head."""
        last, total = self.schedule.num_stages - 1, 0.0
        for row in self.ticks:
            ended = any(a.kind == "F" and a.stage == last for actions in row for a in actions)
            parts = (False, True) if ended and not self.head_comes_first else (None,)
            for first in parts:
                total += max(
                    sum(
                        units[a.kind]
                        for a in actions
                        if first is None or first != (a.kind == "F" or a in self.before_head)
                    )
                    for actions in row
                )
        return total

    def __str__(self) -> str:
        schedule = self.schedule
        cells = [["+".join(map(str, actions)) or "." for actions in row] for row in self.ticks]
        widths = [max(map(len, row)) for row in cells]
        return "\n".join(
            f"rank {rank} | "
            + " ".join(row[rank].ljust(width) for row, width in zip(cells, widths, strict=True))
            for rank in range(schedule.num_ranks)
        )


def pack(
    schedule: Schedule,
    slots: Literal["dual", "overlap", "single", "ordered"] | None = None,
    units: Mapping[str, float] = UNITS,
) -> TickTable:
    """Lays a schedule out in ticks, by default on its own clock.

    - "dual": a forward and a backward per tick, each as early as its inputs allow. Every rank keeps its order
      of forwards and its order of backwards. A backward waits for the forwards that precede it in the schedule
      (so GPipe stays GPipe), a forward does not wait for backwards: in lockstep it would only delay its
      neighbours. On a V both follow DualPipeV's order (`_on_a_v`). Weight gradients go where they cost
      least (`filling`). Where too few microbatches leave them no slack, the table is the cheapest of this one,
      one that begins with one action per tick, and one that has one action in every tick (`_of_few`).
    - "overlap": as "dual", but a backward never follows the forward of its own microbatch within a tick, which
      costs a tick more, and nothing on a V. The two slots of a tick are then independent of each other.
    - "single": one action per tick in the schedule's order. At equal times of F, I and W this is the
      asynchronous timeline, with its bubble and its memory.
    - "ordered": the schedule's order is kept strictly; a tick takes one action, or as many as follow each
      other as F, B or I, W, whichever layout costs less.

    Args:
      schedule: what to lay out.
      slots: the layout.
      units: relative times of F, B, I and W by which the cheapest table is chosen where there is a choice.
    """
    slots = slots or schedule.clock
    if slots == "ordered":
        several = _table(schedule, _in_order(schedule, schedule.ranks, several_from=0))
        return min((several, pack(schedule, "single")), key=lambda table: table.cost(units))
    if slots == "single":
        return _table(schedule, _in_order(schedule, schedule.ranks))
    if slots not in ("dual", "overlap"):
        raise ValueError(f"ticks are laid out as dual, overlap, single or ordered, got {slots!r}")
    splits = _splits(schedule)
    on_a_v = schedule.num_ranks > 1 and schedule.stage_of_chunk == v_placement(schedule.num_ranks)
    if on_a_v and schedule.passes == "forward_backward":
        return _on_a_v(schedule, splits)
    ticks = _two_queues(schedule, delay=int(slots == "overlap"))
    if not splits:
        return _table(schedule, ticks)
    table = _table(schedule, fill_weight_gradients(ticks))
    if has_choice(schedule, slots):
        return min((table, *_of_few(schedule)), key=lambda table: table.cost(units))
    return table


def has_choice(schedule: Schedule, slots: str | None = None) -> bool:
    """Whether `pack` takes the cheapest of several tables, so that it depends on `units`."""
    slots = slots or schedule.clock
    if slots != "dual":
        return slots == "ordered"
    few = schedule.num_microbatches < 2 * schedule.num_ranks - 1
    return few and schedule.num_chunks == 1 and _splits(schedule)


def _splits(schedule: Schedule) -> bool:
    return any(action.kind == "W" for actions in schedule.ranks for action in actions)


def _table(schedule: Schedule, ticks: Ticks) -> TickTable:
    return TickTable(schedule=schedule, ticks=tuple(tuple(map(tuple, row)) for row in ticks))


def most_between(begins: str, ends: str, actions: Iterable[Action]) -> int:
    """Most (stage, microbatch) pairs at once whose action of kind `begins` has run and whose `ends` has not."""
    live = peak = 0
    for action in actions:
        live += action.kind in begins
        peak = max(peak, live)
        live -= action.kind in ends
    return peak


def _two_queues(schedule: Schedule, delay: int) -> Ticks:
    """One F and one B or I per tick, each rank's forwards and backwards in their own order.

    A backward comes at least `delay` ticks after the forward of its microbatch.
    """
    done: dict[Action, int] = {}
    forwards, backwards = (
        [deque(a for a in actions if a.kind in kinds) for actions in schedule.ranks] for kinds in ("F", "BI")
    )
    forwards_before = _forwards_before(schedule)
    forwards_done = [0] * schedule.num_ranks
    ticks: Ticks = []
    while any(forwards) or any(backwards):
        tick, row = len(ticks), []
        for rank in range(schedule.num_ranks):
            actions = []
            if forwards[rank] and _ready(forwards[rank][0], done, tick, schedule):
                actions.append(forwards[rank].popleft())
                done[actions[-1]] = tick
                forwards_done[rank] += 1
            if backwards[rank]:
                head = backwards[rank][0]
                ready = forwards_before[head] <= forwards_done[rank] and _ready(head, done, tick, schedule)
                if ready and done[head._replace(kind="F")] + delay <= tick:
                    actions.append(backwards[rank].popleft())
                    done[head] = tick
            row.append(actions)
        assert any(row), "a valid schedule always has an action that can run"
        ticks.append(row)
    return ticks


def _in_order(
    schedule: Schedule,
    orders: Sequence[Sequence[Action]],
    *,
    several_from: int | None = None,
    delay: int = 0,
) -> Ticks:
    """Every rank's actions in the given order, one per tick; from one tick on several, only as F, then B or I, then W.

    The last stage's backward comes at least `delay` ticks after its forward.
    """
    done: dict[Action, int] = {}
    waiting = [deque(actions) for actions in orders]
    last = schedule.num_stages - 1
    ticks: Ticks = []
    while any(waiting):
        tick, row = len(ticks), []
        several = several_from is not None and tick >= several_from
        for queue in waiting:
            actions: list[Action] = []
            while queue and _fits(actions, queue[0], several) and _ready(queue[0], done, tick, schedule):
                ends = delay and queue[0].stage == last and queue[0].kind in "BI"
                if ends and done[queue[0]._replace(kind="F")] + delay > tick:
                    break
                actions.append(queue.popleft())
                done[actions[-1]] = tick
            row.append(actions)
        assert any(row), "a valid schedule always has an action that can run"
        ticks.append(row)
    return ticks


def _fits(actions: list[Action], action: Action, several: bool) -> bool:
    """Whether a tick that holds `actions` may go on with `action`."""
    if not actions:
        return True
    last = actions[-1].kind
    if not several or action.kind == "F":
        return False
    if action.kind == "W":
        return sum(a.kind == "W" for a in actions) < MAX_WEIGHT_GRADIENTS_PER_TICK
    return last == "F"


def _forwards_before(schedule: Schedule) -> dict[Action, int]:
    """Number of forwards that precede each backward on its rank."""
    before = {}
    for actions in schedule.ranks:
        count = 0
        for action in actions:
            count += action.kind == "F"
            before[action] = count
    return before


def _ready(action: Action, done: dict[Action, int], tick: int, schedule: Schedule) -> bool:
    """Whether the inputs are there: a neighbour's results count from the next tick on, own ones in the same.

    Own results that one tick can use are a W after its I and a backward after the last stage's forward.
    """
    kind, stage, microbatch = action
    if kind == "F":
        return stage == 0 or done.get(Action("F", stage - 1, microbatch), tick) < tick
    if kind == "W":
        return done.get(Action("I", stage, microbatch), tick + 1) <= tick
    if done.get(Action("F", stage, microbatch), tick + 1) > tick:
        return False
    if stage == schedule.num_stages - 1:
        return True
    later = (done.get(Action(kind, stage + 1, microbatch), tick) for kind in "BI")
    return min(later) < tick


def _on_a_v(schedule: Schedule, splits: bool) -> TickTable:
    """On a V: DualPipeV's order of F and I, as many microbatches of it as there are, an I beside the F before it.

    No I follows its own F within a tick. DualPipeV begins with I before F, one per tick, and goes on with F before
    I: so ranks far from the turn start to work on backwards before the turn has all its forwards, and in the steady
    phase a tick holds both. At most `2 P + 1` chunks are in flight. Where some backwards are split all are:
    the executor runs a full one as I and W anyway, and a W that may wait finds a cheaper place.
    """
    P, M = schedule.num_ranks, schedule.num_microbatches
    whole = {action for actions in schedule.ranks for action in actions if action.kind == "B"}
    orders = [
        [
            action._replace(kind=kind)
            for action in actions
            if action.microbatch < M and action.kind != "W"
            for kind in ("F" if action.kind == "F" else "I" if splits else "B")
        ]
        for actions in dualpipe_v(P, max(M, 2 * P)).ranks
    ]
    ticks = _in_order(schedule, orders, several_from=0, delay=1)
    if not splits:
        return _table(schedule, ticks)
    if whole:
        ranks = tuple(
            tuple(a._replace(kind=kind) for a in actions for kind in ("IW" if a in whole else a.kind))
            for actions in schedule.ranks
        )
        schedule = replace(schedule, ranks=ranks)
    return _table(schedule, fill_weight_gradients(ticks))


def _of_few(schedule: Schedule) -> Iterator[TickTable]:
    """Tables for fewer microbatches than fill the wave, whose ends then offer W no slack.

    One action per tick lets gradients go up the ranks twice as fast. With as many such ticks as bring the first
    gradients to the first rank and the last forwards to the last one, W follow without a gap.
    """
    dual = _table(schedule, _two_queues(schedule, delay=1)).rank_orders()
    ticks = _in_order(schedule, dual, several_from=3 * schedule.num_ranks - 1, delay=1)
    yield _table(schedule, fill_weight_gradients(ticks))
    yield pack(schedule, "single")
