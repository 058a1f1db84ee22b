"""Weight gradients in lockstep: where a W costs nothing, and which ticks all ranks may as well share.

A tick lasts as long as its slowest rank. A rank that lacks a forward or a backward while others have both has
slack for a W. What slack cannot take goes into ticks that are lengthened for every rank at once; those are
chosen as early as they can be, so that what a W needs is kept for as short as possible.

All ranks meet between forward and backward, at the head. So a W that fills the place of a missing forward must be
one whose I ran in an earlier tick.
"""

from collections import deque
from itertools import repeat
from typing import NamedTuple

from piperjax.schedules.schedule import Action

MAX_WEIGHT_GRADIENTS_PER_TICK = 2
# Relative times: equal ones, and those of a backward that runs its forward again.
UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}
RECOMPUTING_UNITS = {"F": 1, "B": 3, "I": 2, "W": 1}

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
    slack = list(zip(*map(_slack, ticks), strict=True))
    # Ticks after the last one take what nothing else can.
    spare = max(map(_left_over, arrivals, slack))
    rooms = [[*room, *[NO_ROOM] * spare] for room in slack]
    arrivals = [[*arrived, *[0] * spare] for arrived in arrivals]
    lengthened = [0] * len(ticks) + [1] * spare
    lengthened = _moved_forward(lengthened, len(ticks), list(zip(arrivals, rooms, strict=True)))
    return _placed(ticks, rooms, lengthened)


def _moved_forward(
    lengthened: list[int], num_ticks: int, ranks: list[tuple[list[int], list[_Room]]]
) -> list[int]:
    """Lengthens ticks as early as possible instead of adding ticks at the end.

    One more at the end serves whatever one earlier serves, so moving them forward in turn is exact, and as many in a
    row can be moved as can be moved together.
    """
    tick = 0
    while tick < num_ticks < len(lengthened):
        low, high = 0, min(len(lengthened) - num_ticks, num_ticks - tick)
        number = 1
        while low < high:
            trial = _moved(lengthened, tick, number)
            blocking = next((at for at, rank in enumerate(ranks) if _left_over(*rank, trial)), None)
            if blocking is None:
                low = number
            else:
                high = number - 1
                ranks.insert(0, ranks.pop(blocking))  # It will block the next ones, too.
            number = min(2 * number, high) if blocking is None and high > 2 * low else (low + high + 1) // 2
        lengthened = _moved(lengthened, tick, low)
        tick += low + 1
    return lengthened


def _moved(lengthened: list[int], tick: int, number: int) -> list[int]:
    """The last ticks given up for `number` from `tick` on."""
    kept = len(lengthened) - number
    return [*lengthened[:tick], *[1] * number, *lengthened[tick + number : kept]]


def _slack(row: list[list[Action]]) -> list[_Room]:
    """The room on each rank in a tick."""
    units = [sum(UNITS[action.kind] for action in actions) for actions in row]
    forwards = [any(action.kind == "F" for action in actions) for actions in row]
    longest, some_forward = max(units), any(forwards)
    rooms = []
    for own, forward in zip(units, forwards, strict=True):
        before = min(longest - own, UNITS["F"]) if some_forward and not forward else 0
        rooms.append(_Room(before, longest - own - before))
    return rooms


def _taken(waiting: int, arrived: int, room: _Room, more: int) -> int:
    """Weight gradients that a tick takes when each goes to the earliest place there is."""
    before = min(waiting, room.before_head)
    after = min(waiting - before + arrived, room.after_head + more)
    return min(before + after, MAX_WEIGHT_GRADIENTS_PER_TICK)


def _left_over(arrivals: list[int], rooms: list[_Room], lengthened: list[int] | None = None) -> int:
    """Weight gradients that find no place on a rank; `_taken` written out, because this is most of the work."""
    waiting = 0
    for arrived, (before, after), more in zip(arrivals, rooms, lengthened or repeat(0), strict=False):
        early = min(before, waiting)
        waiting += arrived - early
        waiting -= min(after + more, MAX_WEIGHT_GRADIENTS_PER_TICK - early, waiting)
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
