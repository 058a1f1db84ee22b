"""Every schedule: bubble by formula and in lockstep, activations kept, compiled memory; and work per memory mode.

    python -m benchmarks.schedules              # all parts; or --only memory, work

Memory is compiled temporary bytes per device at pipe = 4, 8 microbatches and 32, and at pipe = 8 against 1F1B with
every intermediate result kept, so that activations dominate. Theory counts activations from F to the end of W.
Work is CPU time at pipe = 4 over that of a plain accumulation loop that recomputes the same. Times with artificial
delays, in several processes, are measured by `benchmarks.delays`.
"""

import argparse
import statistics
import sys
import time

from benchmarks.cases import compiled_step, dense_model, make_executor, moe_model
from benchmarks.overhead import alternate, median_ratio, plain_stepper, stepper
from meshes.mesh import simulate_devices
from piperjax.planner.plan import MEMORY_MODES
from piperjax.schedules import registry
from piperjax.schedules.ticks import pack
from piperjax.schedules.timeline import ActionCosts, lockstep, simulate

EQUAL = ActionCosts()
FLAT, THEORY, WORK = 1.02, 0.15, 1.10
NAMED = tuple(name for name in registry.names() if name != "auto")


def temp_bytes(
    schedule: str, *, pipe: int, num_microbatches: int, memory_mode: str, layers_per_rank: int, **size
):
    """Compiled temporary bytes per device."""
    model = dense_model if memory_mode == "stash" else moe_model
    executor = make_executor(
        model(num_layers=pipe * layers_per_rank, d_model=64),
        pipe=pipe,
        num_chunks=registry.chunks_of(schedule),
        schedule=schedule,
        num_microbatches=num_microbatches,
        memory_mode=memory_mode,
        **size,
    )
    return compiled_step(executor).memory_analysis().temp_size_in_bytes


def memory() -> bool:
    """Prints the table of bubbles and memory; returns whether the bars are met."""
    met = True
    print(
        f"{'pipe = 4':14s}{'bubble, M = 8':>24s}{'':9s}{'kept':>9s}{'compiled temporary bytes':>34s}\n"
        f"{'schedule':14s}{'async':>12s}{'lockstep':>12s}{'stages':>18s}{'M = 8':>14s}{'M = 32':>14s}{'growth':>10s}"
    )
    for name in NAMED:
        schedule = registry.build(name, 4, 8)
        timeline, table = simulate(schedule, EQUAL), pack(schedule)
        executed = lockstep(table, EQUAL)
        sizes = [
            temp_bytes(
                name, pipe=4, num_microbatches=m, memory_mode="layer", layers_per_rank=2, microbatch_size=2
            )
            for m in (8, 32)
        ]
        growth = sizes[1] / sizes[0]
        work = max(timeline.busy_seconds)
        met &= growth <= FLAT or name == "gpipe"
        print(
            f"{name:14s}{timeline.bubble_seconds / work:12.1%}{executed.bubble_seconds / work:12.1%}"
            f"{max(table.peak_held()) / schedule.num_chunks:18.4g}{sizes[0] / 2**20:11.3f}MiB"
            f"{sizes[1] / 2**20:11.3f}MiB{growth:10.4f}",
            flush=True,
        )
    print(
        f"\n{'pipe = 8, M = 32, all results kept':38s}{'kept':>8s}{'bytes':>14s}{'ratio':>9s}{'theory':>9s}"
    )
    reference = None
    for name in ("one_f_one_b", "v_half", "v_min"):
        table = pack(registry.build(name, 8, 32))
        kept = max(table.peak_held()) / table.schedule.num_chunks
        size = temp_bytes(
            name,
            pipe=8,
            num_microbatches=32,
            memory_mode="stash",
            layers_per_rank=4,
            microbatch_size=8,
            seq_len=128,
        )
        reference = reference or (size, kept)
        ratio, theory = size / reference[0], kept / reference[1]
        met &= name == "one_f_one_b" or (ratio < 1 and abs(ratio / theory - 1) <= THEORY)
        print(f"{name:38s}{kept:8.4g}{size / 2**20:11.2f}MiB{ratio:9.3f}{theory:9.3f}", flush=True)
    print(
        f"bars: flat within {FLAT - 1:.0%}, V-shaped within {THEORY:.0%} of theory: "
        + ("met" if met else "MISSED")
    )
    return met


def work(repeats: int) -> bool:
    """Prints the work of each memory mode at pipe = 4; returns whether the bar is met."""
    config, options = moe_model(num_layers=8, d_model=256, d_ff=256), dict(microbatch_size=4, seq_len=128)
    worst = 0.0
    print(
        f"\n{'CPU seconds of a step':24s}{'plain loop':>12s}{'pipe = 1':>12s}{'pipe = 4':>12s}{'ratio':>9s}"
    )
    for mode in MEMORY_MODES:
        single, executor = stepper(config, memory_mode=mode, **options)
        piped, _ = stepper(config, pipe=4, memory_mode=mode, **options)
        functions = {"plain": plain_stepper(executor), "pipe1": single, "pipe4": piped}
        seconds = alternate(functions, repeats=repeats, clock=time.process_time)
        ratio = median_ratio(seconds, "pipe4", "plain")
        worst = max(worst, ratio)
        numbers = "".join(f"{statistics.median(values):12.3f}" for values in seconds.values())
        print(f"{mode:24s}{numbers}{ratio:9.3f}", flush=True)
    print(
        f"bar: pipe = 4 at most {WORK} of the plain loop; worst {worst:.3f}: "
        + ("met" if worst <= WORK else "MISSED")
    )
    return worst <= WORK


def main() -> int:
    """Runs the parts and says whether the bars are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("memory", "work"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    simulate_devices(8)
    results = []
    if args.only != "work":
        results.append(memory())
    if args.only != "memory":
        results.append(work(args.repeats))
    return not all(results)


if __name__ == "__main__":
    sys.exit(main())
