"""Bar: with layers that only wait, in one process per pipe rank, a step takes as long as the lockstep model says.

    python -m benchmarks.delays [--pipe 4 --microbatches 8 --unit 0.4]

A tick costs some 10 to 30 ms more than its delays, for its collectives over gloo. The unit is chosen so that this is
little beside them: with units of 0.2 s deviations of up to 11.5 % were measured. The schedules' order must be the
predicted one as well, wherever predictions differ by more than the bar.
"""

import argparse
import itertools
import os
import socket
import statistics
import subprocess
import sys
import time

import jax
import numpy as np

from benchmarks.cases import dense_model, make_executor, random_batch, router_bias
from benchmarks.waiting import stage_costs, waiting_layers
from piperjax.schedules import registry
from piperjax.schedules.timeline import lockstep

SCHEDULES = ("one_f_one_b", "interleaved", "zb_h1", "zb_dual", "zb_v", "v_half")
COSTS = ((1.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.2, 1.5, 0.9))
BAR = 0.08


def measure(schedule: str, costs: tuple, *, pipe: int, num_microbatches: int, repeats: int):
    """(measured seconds, seconds of the lockstep model) of a step; the same in every process."""
    chunks = registry.chunks_of(schedule)
    config = dense_model(num_layers=pipe * chunks, d_model=16, d_ff=16, vocab_size=32)
    seconds = stage_costs(*costs, num_chunks=chunks)
    executor = make_executor(
        config,
        pipe=pipe,
        num_chunks=chunks,
        schedule=schedule,
        memory_mode="stash",
        num_microbatches=num_microbatches,
        seq_len=8,
        layer_functions=waiting_layers(config, seconds),
    )
    batch = {
        name: jax.make_array_from_callback(value.shape, executor.batch_sharding, lambda at, v=value: v[at])
        for name, value in random_batch(config, executor.plan).items()
    }
    step = jax.jit(executor.gradients)
    arguments = (executor.init_params(0), np.asarray(router_bias(config)), batch)
    jax.block_until_ready(step(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times), lockstep(executor.plan.tick_table(), seconds).step_seconds


def run_process(args: argparse.Namespace) -> int:
    """One pipe rank; the first one prints."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(args.coordinator, args.pipe, args.process_id)
    say = print if args.process_id == 0 else lambda *_, **__: None
    say(f"{'schedule':14s}{'F:B:W':>14s}{'measured':>12s}{'model':>10s}{'ratio':>8s}")
    worst, out_of_order = 0.0, []
    for costs in COSTS:
        results = {}
        for schedule in SCHEDULES:
            seconds = tuple(cost * args.unit for cost in costs)
            measured, model = measure(
                schedule, seconds, pipe=args.pipe, num_microbatches=args.microbatches, repeats=args.repeats
            )
            results[schedule] = (measured, model)
            worst = max(worst, abs(measured / model - 1))
            name = ":".join(f"{cost:g}" for cost in costs)
            say(f"{schedule:14s}{name:>14s}{measured:11.3f}s{model:9.3f}s{measured / model:8.3f}", flush=True)
        for (a, (slow, slow_model)), (b, (fast, fast_model)) in itertools.permutations(results.items(), 2):
            if slow_model > (1 + BAR) * fast_model and slow <= fast:
                out_of_order.append(f"{a} before {b}")
    met = worst <= BAR and not out_of_order
    say(f"worst deviation {worst:.1%} (bar {BAR:.0%}), out of order: {', '.join(out_of_order) or 'none'}: "
        + ("met" if met else "MISSED"))  # fmt: skip
    return not met


def main() -> int:
    """Starts the processes, or is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pipe", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--unit", type=float, default=0.4, help="seconds of one unit of cost")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process_id is not None:
        return run_process(args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "benchmarks.delays", *sys.argv[1:], "--coordinator", coordinator]
    processes = [
        subprocess.Popen([*command, "--process-id", str(rank)], env=environment) for rank in range(args.pipe)
    ]
    return max(process.wait() for process in processes)


if __name__ == "__main__":
    sys.exit(main())
