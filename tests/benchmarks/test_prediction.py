"""What the benchmark of predictions says of the planner's choice."""

from benchmarks.prediction import RIVAL_TURNS, RIVALS, Steps, _name, make_plans
from meshes.platform import load_platform

PLANS = make_plans(load_platform("cpu8"))


class Slowing(Steps):
    """Steps without trainings: a plan takes its own seconds, all of them twice as long at last."""

    def __init__(self, seconds):
        super().__init__(None)
        self.seconds = {_name(plan): one for plan, one in zip(PLANS, seconds, strict=True)}
        self.taken = {name: [one] for name, one in self.seconds.items()}
        self.turns = []

    def take(self, plans=()):
        self.turns.append([_name(plan) for plan in plans])
        for name in dict.fromkeys(self.turns[-1]):
            self.taken[name].append(2 * self.seconds[name])


def test_the_choice_is_judged_in_turns_with_the_quickest_alone():
    """Not by what steps took before: everything is slower now, and the choice by as much."""
    steps = Slowing([3.0, 1.0, 4.0, 1.1, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0, 5.0, 8.0])
    assert steps.over_best(PLANS[6], PLANS) == 2.0
    assert len(steps.turns) == RIVAL_TURNS
    assert all(turn[0] == _name(PLANS[6]) and len(turn) == 1 + RIVALS for turn in steps.turns)
    assert set(steps.turns[0]) == {_name(PLANS[i]) for i in (6, 1, 3)}


def test_the_quickest_plan_is_no_slower_than_itself():
    steps = Slowing([3.0, 1.0, 4.0, 1.1, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0, 5.0, 8.0])
    assert steps.over_best(PLANS[1], PLANS) == 1.0
