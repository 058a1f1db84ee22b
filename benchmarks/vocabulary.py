"""The vocabulary split over the pipe ranks, or whole on the first and last one: work, time in lockstep, bytes.

    python -m benchmarks.vocabulary

At pipe = 4, for a small and a large vocabulary. Work is CPU time of a step, since simulated devices share the cores;
split exchanges activations four times per microbatch, which it includes. Seconds of a layer and of embedding, head and
loss are measured at pipe = 1; with them the lockstep clock times both tables as if every rank had cores of its own:
split, the head is a fourth of the work on all ranks at once, and what its exchanges cost in work is added as if no
rank did it beside others; whole, it is work of the last rank, and layers are moved away from there
(`partition_with_edges`). Bytes are those that a device stores between steps and needs besides in one.
"""

import argparse
import statistics
import sys
import time

from benchmarks.cases import compiled_step, moe_model
from benchmarks.overhead import alternate, stepper
from meshes.mesh import simulate_devices
from piperjax.planner.partition import partition_with_edges
from piperjax.schedules import registry
from piperjax.schedules.ticks import pack
from piperjax.schedules.timeline import ActionCosts, lockstep

PIPE, NUM_LAYERS, NUM_MICROBATCHES = 4, 16, 8
SIZES = dict(microbatch_size=4, seq_len=64)
FORWARD_FRACTION = 1 / 4  # Backward runs the forward again.


def model(vocab_size: int, num_layers: int = NUM_LAYERS):
    """A model of narrow layers, so that the head weighs as much as in large models."""
    return moe_model(num_layers=num_layers, d_model=128, d_ff=128, vocab_size=vocab_size)


def part_seconds(vocab_size: int, repeats: int) -> tuple[float, float]:
    """CPU seconds per microbatch of one layer, and of embedding, head and loss, at pipe = 1."""
    few, many = NUM_LAYERS // 4, NUM_LAYERS // 2
    steps = {n: stepper(model(vocab_size, n), **SIZES)[0] for n in (few, many)}
    seconds = alternate(steps, repeats=repeats, clock=time.process_time)
    short, long = (statistics.median(seconds[n]) / NUM_MICROBATCHES for n in (few, many))
    layer = (long - short) / (many - few)
    return layer, max(short - few * layer, 0.0)


def step_seconds(layers_per_stage: tuple[int, ...], layer: float, *, head: float, last: float) -> float:
    """Seconds in lockstep; `head` is everybody's, `last` the last rank's."""
    ends = [0.0] * (PIPE - 1) + [last]
    stages = [layer * n for n in layers_per_stage]
    costs = ActionCosts(
        forward=tuple(FORWARD_FRACTION * s + e for s, e in zip(stages, ends, strict=True)),
        backward=tuple((1 - FORWARD_FRACTION) * s for s in stages),
        head=head,
    )
    return lockstep(pack(registry.build("one_f_one_b", PIPE, NUM_MICROBATCHES)), costs).step_seconds


def main() -> int:
    """Prints the table and says which is shorter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    simulate_devices(PIPE)
    print(
        f"{'vocabulary':>10s}{'head / layer':>14s}  {'placement':10s}{'layers per stage':18s}"
        f"{'work':>10s}{'lockstep':>12s}{'stored':>12s}{'temporary':>12s}"
    )
    shorter = True
    for vocab_size in (1024, 16384):
        layer, head = part_seconds(vocab_size, repeats)
        uneven = partition_with_edges((layer,) * NUM_LAYERS, PIPE, last=head)
        splits = {"split": (NUM_LAYERS // PIPE,) * PIPE, "whole": uneven}
        made = {
            name: stepper(model(vocab_size), pipe=PIPE, vocabulary=name, layers_per_stage=layers, **SIZES)
            for name, layers in splits.items()
        }
        seconds = alternate(
            {name: step for name, (step, _) in made.items()}, repeats=repeats, clock=time.process_time
        )
        work = {name: statistics.median(values) for name, values in seconds.items()}
        exchanges = max(work["split"] - work["whole"], 0.0) / NUM_MICROBATCHES
        times = {
            "split": step_seconds(splits["split"], layer, head=head / PIPE + exchanges, last=0.0),
            "whole": step_seconds(uneven, layer, head=0.0, last=head),
        }
        for name, (_, executor) in made.items():
            analysis = compiled_step(executor).memory_analysis()
            print(
                f"{vocab_size:10d}{head / layer:14.2f}  {name:10s}{splits[name]!s:18s}{work[name]:8.3f} s"
                f"{times[name]:10.3f} s{analysis.argument_size_in_bytes / 2**20:8.2f} MiB"
                f"{analysis.temp_size_in_bytes / 2**20:8.2f} MiB",
                flush=True,
            )
        shorter &= times["split"] <= times["whole"]
    print("split is the default: its step is " + ("shorter in both" if shorter else "NOT shorter in both"))
    return not shorter


if __name__ == "__main__":
    sys.exit(main())
