"""Fits of laws: parameters come back from synthetic seconds, whatever a few samples say."""

import numpy as np
import pytest

from piperjax.planner.fitting import fit_positive, quality

BYTES = np.geomspace(1e2, 1e8, 25)


def alpha_beta(values):
    return values[0] + BYTES / values[1]


def test_latency_and_rate_come_back():
    fit = fit_positive(alpha_beta, alpha_beta([2e-5, 1.25e10]), start=[1e-3, 1e8])
    assert fit.values == pytest.approx((2e-5, 1.25e10), rel=1e-3)
    assert fit.r_squared > 0.9999
    assert fit.worst_error < 1e-3
    assert fit.num_samples == 25


def test_scatter_and_outliers_move_them_little():
    rng = np.random.default_rng(0)
    seconds = alpha_beta([2e-5, 1.25e10]) * np.exp(0.03 * rng.normal(size=BYTES.size))
    seconds[[3, 11, 20]] *= [8, 20, 5]  # somebody else used the machine
    fit = fit_positive(alpha_beta, seconds, start=[1e-4, 1e9])
    assert fit.values == pytest.approx((2e-5, 1.25e10), rel=0.05)
    assert fit.typical_error < 0.05
    assert fit.worst_error > 0.7
    # Ordinary least squares is off by far more.
    design = np.stack([np.ones_like(BYTES), BYTES], axis=1)
    ordinary, _, _, _ = np.linalg.lstsq(design, seconds, rcond=None)
    assert abs(ordinary[0] / 2e-5 - 1) > 0.5


def test_what_samples_say_nothing_of_stays():
    fit = fit_positive(lambda values: BYTES / values[0] + 0 * values[1], BYTES / 1e9, start=[1e8, 7.0])
    assert fit.values == pytest.approx((1e9, 7.0), rel=1e-3)


def test_the_quality_of_predictions():
    fit = quality([1.0, 2.0, 4.4], [1.0, 2.0, 4.0])
    assert fit.typical_error == 0
    assert fit.worst_error == pytest.approx(0.1)
    assert 0.98 < fit.r_squared < 1
    assert quality([3.0], [3.0]).r_squared == 1


@pytest.mark.parametrize("seconds", [[], [1.0, 0.0], [1.0, -1.0], [np.nan]])
def test_impossible_samples_are_refused(seconds):
    with pytest.raises(ValueError, match="a fit needs positive seconds of at least one sample"):
        fit_positive(lambda values: np.ones(len(seconds)) * values[0], seconds, start=[1.0])
