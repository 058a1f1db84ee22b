"""What the literature says each schedule costs and keeps, as formulas to test, print and plan with.

P pipe ranks, v chunks per rank; f, i and w are seconds of F, I and W of one chunk, b = i + w of B. Formulas in
stages are restated in chunks: a stage of a schedule with v chunks takes v (f + b), a stage's activation is v chunks'.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Case(NamedTuple):
    """What a law is asked for: pipe ranks, microbatches, chunks per rank, seconds of F, I and W of a chunk."""

    P: int
    M: int
    v: int
    f: float
    i: float
    w: float

    @property
    def one_f_one_b_bubble(self) -> float:
        """`(P - 1) (f + b)`."""
        return (self.P - 1) * (self.f + self.i + self.w)

    @property
    def zb_h1_bubble(self) -> float:
        """`(P - 1) (f + i - w)`."""
        return (self.P - 1) * (self.f + self.i - self.w)


@dataclass(frozen=True, kw_only=True)
class Law:
    """What holds for one schedule with enough microbatches.

    Attributes:
      bubble_seconds: what the schedule adds to the work of one rank.
      peak_held: most chunks of activations between F and W (or B) on the worst rank.
      fewest_microbatches: from how many microbatches on both are exact.
      per_rank: the bubble is that of each rank from its own first action to its own last; a step that ends
        on all ranks together takes `(P - 1) f` more.
      equal_times: the bubble is exact where f = i = w only.
      source: where it comes from.
    """

    bubble_seconds: float
    peak_held: int
    fewest_microbatches: int = 1
    per_rank: bool = False
    equal_times: bool = False
    source: str

    def step_bubble_seconds(self, num_ranks: int, forward: float) -> float:
        """The bubble of a step that ends on all ranks together."""
        return self.bubble_seconds + (num_ranks - 1) * forward * self.per_rank


def names() -> tuple[str, ...]:
    """Schedules that have a law."""
    return tuple(_LAWS)


def law(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    num_chunks: int = 1,
    forward: float = 1.0,
    input_gradient: float = 1.0,
    weight_gradient: float = 1.0,
) -> Law:
    """The law of a named schedule.

    Raises:
      ValueError: if the literature has none for it.
    """
    if name not in _LAWS:
        raise ValueError(f"no published law for schedule {name!r}; there is one for {', '.join(_LAWS)}")
    case = Case(num_ranks, num_microbatches, num_chunks, forward, input_gradient, weight_gradient)
    return _LAWS[name](case)


def _gpipe(case: Case) -> Law:
    return Law(bubble_seconds=case.one_f_one_b_bubble, peak_held=case.M, source="arXiv:1811.06965")


def _one_f_one_b(case: Case) -> Law:
    peak = min(case.P, case.M)
    return Law(bubble_seconds=case.one_f_one_b_bubble, peak_held=peak, source="arXiv:2006.09503")


def _interleaved(case: Case) -> Law:
    # (P - 1)(F + B) / v of a stage is (P - 1)(f + b) of a chunk; P (1 + (P - 1) / (P v)) stages are v P + P - 1 chunks.
    peak = min(case.v * case.P + case.P - 1, case.v * case.M)
    return Law(bubble_seconds=case.one_f_one_b_bubble, peak_held=peak, source="arXiv:2104.04473")


def _zb_h1(case: Case) -> Law:
    return Law(
        bubble_seconds=case.zb_h1_bubble,
        peak_held=min(case.P, case.M),
        fewest_microbatches=case.P,
        source="arXiv:2401.10241, Table 2",
    )


def _zb_dual(case: Case) -> Law:
    return Law(
        bubble_seconds=case.zb_h1_bubble,
        peak_held=min(2 * case.P - 1, case.M),
        fewest_microbatches=max(1, 2 * (case.P - 1)),
        source="ZB-H1's, in lockstep",
    )


def _zb_h2(case: Case) -> Law:
    return Law(
        bubble_seconds=(case.P - 1) * (case.f + case.i - 2 * case.w),
        peak_held=min(2 * case.P - 1, case.M),
        fewest_microbatches=2 * case.P - 1,
        per_rank=True,
        source="arXiv:2401.10241, Table 2",
    )


def _zb_v(case: Case) -> Law:
    return Law(
        bubble_seconds=0.0,
        peak_held=2 * min(case.P, case.M),
        fewest_microbatches=2 * case.P - 1,
        per_rank=True,
        equal_times=True,
        source="arXiv:2401.10241, section 6",
    )


def _v_half(case: Case) -> Law:
    units = 3 * (case.P - 1) - (case.P % 2 == 1 and case.P > 1)
    return Law(
        bubble_seconds=units * case.f,
        peak_held=2 * min(case.P // 2 + 1, case.M),
        fewest_microbatches=case.P // 2 + 1,
        equal_times=True,
        source="arXiv:2405.15362, building block; about half of 1F1B's",
    )


def _v_min(case: Case) -> Law:
    units = 4 * (case.P - 1) + (1 if case.P % 3 == 0 else -1) if case.P > 1 else 0
    return Law(
        bubble_seconds=units * case.f,
        peak_held=2 * min(-(-(case.P + 2) // 3), case.M),
        fewest_microbatches=min(case.P, 2),
        equal_times=True,
        source="arXiv:2405.15362, building block; about two thirds of 1F1B's",
    )


def _dualpipe_v(case: Case) -> Law:
    # The README counts stages, two per rank, and b as the full backward: (2P / 2 - 1)(F&B + b - 3w), F&B = f + b.
    return Law(
        bubble_seconds=(case.P - 1) * (case.f + 2 * (case.i + case.w) - 3 * case.w),
        peak_held=2 * case.P + 1,
        fewest_microbatches=2 * case.P,
        equal_times=True,
        source="github.com/deepseek-ai/DualPipe, README",
    )


_LAWS: dict[str, Callable[[Case], Law]] = {
    "gpipe": _gpipe,
    "one_f_one_b": _one_f_one_b,
    "interleaved": _interleaved,
    "zb_h1": _zb_h1,
    "zb_h2": _zb_h2,
    "zb_dual": _zb_dual,
    "zb_v": _zb_v,
    "v_half": _v_half,
    "v_min": _v_min,
    "dualpipe_v": _dualpipe_v,
}
