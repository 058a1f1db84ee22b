"""The lockstep clock: packing a schedule into ticks that hold one forward and one backward each.

The executor exchanges activations and gradients with the neighbours at the start of every tick, so all
ranks step together and a tick lasts as long as its slowest rank. With one action per tick a rank that runs
F waits for its neighbour that runs B; with one F *and* one B per tick nobody waits, and 1F1B takes exactly
(M + S - 1)(F + B): F(i) runs on stage s at tick i + s, B(i) at tick i + 2(S - 1) - s.

    S=2, M=3   rank 0 | 0F0 0F1     0F2+0B0 0B1     0B2
               rank 1 | .   1F0+1B0 1F1+1B1 1F2+1B2 .        (columns are ticks)
"""

from collections import deque
from dataclasses import dataclass

from piperjax.schedules.schedule import Action, Schedule

MAX_WEIGHT_GRADIENTS_PER_TICK = 2


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

    def peak_in_flight(self) -> tuple[int, ...]:
        """Per rank: most (stage, microbatch) pairs whose forward has run and whose backward has not ended."""
        peaks = []
        for rank in range(self.schedule.num_ranks):
            live = peak = 0
            for row in self.ticks:
                live += sum(action.kind == "F" for action in row[rank])
                peak = max(peak, live)
                live -= sum(action.kind in "BI" for action in row[rank])
            peaks.append(peak)
        return tuple(peaks)

    def __str__(self) -> str:
        schedule = self.schedule
        cells = [["+".join(map(str, actions)) or "." for actions in row] for row in self.ticks]
        widths = [max(map(len, row)) for row in cells]
        return "\n".join(
            f"rank {rank} | "
            + " ".join(row[rank].ljust(width) for row, width in zip(cells, widths, strict=True))
            for rank in range(schedule.num_ranks)
        )


def pack(schedule: Schedule) -> TickTable:
    """Packs a schedule into dual-slot ticks, each action as early as its inputs allow.

    Every rank keeps its order of forwards and its order of backwards. A backward waits for the forwards that
    precede it in the schedule (so GPipe stays GPipe), a forward does not wait for backwards: in lockstep it
    would only delay its neighbours.
    """
    done: dict[Action, int] = {}
    forwards, backwards, weights = (
        [deque(a for a in actions if a.kind in kinds) for actions in schedule.ranks]
        for kinds in ("F", "BI", "W")
    )
    forwards_before = _forwards_before(schedule)
    forwards_done = [0] * schedule.num_ranks
    ticks = []
    total = sum(map(len, schedule.ranks))
    while len(done) < total:
        tick = len(ticks)
        row = []
        for rank in range(schedule.num_ranks):
            actions = []
            if forwards[rank] and _ready(forwards[rank][0], done, tick, schedule):
                actions.append(forwards[rank].popleft())
                done[actions[-1]] = tick
                forwards_done[rank] += 1
            if backwards[rank]:
                head = backwards[rank][0]
                if forwards_before[head] <= forwards_done[rank] and _ready(head, done, tick, schedule):
                    actions.append(backwards[rank].popleft())
                    done[head] = tick
            # A weight gradient fills the slot that a missing forward or backward leaves.
            room = MAX_WEIGHT_GRADIENTS_PER_TICK if len(actions) < 2 else 1
            while weights[rank] and room and _ready(weights[rank][0], done, tick, schedule):
                actions.append(weights[rank].popleft())
                done[actions[-1]] = tick
                room -= 1
            row.append(tuple(actions))
        assert any(row), "a valid schedule always has an action that can run"
        ticks.append(tuple(row))
    return TickTable(schedule=schedule, ticks=tuple(ticks))


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
    """Whether the inputs are there: own results count in the same tick, sent ones from the next tick on."""
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
