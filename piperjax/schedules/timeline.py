"""Two clocks for one schedule: the asynchronous one of the literature, and our lockstep one.

Both price the same actions. `simulate` lets a rank start an action as soon as its inputs are there, as
the published bubble formulas assume. `lockstep` prices a tick table: a step is the sum over ticks of the
slowest rank's tick, which is what the executor does.
"""

from dataclasses import dataclass

from piperjax.schedules.schedule import Action, Schedule, dependencies
from piperjax.schedules.ticks import TickTable


@dataclass(frozen=True, kw_only=True)
class ActionCosts:
    """Seconds of each action, by stage; one number means the same for all stages.

    Attributes:
      forward: seconds of F.
      backward: seconds of B, the full backward.
      input_gradient: seconds of I.
      weight_gradient: seconds of W.
      transfer: seconds to send an activation or its gradient to another rank.
    """

    forward: float | tuple[float, ...] = 1.0
    backward: float | tuple[float, ...] = 2.0
    input_gradient: float | tuple[float, ...] = 1.0
    weight_gradient: float | tuple[float, ...] = 1.0
    transfer: float = 0.0

    def __post_init__(self):
        for name in ("forward", "backward", "input_gradient", "weight_gradient", "transfer"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 0:
                raise ValueError(f"{name} seconds must not be negative, got {value}")

    def seconds(self, action: Action) -> float:
        """Seconds of one action."""
        field = {"F": "forward", "B": "backward", "I": "input_gradient", "W": "weight_gradient"}[action.kind]
        value = getattr(self, field)
        return value[action.stage] if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When every action runs.

    Attributes:
      schedule: the schedule that was timed.
      start_seconds: start of each action.
      end_seconds: end of each action.
    """

    schedule: Schedule
    start_seconds: dict[Action, float]
    end_seconds: dict[Action, float]

    @property
    def step_seconds(self) -> float:
        """Seconds from the first start to the last end."""
        return max(self.end_seconds.values())

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
    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time, 0 to 1."""
        return 1.0 - sum(self.busy_seconds) / (self.step_seconds * self.schedule.num_ranks)

    def peak_in_flight(self) -> tuple[int, ...]:
        """Per rank: most (stage, microbatch) pairs between the start of F and the end of B or I."""
        peaks = []
        for actions in self.schedule.ranks:
            live = peak = 0
            for action in actions:
                live += action.kind == "F"
                peak = max(peak, live)
                live -= action.kind in "BI"
            peaks.append(peak)
        return tuple(peaks)


def simulate(schedule: Schedule, costs: ActionCosts) -> Timeline:
    """Times a schedule asynchronously: a rank starts its next action when its inputs have arrived."""
    rank_free = [0.0] * schedule.num_ranks
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    for rank, action in schedule.executable_order():
        ready = rank_free[rank]
        for group in dependencies(action, schedule.num_stages):
            need = next(a for a in group if a in end)
            sent = schedule.rank_of_stage[need.stage] != rank
            ready = max(ready, end[need] + (costs.transfer if sent else 0.0))
        start[action] = ready
        end[action] = rank_free[rank] = ready + costs.seconds(action)
    return Timeline(schedule=schedule, start_seconds=start, end_seconds=end)


def lockstep(table: TickTable, costs: ActionCosts) -> Timeline:
    """Times a tick table in lockstep: every tick lasts as long as its slowest rank, plus one transfer."""
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    tick_start = 0.0
    exchange = costs.transfer if table.schedule.num_ranks > 1 else 0.0
    for row in table.ticks:
        tick_start += exchange
        tick_end = tick_start
        for actions in row:
            now = tick_start
            for action in actions:
                start[action] = now
                now = end[action] = now + costs.seconds(action)
            tick_end = max(tick_end, now)
        tick_start = tick_end
    return Timeline(schedule=table.schedule, start_seconds=start, end_seconds=end)
