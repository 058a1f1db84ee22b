"""Every schedule over a grid against its published law: actions, deadlock, bubble, what is held, lockstep.

By default the corners and the middle of the grid P <= 16, M <= 64, v <= 4; all of it with `-m slow`. Equal times mean
F = I = W = 1 and B = 2.

Approximate in the literature are V-Half ("1/2 of 1F1B's bubble, P / 2 activations") and V-Min ("2/3, P / 3"): here
`laws` has the exact numbers of the building blocks and the test bounds them by those fractions. DualPipeV's formula
takes a pair F&B as one action; simulated one after the other, F's result leaves before B ends and the bubble is P - 1
chunks, so both are tested.
"""

from functools import cache

import pytest

from piperjax.schedules import laws, registry
from piperjax.schedules.filling import RECOMPUTING_UNITS, UNITS
from piperjax.schedules.laws import law
from piperjax.schedules.lower import lower
from piperjax.schedules.schedule import Action, dependencies
from piperjax.schedules.ticks import pack
from piperjax.schedules.timeline import ActionCosts, lockstep, simulate

EQUAL = ActionCosts()
RANKS, MICROBATCHES = (1, 2, 3, 4, 7, 8, 16), (1, 2, 3, 4, 8, 16, 33, 64)
SLOW = pytest.mark.slow
CASES = [(name, 0) for name in laws.names() if name != "interleaved"]
CASES += [("interleaved", v) for v in (2, 3, 4)]


def grid(everything):
    for P in range(1, 17) if everything else RANKS:
        for M in range(1, 65) if everything else MICROBATCHES:
            yield P, M


def schedules(name, v, everything):
    for P, M in grid(everything):
        if (name == "interleaved" and M % P) or (name == "dualpipe_v" and M < 2 * P):
            with pytest.raises(ValueError):
                registry.build(name, P, M, v)
        else:
            yield registry.build(name, P, M, v)


parts = pytest.mark.parametrize("everything", [False, pytest.param(True, marks=SLOW)], ids=["part", "all"])
cases = pytest.mark.parametrize(("name", "v"), CASES, ids=str)


@parts
@cases
def test_law(name, v, everything):
    for schedule in schedules(name, v, everything):
        check_actions(schedule)
        timeline = simulate(schedule, EQUAL)
        P, M = schedule.num_ranks, schedule.num_microbatches
        expected = law(name, P, M, num_chunks=schedule.num_chunks)
        if expected.fewest_microbatches <= M:
            bubble = timeline.rank_bubble_seconds if expected.per_rank else timeline.bubble_seconds
            if name != "dualpipe_v":
                assert bubble == expected.bubble_seconds, (P, M)
                assert timeline.bubble_seconds == expected.step_bubble_seconds(P, 1.0), (P, M)
            else:
                assert bubble == P - 1 <= expected.bubble_seconds or P == 1
                assert bubble_of_whole_pairs(schedule) == pytest.approx(expected.bubble_seconds), (P, M)
        else:
            assert timeline.bubble_seconds <= 3 * schedule.num_chunks * (P - 1), "never worse than 1F1B"
        assert max(timeline.peak_held()) <= expected.peak_held
        if expected.fewest_microbatches <= M:
            assert max(timeline.peak_held()) == expected.peak_held, (P, M)


@parts
@cases
def test_ticks(name, v, everything):
    for schedule in schedules(name, v, everything):
        table = pack(schedule)
        P, M, chunks = schedule.num_ranks, schedule.num_microbatches, schedule.num_chunks
        check_table(table)
        held = max(table.peak_held())
        if schedule.clock == "single":
            assert held == max(simulate(schedule, EQUAL).peak_held())
        elif name in ("one_f_one_b", "zb_h1", "zb_dual"):
            # One action per tick, where that is shorter, keeps the schedule's own peak.
            own = max(simulate(schedule, EQUAL).peak_in_flight())
            assert max(table.peak_in_flight()) in (min(2 * P - 1, M), own)
        elif chunks == 2 and name != "interleaved":
            assert 2 * min(P, M) <= max(table.peak_in_flight()) <= 2 * P + 1
            assert held <= 2 * P + 1 + P // 2
        assert held <= max(2 * P * chunks, M if name == "gpipe" else 0)


@cases
def test_slots_are_coloured_within_the_peak(name, v):
    for P, M in ((2, 4), (4, 8), (4, 16), (8, 16), (8, 32)):
        table = pack(registry.build(name, P, M, v))
        lowered = lower(table)
        assert lowered.num_stash_slots <= max(table.peak_held())
        assert lowered.num_stash_slots >= max(table.peak_in_flight())


@parts
@cases
def test_lockstep_costs_what_asynchronous_does(name, v, everything):
    worst = 0.0
    for schedule in schedules(name, v, everything):
        P, M = schedule.num_ranks, schedule.num_microbatches
        ratio = lockstep(pack(schedule), EQUAL).step_seconds / simulate(schedule, EQUAL).step_seconds
        assert ratio <= 1.05, (P, M, ratio)
        worst = max(worst, ratio)
    print(f"{name} {v or ''}: lockstep / asynchronous at most {worst:.4f}")


# Every day equal times, and the most unequal.
@pytest.mark.parametrize(
    "times",
    [
        (1.0, 1.0, 1.0),
        pytest.param((1.0, 2.0, 1.0), marks=SLOW),
        pytest.param((1.2, 1.5, 0.9), marks=SLOW),
        (2.0, 3.0, 0.5),
    ],
)
def test_dual_ticks_need_no_equal_times(times):
    f, i, w = times
    costs = ActionCosts(forward=f, backward=i + w, input_gradient=i, weight_gradient=w)
    for P in (1, 2, 3, 4, 8, 16):
        for M in (2 * P, 3 * P, 64):
            for name in ("one_f_one_b", "gpipe", "interleaved", "zb_h1", "zb_dual", "zb_v", "dualpipe_v"):
                if name == "interleaved" and M % P:
                    continue
                table = packed(name, P, M)
                work = table.schedule.num_chunks * M * (f + i + w)
                wave, v = f + i - w, f + i + max(f, i) - 2 * w
                hop = {"zb_h1": wave, "zb_dual": wave, "zb_v": v, "dualpipe_v": v}.get(name, f + i + w)
                bubble = (P - 1) * hop
                assert lockstep(table, costs).step_seconds == pytest.approx(work + bubble), (name, P, M)


@pytest.mark.parametrize("units", [UNITS, RECOMPUTING_UNITS], ids=["equal", "recomputing"])
def test_few_microbatches_get_the_cheapest_table_for_the_times_given(units):
    f, i, w = (units[kind] for kind in "FIW")
    costs = ActionCosts(forward=f, backward=i + w, input_gradient=i, weight_gradient=w)
    for P in (2, 3, 4, 8, 16):
        for M in {1, P // 2, P, P + 1, 5 * P // 4, 3 * P // 2, 2 * P - 2} - {0}:
            schedule = registry.build("zb_h1", P, M)
            found = lockstep(pack(schedule, units=units), costs).step_seconds
            single = lockstep(pack(schedule, "single"), costs).step_seconds
            # The wave with every W beside an I or after the last one, which is the least that `filling` may do.
            wave = (M + P - 1) * (f + i) + M * w
            assert found <= min(single, wave), (P, M)


@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.2, 1.5, 0.9), (2.0, 3.0, 0.5)])
def test_asynchronous_laws_that_need_no_equal_times(times):
    f, i, w = times
    costs = ActionCosts(forward=f, backward=i + w, input_gradient=i, weight_gradient=w)
    for name in laws.names():
        for P, M in ((1, 4), (2, 4), (4, 8), (4, 32), (8, 32), (16, 64)):
            schedule = registry.build(name, P, M)
            expected = law(
                name, P, M, num_chunks=schedule.num_chunks, forward=f, input_gradient=i, weight_gradient=w
            )
            if expected.equal_times or expected.per_rank:
                continue
            assert simulate(schedule, costs).bubble_seconds == pytest.approx(expected.bubble_seconds), (P, M)


def test_halves_and_thirds():
    for P in range(2, 17):
        one_f_one_b = 6 * (P - 1)
        half, least = law("v_half", P, 64), law("v_min", P, 64)
        assert 0.4 * one_f_one_b <= half.bubble_seconds <= 0.5 * one_f_one_b
        assert 0.5 * one_f_one_b <= least.bubble_seconds <= 0.75 * one_f_one_b
        assert P / 2 <= half.peak_held / 2 <= P / 2 + 1
        assert P / 3 <= least.peak_held / 2 <= P / 3 + 4 / 3


def test_every_named_schedule_has_a_law():
    assert set(laws.names()) == set(registry.names()) - {"auto"}


def test_an_unknown_law_is_one_sentence():
    with pytest.raises(ValueError, match="no published law for schedule 'mine'"):
        law("mine", 2, 2)


@cache
def packed(name, P, M):
    return pack(registry.build(name, P, M), "dual")


@cache
def needs(action, num_stages):
    return dependencies(action, num_stages)


def check_actions(schedule):
    """Each action once, in an order that runs to its end: what `Schedule` promises, counted again."""
    order = [action for _, action in schedule.executable_order()]
    assert len(order) == len(set(order)) == sum(map(len, schedule.ranks))
    cells = schedule.num_stages * schedule.num_microbatches
    kinds = [action.kind for action in order]
    assert kinds.count("F") == cells == kinds.count("B") + kinds.count("I")
    assert kinds.count("I") == kinds.count("W")


def check_table(table):
    """The executor's rules: one F, one B or I, two W a tick, in that order; what is sent arrives a tick later."""
    schedule, tick_of = table.schedule, table.tick_of()
    assert sorted(tick_of) == sorted(a for actions in schedule.ranks for a in actions)
    for row in table.ticks:
        for actions in row:
            kinds = "".join(action.kind for action in actions)
            forwards, rest = kinds[: kinds.startswith("F")], kinds[kinds.startswith("F") :]
            assert forwards in ("", "F")
            assert rest[rest[:1] in ("B", "I") :] in ("", "W", "WW")
    for action, tick in tick_of.items():
        for group in needs(action, schedule.num_stages):
            for need in group:
                if need in tick_of:
                    assert tick_of[need] + (need.stage != action.stage) <= tick


def bubble_of_whole_pairs(schedule):
    """Bubble at equal times if DualPipeV's pairs F&B start and end as one action."""
    P, M = schedule.num_ranks, schedule.num_microbatches
    queues = []
    for rank, actions in enumerate(schedule.ranks):
        behind = P - rank - 1
        start = 2 * behind + 2 * (rank + 1) + 3 * behind
        main = start + 4 * (M - 2 * P + rank + 1)
        groups = [[a] for a in actions[:start]]
        groups += [list(actions[at : at + 2]) for at in range(start, main, 2)]
        if rank == P - 1 and main > start:
            groups[start : start + 1] = [[a] for a in groups[start]]
        for at in range(main, main + 3 * behind, 3):
            groups += [[actions[at]], list(actions[at + 1 : at + 3])]
        groups += [[a] for a in actions[main + 3 * behind :]]
        queues.append(groups)
    end, free, positions = {}, [0.0] * P, [0] * P
    moved = True
    while moved:
        moved = False
        for rank, groups in enumerate(queues):
            while positions[rank] < len(groups):
                group = groups[positions[rank]]
                outside = [
                    [need for need in alternatives if need in end]
                    for action in group
                    for alternatives in needs(action, 2 * P)
                    if not set(alternatives) & set(group)
                ]
                if not all(outside):
                    break
                begin = max([free[rank], *(end[found[0]] for found in outside)])
                free[rank] = begin + sum(EQUAL.seconds(action) for action in group)
                end |= dict.fromkeys(group, free[rank])
                positions[rank] += 1
                moved = True
    assert all(Action("B", 2 * P - 1, m) in end or Action("I", 2 * P - 1, m) in end for m in range(M))
    return max(end.values()) - 6 * M
