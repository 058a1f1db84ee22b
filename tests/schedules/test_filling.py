"""Weight gradients in ticks: never before I, at most two, as cheap as exhaustive search can make them."""

from itertools import product

import pytest

from piperjax.schedules.filling import MAX_WEIGHT_GRADIENTS_PER_TICK, UNITS, fill_weight_gradients
from piperjax.schedules.schedule import Action
from piperjax.schedules.ticks import pack
from piperjax.schedules.zero_bubble import zb_dual


def wave(P, M):
    """Ticks of 1F1B with input gradients alone."""
    ticks = [[[] for _ in range(P)] for _ in range(M + 2 * (P - 1))]
    for stage, m in product(range(P), range(M)):
        ticks[m + stage][stage].append(Action("F", stage, m))
    for stage, m in product(range(P), range(M)):
        ticks[m + 2 * (P - 1) - stage][stage].append(Action("I", stage, m))
    return ticks


def units(ticks):
    return sum(max(sum(UNITS[a.kind] for a in actions) for actions in row) for row in ticks)


def test_every_input_gradient_gets_its_weight_gradient():
    for P, M in product((1, 2, 3, 5, 8), (1, 2, 3, 4, 7, 12, 20)):
        filled = fill_weight_gradients(wave(P, M))
        tick_of = {a: tick for tick, row in enumerate(filled) for actions in row for a in actions}
        assert len(tick_of) == 3 * P * M
        for action, tick in tick_of.items():
            if action.kind == "W":
                assert tick >= tick_of[action._replace(kind="I")]
        for row in filled:
            for actions in row:
                assert "".join(a.kind for a in actions).lstrip("F").lstrip("I").strip("W") == ""
                assert sum(a.kind == "W" for a in actions) <= MAX_WEIGHT_GRADIENTS_PER_TICK


@pytest.mark.parametrize(("P", "M"), [(2, 1), (2, 2), (2, 4), (3, 1), (3, 2), (3, 3)])
def test_no_choice_of_lengthened_ticks_is_cheaper(P, M):
    ticks = wave(P, M)
    empty = [[[] for _ in range(P)] for _ in range(2)]
    rows = ticks + empty
    cost = [[sum(UNITS[a.kind] for a in actions) for actions in row] for row in rows]
    best = None
    for more in product(range(3), repeat=len(rows)):
        for rank in range(P):
            waiting = 0
            for tick, row in enumerate(rows):
                arrived = sum(a.kind == "I" for a in row[rank])
                slack = max(cost[tick]) - cost[tick][rank]
                lacks_forward = any(a.kind == "F" for other in row for a in other) and not any(
                    a.kind == "F" for a in row[rank]
                )
                # In place of a forward, before the head, only what waited already.
                early = min(waiting, slack, int(lacks_forward))
                late = min(waiting - early + arrived, slack - min(slack, int(lacks_forward)) + more[tick])
                waiting += arrived - min(early + late, 2)
            if waiting:
                break
        else:
            best = min(sum(more), best if best is not None else sum(more))
    assert units(fill_weight_gradients(ticks)) == units(ticks) + best


def test_few_weight_gradients_wait():
    for P, M in ((2, 8), (4, 16), (8, 64)):
        assert max(pack(zb_dual(P, M)).peak_waiting()) <= 2 * P - 1
