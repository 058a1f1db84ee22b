"""Bubble and memory of every schedule: the published formula, the simulator, and the tick table that is executed.

    python -m benchmarks.schedule_laws

At equal times F = I = W = 1, B = 2. The bubble of a rank is what its step takes beyond its work, as a share of that
work: by formula and asynchronously; "rank" counts from a rank's own first action to its own last. Memory is in
activations of one whole stage. The bars: formulas are met exactly, and a table costs at most 5 % more.
"""

import argparse
import sys

from piperjax.schedules import laws, registry
from piperjax.schedules.laws import law
from piperjax.schedules.ticks import pack
from piperjax.schedules.timeline import ActionCosts, lockstep, simulate

CASES = ((4, 8), (4, 16), (8, 16), (8, 32), (8, 64), (16, 32), (16, 64))
EQUAL = ActionCosts()
LOCKSTEP = 1.05


def row(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> tuple[str, bool, float]:
    """(line, whether the law is met exactly, lockstep cost over asynchronous cost) of one case."""
    schedule = registry.build(name, num_ranks, num_microbatches, num_chunks)
    chunks = schedule.num_chunks
    timeline, table = simulate(schedule, EQUAL), pack(schedule)
    executed = lockstep(table, EQUAL)
    expected = law(name, num_ranks, num_microbatches, num_chunks=chunks)
    work = max(timeline.busy_seconds)
    found = timeline.rank_bubble_seconds if expected.per_rank else timeline.bubble_seconds
    exact = found == expected.bubble_seconds and max(timeline.peak_held()) == expected.peak_held
    ratio = executed.step_seconds / timeline.step_seconds
    label = f"{name} x{chunks}" if name == "interleaved" else name
    line = (
        f"{label:15s}{num_ranks:3d}{num_microbatches:4d}  {schedule.clock:7s}"
        f"{expected.bubble_seconds / work:9.1%}{timeline.rank_bubble_seconds / work:9.1%}"
        f"{timeline.bubble_seconds / work:9.1%}{executed.bubble_seconds / work:10.1%}{ratio:8.3f}"
        f"{expected.peak_held / chunks:9.4g}{max(timeline.peak_held()) / chunks:7.4g}"
        f"{max(table.peak_held()) / chunks:7.4g}{max(table.peak_in_flight()) / chunks:8.4g}"
    )
    return line, exact, ratio


def main() -> int:
    """Prints the table and says whether the bars are met."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(
        f"{'':31s}{'bubble of a rank':>18s}{'of a step':>19s}{'':8s}{'activations':>16s}\n"
        f"{'schedule':15s}{'P':>3s}{'M':>4s}  {'ticks':7s}{'formula':>9s}{'rank':>9s}{'async':>9s}{'lockstep':>10s}"
        f"{'ratio':>8s}{'formula':>9s}{'async':>7s}{'table':>7s}{'flying':>8s}"
    )
    missed, worst = [], 0.0
    for name in laws.names():
        for num_chunks in (2, 4) if name == "interleaved" else (0,):
            for num_ranks, num_microbatches in CASES:
                line, exact, ratio = row(name, num_ranks, num_microbatches, num_chunks)
                print(line)
                if not exact and name != "dualpipe_v":
                    missed.append(f"{name} {num_ranks} {num_microbatches}")
                worst = max(worst, ratio)
    print(f"formulas: {'met exactly' if not missed else 'MISSED by ' + ', '.join(missed)}")
    print(
        "DualPipeV's formula takes a pair F&B as one action; one after the other its bubble is P - 1 chunks."
    )
    verdict = "met" if worst <= LOCKSTEP else "MISSED"
    print(f"lockstep over asynchronous cost: at most {worst:.3f}, bar {LOCKSTEP}: {verdict}")
    return bool(missed) or worst > LOCKSTEP


if __name__ == "__main__":
    sys.exit(main())
