"""Weight gradients in lockstep: where a W costs nothing, and which ticks all ranks may as well share.

A tick lasts as long as its slowest rank. A rank that lacks a forward or a backward while others have both has
slack for a W. What slack cannot take goes into ticks that are lengthened for every rank at once; those are
chosen as early as they can be, so that what a W needs is kept for as short as possible.

All ranks meet between forward and backward, at the head. So a W that fills the place of a missing forward must be
one whose I ran in an earlier tick.
"""

from collections import deque
from typing import NamedTuple

from piperjax.schedules.schedule import Action

MAX_WEIGHT_GRADIENTS_PER_TICK = 2
UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}

# For each tick, for each pipe rank, its actions.
Ticks = list[list[list[Action]]]


class _Room(NamedTuple):
    """Weight gradients that fit on a rank in a tick without lengthening it.

    Attributes:
      before_head: in place of a forward that other ranks run.
      after_head: in place of a backward.
    """

    before_head: int
    after_head: int


NO_ROOM = _Room(0, 0)


def fill_weight_gradients(ticks: Ticks) -> Ticks:
    """Adds a W for every I, at the lowest lockstep cost in units: F, I and W one each, B two.

    In the ticks of 1F1B with at least 2 P - 1 microbatches, and W no longer than F and I, the cost becomes
    `M (f + i + w) + (P - 1) (f + i - w)`.
    """
    ranks = range(len(ticks[0]))
    arrivals = [[sum(a.kind == "I" for a in row[rank]) for row in ticks] for rank in ranks]
    slack = [_slack(ticks, rank) for rank in ranks]
    # Ticks after the last one take what nothing else can.
    spare = max(map(_left_over, arrivals, slack))
    rooms = [[*room, *[NO_ROOM] * spare] for room in slack]
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


def _slack(ticks: Ticks, rank: int) -> list[_Room]:
    """Per tick: the room on a rank."""
    rooms = []
    for row in ticks:
        units = [sum(UNITS[action.kind] for action in actions) for actions in row]
        total = max(units) - units[rank]
        forwards = [any(action.kind == "F" for action in actions) for actions in row]
        before = min(total, UNITS["F"]) if any(forwards) and not forwards[rank] else 0
        rooms.append(_Room(before, total - before))
    return rooms


def _taken(waiting: int, arrived: int, room: _Room, more: int) -> int:
    """Weight gradients that a tick takes when each goes to the earliest place there is."""
    before = min(waiting, room.before_head)
    after = min(waiting - before + arrived, room.after_head + more)
    return min(before + after, MAX_WEIGHT_GRADIENTS_PER_TICK)


def _left_over(arrivals: list[int], rooms: list[_Room], lengthened: list[int] | None = None) -> int:
    """Weight gradients that find no place on a rank."""
    waiting = 0
    for tick, arrived in enumerate(arrivals):
        more = lengthened[tick] if lengthened else 0
        waiting += arrived - _taken(waiting, arrived, rooms[tick], more)
    return waiting


def _placed(ticks: Ticks, rooms: list[list[_Room]], lengthened: list[int]) -> Ticks:
    filled = []
    waiting: list[deque[Action]] = [deque() for _ in rooms]
    for tick, more in enumerate(lengthened):
        row = ticks[tick] if tick < len(ticks) else [[] for _ in rooms]
        out = []
        for rank, actions in enumerate(row):
            arrived = [a._replace(kind="W") for a in actions if a.kind == "I"]
            taken = _taken(len(waiting[rank]), len(arrived), rooms[rank][tick], more)
            waiting[rank] += arrived
            out.append([*actions, *(waiting[rank].popleft() for _ in range(taken))])
        filled.append(out)
    assert not any(waiting), "ticks at the end take every weight gradient that is left"
    return filled
