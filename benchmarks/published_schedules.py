"""The simulator against published measurements of pipeline schedules.

    python -m benchmarks.published_schedules

Only numbers that others measured, with their source. Three bars: bubble rates of the zero-bubble paper from times
inferred from two of its columns (0.03), DeepSeek-V3's step from its own phase times (10 %), and the order of
schedules measured on MI300X.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import cache

from piperjax.schedules import registry
from piperjax.schedules.schedule import Schedule
from piperjax.schedules.timeline import ActionCosts, Timeline, simulate

# Qi et al., Zero Bubble Pipeline Parallelism, arXiv:2401.10241, Table 5: (cost - M (F + B + W)) / cost, by number
# of microbatches. The columns are 1F1B, 1F1B-I, ZB-H1 and ZB-H2. Of the two their search found, ZB-1p equals ZB-H1
# in every row, and ZB-2p, up to twice the memory, has almost no bubble left.
COLUMNS = ("one_f_one_b", "interleaved", "zb_h1", "zb_h2")
INFERRED_FROM = ("one_f_one_b", "zb_h1")


@dataclass(frozen=True)
class BubbleRates:
    """One model of Table 5.

    Attributes:
      model: parameters.
      num_ranks: pipe ranks.
      num_chunks: chunks of 1F1B-I, one layer each: (layers + 2) / ranks, as embedding and head count as layers.
      rates: for each number of microbatches the rate of each column.
    """

    model: str
    num_ranks: int
    num_chunks: int
    rates: dict[int, tuple[float, ...]]


TABLE_5 = (
    BubbleRates(
        "1.5B",
        8,
        3,
        {
            24: (0.2431, 0.1055, 0.1585, 0.1083),
            32: (0.1985, 0.0818, 0.1242, 0.0837),
            64: (0.1240, 0.0443, 0.0674, 0.0444),
        },
    ),
    BubbleRates(
        "6.2B",
        8,
        4,
        {
            24: (0.2347, 0.0808, 0.1323, 0.0698),
            32: (0.1898, 0.0628, 0.1045, 0.0559),
            64: (0.1091, 0.0320, 0.0554, 0.0294),
        },
    ),
    BubbleRates(
        "14.6B",
        16,
        3,
        {
            48: (0.2552, 0.1104, 0.1397, 0.0672),
            64: (0.2082, 0.0852, 0.1088, 0.0516),
            128: (0.1251, 0.0445, 0.0576, 0.0266),
        },
    ),
    BubbleRates(
        "28.3B",
        32,
        2,
        {
            96: (0.2646, 0.1493, 0.1421, 0.0641),
            128: (0.2168, 0.1164, 0.1106, 0.0490),
            256: (0.1352, 0.0624, 0.0594, 0.0257),
        },
    ),
)

# Insights into DeepSeek-V3 (ISCA 2025, arXiv:2505.09343), Table 4, multi-plane network: seconds of one step.
# 2048 H800, 16 pipe ranks running DualPipe, 15 360 sequences over 128 data-parallel groups, one per microbatch.
DEEPSEEK_V3 = {
    "step": 19.926,
    "1F": 1.13,
    "1B": 1.99,
    "1W": 0.48,
    "1F1B": 13.95,
    "bubble": 2.06,
    "optimizer": 0.29,
}
DEEPSEEK_V3_RANKS, DEEPSEEK_V3_MICROBATCHES = 16, 15_360 // 128

# AMD Primus, technical blog on pipeline schedules: Llama2-7B on 8 MI300X, PP8; TFLOP/s per device.
MI300X = {
    "zb_h1": 268.0,
    "zb_v": 265.9,
    "interleaved": 257.3,
    "v_half": 255.1,
    "one_f_one_b": 235.7,
    "v_min": 208.5,
}
# Its times and number of microbatches are not published. These are plausible, in units of a stage's forward: a
# transfer is a tenth of it, and every F, B and I of a chunk loses four hundredths to launching and sending.
MI300X_RANKS, MI300X_MICROBATCHES = 8, 48
MI300X_COSTS = {"forward": 1.0, "input_gradient": 1.1, "weight_gradient": 1.1}
MI300X_TRANSFER, MI300X_LOST = 0.1, 0.04


@cache
def _schedule(name: str, num_ranks: int, num_microbatches: int, num_chunks: int = 0) -> Schedule:
    return registry.build(name, num_ranks, num_microbatches, num_chunks)


def _per_chunk(schedule: Schedule, stage: dict[str, float], **others: float) -> ActionCosts:
    """Costs of a schedule's chunks from those of a whole stage."""
    times = {name: seconds / schedule.num_chunks for name, seconds in stage.items()}
    backward = times["input_gradient"] + times["weight_gradient"]
    return ActionCosts(**times, backward=backward, **others)


def bubble_rate(group: BubbleRates, name: str, num_microbatches: int, w: float, transfer: float) -> float:
    """Bubble rate as the paper counts it, where F + I + W = 1, F = I and W = w."""
    chunks = group.num_chunks if name == "interleaved" else 0
    schedule = _schedule(name, group.num_ranks, num_microbatches, chunks)
    stage = {"forward": (1 - w) / 2, "input_gradient": (1 - w) / 2, "weight_gradient": w}
    timeline = simulate(schedule, _per_chunk(schedule, stage, transfer=transfer))
    bubble = timeline.rank_bubble_seconds
    return bubble / (bubble + max(timeline.busy_seconds))


def infer_times(group: BubbleRates, *, steps: int = 6) -> tuple[float, float]:
    """(w, transfer) that explain the columns 1F1B and ZB-H1 best: Gauss-Newton on their bubble rates."""
    w, transfer, delta = 0.25, 0.01, 1e-3

    def errors(w: float, transfer: float) -> list[float]:
        return [
            bubble_rate(group, name, m, w, transfer) - rates[COLUMNS.index(name)]
            for m, rates in group.rates.items()
            for name in INFERRED_FROM
        ]

    for _ in range(steps):
        now = errors(w, transfer)
        by_w = [(new - old) / delta for new, old in zip(errors(w + delta, transfer), now, strict=True)]
        by_t = [(new - old) / delta for new, old in zip(errors(w, transfer + delta), now, strict=True)]
        ww, tt, wt = _dot(by_w, by_w), _dot(by_t, by_t), _dot(by_w, by_t)
        wn, tn = _dot(by_w, now), _dot(by_t, now)
        scale = ww * tt - wt * wt
        w = min(max(w - (wn * tt - tn * wt) / scale, 0.05), 0.6)
        transfer = max(transfer - (tn * ww - wn * wt) / scale, 0.0)
    return w, transfer


def _dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def table_5_errors(group: BubbleRates) -> dict[tuple[str, int], float]:
    """Predicted minus published bubble rate of the columns that times were not inferred from."""
    w, transfer = infer_times(group)
    return {
        (name, m): bubble_rate(group, name, m, w, transfer) - rates[COLUMNS.index(name)]
        for m, rates in group.rates.items()
        for name in COLUMNS
        if name not in INFERRED_FROM
    }


def deepseek_v3() -> tuple[Timeline, float]:
    """(timeline of one step, seconds of the step with the optimizer), from the published phase times.

    DualPipe on 16 ranks runs the phases of DualPipeV on 8, half of the microbatches from either end. The
    outermost rank runs 2P - 1 + P single forwards, as many single backwards of which 2P - 1 are input gradients,
    2P - 1 weight gradients, and F and B side by side for the rest: that gives the seconds of each.
    """
    P, M = DEEPSEEK_V3_RANKS // 2, DEEPSEEK_V3_MICROBATCHES // 2
    schedule = _schedule("dualpipe_v", P, M)
    kinds = [action.kind for action in schedule.ranks[0]]
    splits, singles = kinds.count("I"), 3 * P - 1
    pairs = 2 * M - singles
    assert kinds.count("F") == kinds.count("B") + splits == pairs + singles
    f = DEEPSEEK_V3["1F"] / singles
    w = DEEPSEEK_V3["1W"] / splits
    i = (DEEPSEEK_V3["1B"] - (singles - splits) * w) / singles
    costs = ActionCosts(
        forward=f,
        backward=i + w,
        input_gradient=i,
        weight_gradient=w,
        overlap=max(0.0, f + i + w - DEEPSEEK_V3["1F1B"] / pairs),
    )
    timeline = simulate(schedule, costs)
    return timeline, timeline.step_seconds + DEEPSEEK_V3["optimizer"]


def mi300x_rates() -> dict[str, float]:
    """Share of the step that is work, by schedule, fastest first."""
    rates = {}
    for name in MI300X:
        schedule = _schedule(name, MI300X_RANKS, MI300X_MICROBATCHES)
        costs = _per_chunk(
            schedule,
            MI300X_COSTS,
            transfer=MI300X_TRANSFER,
            exposed_forward=MI300X_LOST,
            exposed_backward=MI300X_LOST,
        )
        work = MI300X_MICROBATCHES * sum(MI300X_COSTS.values())
        rates[name] = work / simulate(schedule, costs).step_seconds
    return dict(sorted(rates.items(), key=lambda item: -item[1]))


def main() -> int:
    """Prints predictions beside what was published and says whether the bars are met."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    worst = 0.0
    for group in TABLE_5:
        w, transfer = infer_times(group)
        errors = table_5_errors(group)
        worst = max([worst, *map(abs, errors.values())])
        print(f"zero-bubble Table 5, {group.model}, P={group.num_ranks}: W {w:.3f}, transfer {transfer:.4f}")
        for (name, m), error in errors.items():
            print(f"  {name:12s} M={m:<4d} predicted minus published {error:+.4f}")
    print(f"bubble rates: worst error {worst:.4f}, bar 0.03: {'met' if worst <= 0.03 else 'MISSED'}\n")

    timeline, step = deepseek_v3()
    error = step / DEEPSEEK_V3["step"] - 1
    print(f"DeepSeek-V3 step: {step:.2f} s simulated, {DEEPSEEK_V3['step']} s published ({error:+.1%});")
    print(
        f"  bubble of the outermost rank {timeline.step_seconds - timeline.busy_seconds[0]:.2f} s simulated, ",
        end="",
    )
    print(f"{DEEPSEEK_V3['bubble']} s published; bar 10 %: {'met' if abs(error) <= 0.1 else 'MISSED'}\n")

    rates = mi300x_rates()
    ordered = list(rates) == list(MI300X)
    print(f"{'MI300X, Llama2-7B, PP8':26s}{'simulated':>12s}{'published':>12s}   (1F1B = 1)")
    for name, rate in rates.items():
        published = MI300X[name] / MI300X["one_f_one_b"]
        print(f"  {name:24s}{rate / rates['one_f_one_b']:12.3f}{published:12.3f}")
    print(f"order of schedules: {'met' if ordered else 'MISSED'}")
    return worst > 0.03 or abs(error) > 0.1 or not ordered


if __name__ == "__main__":
    sys.exit(main())
