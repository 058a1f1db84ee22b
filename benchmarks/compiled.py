"""Bar 2: compiled temporary memory against the number of microbatches, compile time against microbatches and layers.

python -m benchmarks.compiled
"""

import argparse
import statistics
import sys
import time

import jax

from benchmarks.cases import abstract_batch, compiled_step, make_executor, moe_model, router_bias
from meshes.mesh import simulate_devices


def temp_bytes(schedule: str, num_microbatches: int) -> int:
    """Compiled temporary bytes per device at pipe = 4."""
    executor = make_executor(
        moe_model(num_layers=8),
        pipe=4,
        schedule=schedule,
        num_microbatches=num_microbatches,
        microbatch_size=2,
    )
    return compiled_step(executor).memory_analysis().temp_size_in_bytes


def compile_seconds(num_layers: int, num_microbatches: int) -> float:
    """Seconds of trace, lower and compile at pipe = 2, from nothing."""
    executor = make_executor(moe_model(num_layers=num_layers), pipe=2, num_microbatches=num_microbatches)
    arguments = (executor.abstract_params, router_bias(executor.config), abstract_batch(executor))
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(executor.gradients).lower(*arguments).compile()
    return time.perf_counter() - start


def main() -> int:
    """Prints the table and says whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    simulate_devices(4)
    print(
        f"{'schedule':14s}" + "".join(f"{'M=' + str(m):>12s}" for m in (8, 16, 32)) + f"{'M=32 / M=8':>12s}"
    )
    growth = {}
    for schedule in ("one_f_one_b", "gpipe"):
        sizes = [temp_bytes(schedule, m) for m in (8, 16, 32)]
        growth[schedule] = sizes[-1] / sizes[0]
        print(
            f"{schedule:14s}"
            + "".join(f"{size / 2**20:9.3f}MiB" for size in sizes)
            + f"{growth[schedule]:12.4f}"
        )
    compile_seconds(2, 8)  # Warms the libraries.
    cases = {"M=8": (4, 8), "M=512": (4, 512), "L=2": (2, 8), "L=32": (32, 8)}
    seconds = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            seconds[name].append(compile_seconds(*case))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print("compile seconds, median: " + ", ".join(f"{name} {value:.2f}" for name, value in median.items()))
    by_microbatches, by_layers = median["M=512"] / median["M=8"], median["L=32"] / median["L=2"]
    print(f"compile time M=512 / M=8: {by_microbatches:.2f} (bar 1.3), L=32 / L=2: {by_layers:.2f} (bar 1.5)")
    print(f"1F1B temporary bytes M=32 / M=8: {growth['one_f_one_b']:.4f} (bar 1.01)")
    met = growth["one_f_one_b"] <= 1.01 and by_microbatches <= 1.3 and by_layers <= 1.5
    print("bar 2: " + ("met" if met else "MISSED"))
    return not met


if __name__ == "__main__":
    sys.exit(main())
