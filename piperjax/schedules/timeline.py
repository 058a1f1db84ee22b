"""Two clocks for one schedule: the asynchronous one of the literature, and our lockstep one.

Both price the same actions. `simulate` lets a rank start an action as soon as its inputs are there, as
the published bubble formulas assume. `lockstep` prices a tick table: a step is the sum over ticks of the
slowest rank's tick, which is what the executor does.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

from piperjax.schedules.schedule import Action, Schedule, dependencies
from piperjax.schedules.ticks import TickTable, most_between

PerStage = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ActionCosts:
    """Seconds of each action, by stage; one number means the same for all stages.

    Embedding and head are asynchronously part of the first and last stage. In lockstep all ranks work on them
    together, so they lengthen a tick for everybody, and no backward of a tick starts before its head.

    Attributes:
      forward: seconds of F.
      backward: seconds of B, the full backward.
      input_gradient: seconds of I.
      weight_gradient: seconds of W.
      transfer: seconds to send an activation or its gradient to another rank.
      exposed_forward: seconds that F waits for communication inside the stage (all-to-all) which nothing hides.
      exposed_backward: the same for B or I.
      embedding: seconds to look up one microbatch.
      head: seconds of head and loss of one microbatch, with their gradient.
      embedding_gradient: seconds to add one microbatch to the gradient of the embedding.
      overlap: seconds saved when a forward and a backward that do not need each other run side by side: in one
        tick, or one right after the other.
    """

    forward: PerStage = 1.0
    backward: PerStage = 2.0
    input_gradient: PerStage = 1.0
    weight_gradient: PerStage = 1.0
    transfer: float = 0.0
    exposed_forward: PerStage = 0.0
    exposed_backward: PerStage = 0.0
    embedding: float = 0.0
    head: float = 0.0
    embedding_gradient: float = 0.0
    overlap: float = 0.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if min(value if isinstance(value, tuple) else (value,)) < 0:
                raise ValueError(f"{field.name} seconds must not be negative, got {value}")

    def seconds(self, action: Action) -> float:
        """Seconds of one action, with the communication in it that nothing hides."""
        kind, stage, _ = action
        if kind == "F":
            return _at(self.forward, stage) + _at(self.exposed_forward, stage)
        if kind == "W":
            return _at(self.weight_gradient, stage)
        return _at(self.backward if kind == "B" else self.input_gradient, stage) + _at(
            self.exposed_backward, stage
        )

    def check_stages(self, num_stages: int):
        """Refuses costs that are given for another number of stages."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) != num_stages:
                raise ValueError(
                    f"{field.name} seconds must be one number or one per stage, got {len(value)} for "
                    f"{num_stages} stages"
                )

    def edge_seconds(self, action: Action, num_stages: int) -> float:
        """Seconds of embedding or head that go with an action on the first or last stage."""
        seconds = 0.0
        if action.kind == "F":
            seconds += self.embedding if action.stage == 0 else 0.0
            seconds += self.head if action.stage == num_stages - 1 else 0.0
        elif action.kind != "W" and action.stage == 0:
            seconds += self.embedding_gradient
        return seconds


def _at(value: PerStage, stage: int) -> float:
    return value[stage] if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When every action runs.

    Attributes:
      schedule: the schedule that was timed.
      start_seconds: start of each action.
      end_seconds: end of each action.
      step_seconds: from the first start to the last end, of all ranks.
    """

    schedule: Schedule
    start_seconds: dict[Action, float]
    end_seconds: dict[Action, float]
    step_seconds: float

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """Per rank: seconds spent in actions."""
        return tuple(
            sum(self.end_seconds[a] - self.start_seconds[a] for a in actions)
            for actions in self.schedule.ranks
        )

    @property
    def bubble_seconds(self) -> float:
        """Idle seconds of the busiest rank: what the schedule adds to its work."""
        return self.step_seconds - max(self.busy_seconds)

    @property
    def rank_bubble_seconds(self) -> float:
        """What the schedule adds to the work of the busiest rank, on the rank that needs longest.

        Every rank is timed from its own first action to its own last, as the zero-bubble papers do: it may
        begin the next step while others still end this one.
        """
        spans = (
            max(self.end_seconds[a] for a in actions) - min(self.start_seconds[a] for a in actions)
            for actions in self.schedule.ranks
        )
        return max(spans) - max(self.busy_seconds)

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time, 0 to 1."""
        return 1.0 - sum(self.busy_seconds) / (self.step_seconds * self.schedule.num_ranks)

    def peak_in_flight(self) -> tuple[int, ...]:
        """Per rank: most (stage, microbatch) pairs between the start of F and the end of B or I."""
        return tuple(most_between("F", "BI", self._order(rank)) for rank in range(self.schedule.num_ranks))

    def peak_held(self) -> tuple[int, ...]:
        """Per rank: most (stage, microbatch) pairs between the start of F and the end of B or W."""
        return tuple(most_between("F", "BW", self._order(rank)) for rank in range(self.schedule.num_ranks))

    def _order(self, rank: int) -> list[Action]:
        return sorted(self.schedule.ranks[rank], key=lambda a: (self.start_seconds[a], self.end_seconds[a]))


def simulate(schedule: Schedule, costs: ActionCosts) -> Timeline:
    """Times a schedule asynchronously: a rank starts its next action when its inputs have arrived."""
    costs.check_stages(schedule.num_stages)
    rank_free = [0.0] * schedule.num_ranks
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    previous: list[Action | None] = [None] * schedule.num_ranks
    for rank, action in schedule.executable_order():
        ready = 0.0
        for group in dependencies(action, schedule.num_stages):
            need = next(a for a in group if a in end)
            sent = schedule.rank_of_stage[need.stage] != rank
            ready = max(ready, end[need] + (costs.transfer if sent else 0.0))
        seconds = costs.seconds(action) + costs.edge_seconds(action, schedule.num_stages)
        before = previous[rank]
        if action.kind in "BI" and before and before.kind == "F" and ready <= start[before]:
            seconds = max(seconds - costs.overlap, 0.0)
        start[action] = max(ready, rank_free[rank])
        end[action] = rank_free[rank] = start[action] + seconds
        previous[rank] = action
    return Timeline(
        schedule=schedule, start_seconds=start, end_seconds=end, step_seconds=max(end.values(), default=0.0)
    )


def lockstep(table: TickTable, costs: ActionCosts) -> Timeline:
    """Times a tick table in lockstep: every tick lasts as long as its slowest rank, plus one transfer.

    A tick is: exchange, embedding, F, head, B or I, W, gradient of the embedding, where all ranks meet at the
    head; or with the head of the tick before at its start (`TickTable.head_comes_first`). Embedding and head are
    work of all ranks and are not drawn as anybody's action.
    """
    num_stages = table.schedule.num_stages
    costs.check_stages(num_stages)
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    now = 0.0
    exchange = costs.transfer if table.schedule.num_ranks > 1 else 0.0
    ended = False
    for row in table.ticks:
        everything = [action for actions in row for action in actions]
        now += exchange + costs.embedding * any(a.kind == "F" and a.stage == 0 for a in everything)
        if table.head_comes_first:
            now += costs.head * ended
        ended = any(a.kind == "F" and a.stage == num_stages - 1 for a in everything)
        clocks = [now] * len(row)
        _run(row, lambda a: a.kind == "F" or a in table.before_head, clocks, costs, start, end)
        if ended and not table.head_comes_first:
            clocks = [max(clocks) + costs.head] * len(row)
        _run(row, lambda a: a.kind != "F" and a not in table.before_head, clocks, costs, start, end)
        now = max(clocks)
        now += costs.embedding_gradient * any(a.kind in "BI" and a.stage == 0 for a in everything)
    return Timeline(schedule=table.schedule, start_seconds=start, end_seconds=end, step_seconds=now)


def _run(
    row: tuple[tuple[Action, ...], ...],
    now_runs: Callable[[Action], bool],
    clocks: list[float],
    costs: ActionCosts,
    start: dict[Action, float],
    end: dict[Action, float],
):
    """Runs the actions of one part of a tick, moving each rank's clock on."""
    for rank, actions in enumerate(row):
        for action in actions:
            if now_runs(action):
                beside = action.kind in "BI" and actions[0].kind == "F" and actions[0][1:] != action[1:]
                start[action] = clocks[rank]
                seconds = max(costs.seconds(action) - costs.overlap * beside, 0.0)
                clocks[rank] = end[action] = clocks[rank] + seconds
