"""Random steps are the same whenever they are drawn, differ, and can all be built and priced."""

from types import SimpleNamespace

import pytest

from benchmarks import memory_random
from benchmarks.memory import predicted_bytes
from benchmarks.memory_random import Row, random_case
from piperjax.runtime.layout import layer_layout

DRAWN = [random_case(seed=3, number=number) for number in range(60)]


def test_a_seed_and_a_number_say_which_step():
    assert random_case(seed=3, number=17).key == DRAWN[17].key
    assert random_case(seed=4, number=17).key != DRAWN[17].key


def test_drawn_steps_reach_what_plans_can_say():
    plans = [one.plan for one in DRAWN]
    assert len({one.key for one in DRAWN}) == len(DRAWN)
    assert {plan.memory_mode for plan in plans} == {"stage", "layer", "named", "products", "stash"}
    assert {one.dtype for one in DRAWN} == {"float32", "bfloat16"}
    assert {plan.overflow for plan in plans} == {"drop", "passes"}
    assert {plan.vocabulary for plan in plans} == {"split", "whole"}
    assert {plan.pipe for plan in plans} == {1, 2, 3, 4}
    assert any(len(set(plan.layers_per_stage)) > 1 for plan in plans)
    assert any(len(one.model.kinds) > 1 for one in DRAWN)
    assert max(plan.num_devices for plan in plans) <= memory_random.MOST_DEVICES


@pytest.mark.parametrize("one", DRAWN[:20], ids=lambda one: one.model.name)
def test_drawn_steps_have_a_layout_and_a_price(one):
    layout = layer_layout(one.model, one.plan.build_schedule(), one.plan.layers_per_stage)
    assert (layout.layer >= 0).sum() == one.model.num_layers
    assert predicted_bytes(one) > 0


def test_the_summary_of_four_steps_drawn_out():
    rows = [
        Row(number=number, one=SimpleNamespace(), compiled=100, predicted=100 + error)
        for number, error in enumerate((-10, 0, 4, 14))
    ]
    assert memory_random.summary(rows, under=-0.02, over=0.12) == (
        "4 random steps: mean absolute error 7.0%, median +4.0%, worst -10.0% and +14.0%; 50% within -2% to +12%, "
        "1 below, 1 above"
    )
