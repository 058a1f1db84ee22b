"""The simulator against published measurements; `benchmarks/published_schedules.py` holds them with their sources."""

import pytest

from benchmarks.published_schedules import (
    DEEPSEEK_V3,
    MI300X,
    TABLE_5,
    deepseek_v3,
    infer_times,
    mi300x_rates,
    table_5_errors,
)


@pytest.mark.parametrize(
    "group",
    [*TABLE_5[:2], *(pytest.param(group, marks=pytest.mark.slow) for group in TABLE_5[2:])],
    ids=lambda group: group.model,
)
def test_bubble_rates_of_the_zero_bubble_paper(group):
    w, transfer = infer_times(group)
    assert 0.15 < w < 1 / 3 and 0 < transfer < 0.05
    errors = table_5_errors(group)
    assert {name for name, _ in errors} == {"interleaved", "zb_h2"}
    assert max(map(abs, errors.values())) < 0.01  # The bar is 0.03.


def test_deepseek_v3_step_from_its_phases():
    _, step = deepseek_v3()
    assert step == pytest.approx(DEEPSEEK_V3["step"], rel=0.1)


def test_order_of_schedules_on_mi300x():
    rates = mi300x_rates()
    assert list(rates) == list(MI300X)
    for name, rate in rates.items():
        published = MI300X[name] / MI300X["one_f_one_b"]
        assert rate / rates["one_f_one_b"] == pytest.approx(published, rel=0.05)
