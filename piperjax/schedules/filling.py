"""Weight gradients in lockstep: where a W costs nothing, and which ticks all ranks may as well share.

A tick lasts as long as its slowest rank. A rank that lacks a forward or a backward while others have both has
slack for a W. What slack cannot take goes into ticks that are lengthened for every rank at once; those are
chosen as early as they can be, so that what a W needs is kept for as short as possible.
"""

from collections import deque

from piperjax.schedules.schedule import Action

MAX_WEIGHT_GRADIENTS_PER_TICK = 2
UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}

# For each tick, for each pipe rank, its actions.
Ticks = list[list[list[Action]]]


def fill_weight_gradients(ticks: Ticks) -> Ticks:
    """Adds a W for every I, at the lowest lockstep cost in units: F, I and W one each, B two.

    In the ticks of 1F1B with at least 2 (P - 1) microbatches, and W no longer than F and I, the cost becomes
    `M (f + i + w) + (P - 1) (f + i - w)`.
    """
    ranks = range(len(ticks[0]))
    arrivals = [[sum(a.kind == "I" for a in row[rank]) for row in ticks] for rank in ranks]
    slack = [_slack(ticks, rank) for rank in ranks]
    # Ticks after the last one take what nothing else can.
    spare = max(map(_left_over, arrivals, slack))
    rooms = [[*room, *[0] * spare] for room in slack]
    arrivals = [[*arrived, *[0] * spare] for arrived in arrivals]
    lengthened = [0] * len(ticks) + [1] * spare
    last = len(lengthened) - 1
    for tick in range(len(ticks)):
        # One more at the end serves whatever one earlier serves, so moving them forward in turn is exact.
        if last < len(ticks):
            break
        lengthened[tick], lengthened[last] = 1, 0
        if any(_left_over(*pair, lengthened) for pair in zip(arrivals, rooms, strict=True)):
            lengthened[tick], lengthened[last] = 0, 1
        else:
            last -= 1
    return _placed(ticks, rooms, lengthened[: last + 1])


def _slack(ticks: Ticks, rank: int) -> list[int]:
    """Per tick: weight gradients that fit on a rank without lengthening the tick."""
    units = [[sum(UNITS[action.kind] for action in actions) for actions in row] for row in ticks]
    return [max(row) - row[rank] for row in units]


def _left_over(arrivals: list[int], slack: list[int], lengthened: list[int] | None = None) -> int:
    """Weight gradients that found no place on a rank when each goes to the earliest there is."""
    waiting = 0
    for tick, arrived in enumerate(arrivals):
        room = slack[tick] + (lengthened[tick] if lengthened else 0)
        waiting = max(0, waiting + arrived - min(room, MAX_WEIGHT_GRADIENTS_PER_TICK))
    return waiting


def _placed(ticks: Ticks, slack: list[list[int]], lengthened: list[int]) -> Ticks:
    filled = []
    waiting: list[deque[Action]] = [deque() for _ in slack]
    for tick, more in enumerate(lengthened):
        row = ticks[tick] if tick < len(ticks) else [[] for _ in slack]
        out = []
        for rank, actions in enumerate(row):
            waiting[rank] += [a._replace(kind="W") for a in actions if a.kind == "I"]
            room = min(slack[rank][tick] + more, MAX_WEIGHT_GRADIENTS_PER_TICK, len(waiting[rank]))
            out.append([*actions, *(waiting[rank].popleft() for _ in range(room))])
        filled.append(out)
    assert not any(waiting), "ticks at the end take every weight gradient that is left"
    return filled
