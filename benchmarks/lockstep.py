"""Bar 3, delays: the executor with layers that only wait, against the lockstep model.

    python -m benchmarks.lockstep

Forward and backward of a layer are replaced by sleeping callbacks, so that bubbles show on any number of cores.
"""

import argparse
import statistics
import sys
import time

import jax

from benchmarks.cases import dense_model, make_executor, random_batch, router_bias
from benchmarks.waiting import stage_costs, waiting_layers
from meshes.mesh import simulate_devices
from piperjax.schedules.timeline import lockstep


def measure(schedule: str, pipe: int, num_microbatches: int, forward: float, backward: float, repeats: int):
    """(measured seconds, seconds of the lockstep model) of a step."""
    config = dense_model(num_layers=pipe, d_model=16, d_ff=16, vocab_size=32)
    costs = stage_costs(forward, backward, 0.0)
    executor = make_executor(
        config,
        pipe=pipe,
        schedule=schedule,
        num_microbatches=num_microbatches,
        seq_len=8,
        memory_mode="stash",
        layer_functions=waiting_layers(config, costs),
    )
    step = jax.jit(executor.gradients)
    arguments = (
        executor.init_params(0),
        router_bias(config),
        jax.device_put(random_batch(config, executor.plan), executor.batch_sharding),
    )
    jax.block_until_ready(step(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        seconds.append(time.perf_counter() - start)
    model = lockstep(executor.plan.tick_table(), costs).step_seconds
    return statistics.median(seconds), model


def main() -> int:
    """Prints the table and says whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unit", type=float, default=0.04, help="seconds of one unit of cost")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    simulate_devices(4)
    worst = 0.0
    print(f"{'schedule':14s}{'F:B':>10s}{'measured':>12s}{'model':>10s}{'ratio':>8s}")
    for schedule in ("one_f_one_b", "gpipe"):
        for forward, backward in ((1.0, 1.0), (1.0, 2.0), (1.2, 2.4)):
            measured, model = measure(schedule, 4, 8, forward * args.unit, backward * args.unit, args.repeats)
            print(
                f"{schedule:14s}{f'{forward}:{backward}':>10s}{measured:11.3f}s{model:9.3f}s{measured / model:8.3f}"
            )
            worst = max(worst, abs(measured / model - 1.0))
    print(f"bar 3 (delays): worst deviation {worst:.1%}, bar 10 %: " + ("met" if worst <= 0.10 else "MISSED"))
    return worst > 0.10


if __name__ == "__main__":
    sys.exit(main())
