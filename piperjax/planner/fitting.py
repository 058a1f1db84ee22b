"""This file fits laws to measured seconds: positive parameters, relative deviations, outliers counted little."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Deviations below this are averaged, as a part of the measured seconds; larger ones count as outliers.
SCATTER = 0.2
# How firmly parameters that the samples say nothing of stay where they began.
PRIOR = 1e-3


class Fit(NamedTuple):
    """A law through samples.

    Attributes:
      values: the parameters.
      r_squared: of the logarithm of seconds, as samples span orders of magnitude; 1 is perfect.
      typical_error: median of the deviations, as a part of the measured seconds.
      worst_error: largest of them.
      num_samples: samples.
    """

    values: tuple[float, ...]
    r_squared: float
    typical_error: float
    worst_error: float
    num_samples: int


def fit_positive(
    law: Callable[[np.ndarray], np.ndarray],
    seconds: Sequence[float],
    start: Sequence[float],
    *,
    rounds: int = 200,
) -> Fit:
    """Fits the parameters of a law to measured seconds, by the least deviation of logarithms.

    Iteratively reweighted least squares: a sample that deviates by more than `SCATTER` weighs the less the more it
    does (the cost is hypot(r, SCATTER), least absolute deviation far away), so that a few disturbed samples do not pull
    the law away from the others. Steps are those of Levenberg and Marquardt in the
    logarithms of the parameters, which therefore stay positive.

    Args:
      law: from parameters to the seconds of every sample, all positive.
      seconds: measured, all positive.
      start: a guess within a few orders of magnitude.
      rounds: steps at most.

    Raises:
      ValueError: if there are no samples, or one of them is not positive.
    """
    measured = np.asarray(seconds, float)
    if measured.size == 0 or not np.all(np.isfinite(measured)) or np.any(measured <= 0):
        raise ValueError(f"a fit needs positive seconds of at least one sample, got {measured.tolist()}")
    target = np.log(measured)
    origin = np.log(np.asarray(start, float))

    def deviations(point: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.log(law(np.exp(point))) - target

    def cost(point: np.ndarray) -> float:
        total = np.sum(np.hypot(deviations(point), SCATTER)) + PRIOR * np.sum((point - origin) ** 2)
        return total if np.isfinite(total) else np.inf

    point, damping, best = origin, 1e-2, cost(origin)
    for _ in range(rounds):
        step = _step(deviations, point, origin, damping)
        trial = cost(point + step)
        if trial < best:
            is_done = best - trial < 1e-10 * best
            point, best, damping = point + step, trial, max(damping / 4, 1e-9)
            if is_done:
                break
        else:
            damping *= 5
            if damping > 1e9:
                break
    return quality(law(np.exp(point)), measured, values=np.exp(point))


def quality(predicted: Sequence[float], seconds: Sequence[float], *, values: Sequence[float] = ()) -> Fit:
    """How well predictions meet measured seconds."""
    predicted, measured = np.asarray(predicted, float), np.asarray(seconds, float)
    deviation = np.log(predicted / measured)
    spread = np.sum((np.log(measured) - np.mean(np.log(measured))) ** 2)
    errors = np.abs(predicted / measured - 1)
    return Fit(
        values=tuple(float(value) for value in values),
        r_squared=float(1 - np.sum(deviation**2) / spread) if spread > 0 else 1.0,
        typical_error=float(np.median(errors)),
        worst_error=float(np.max(errors)),
        num_samples=measured.size,
    )


def _step(
    deviations: Callable[[np.ndarray], np.ndarray], point: np.ndarray, origin: np.ndarray, damping: float
) -> np.ndarray:
    now = deviations(point)
    small = 1e-5
    slopes = np.stack(
        [(deviations(point + shift) - now) / small for shift in small * np.eye(point.size)], axis=1
    )
    weights = 1 / np.hypot(now, SCATTER)
    normal = slopes.T @ (weights[:, None] * slopes) + 2 * PRIOR * np.eye(point.size)
    gradient = slopes.T @ (weights * now) + 2 * PRIOR * (point - origin)
    damped = normal + damping * np.diag(np.diag(normal) + 1e-9)
    step = -np.linalg.solve(damped, gradient)
    # No parameter moves by more than a factor e^2 at once: laws flatten far away.
    return np.clip(step, -2.0, 2.0)
