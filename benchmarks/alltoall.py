"""Bars of expert dispatch: bytes by level, times on a shaped network, what is hidden, and the simulation beside them.

    python -m benchmarks.alltoall [bytes sweep overlap schedule] [--write]

bytes: every dispatcher, compiled for 2 and 4 nodes of 8 simulated devices, sends between nodes and inside them what
the closed form says (1 %), and with de-duplication between nodes 3.8 and 2.1 times fewer for E=256, k=8 than one copy
per expert; results and gradients equal the dense computation.

sweep: 4 nodes of 8 devices as network namespaces of this machine, gloo between them, links of 200 Mbit/s. All-to-alls
at 256 B of a pair are twice as quick in phases as flat; dispatch and combine of a layer with de-duplication, dropping
nothing, twice as quick as flat that drops nothing, and 1.2 times as quick as flat with capacity 1.5; what the planner
chooses is never below 0.95 of the best; the simulation is right within a factor of 1.3 (geometric mean), one number
fitted.

overlap: 2 nodes, 150 Mbit/s of a medium that both directions share; of the experts' products 70 % are hidden behind the
wire forward, 50 % forward and backward. Shares are of means over repeats.

schedule: 4 nodes of 8 H100 that are not there; as XLA orders the operations of a layer in chunks, with the flags that a
step sets, at least the products of all but one chunk run beside exchanges between nodes, forward and backward.

sweep and overlap need Linux and root (`benchmarks/shaped_network.py`), schedule needs XLA's plugin for CUDA
(`piperjax/runtime/absent_gpus.py`); they are skipped without. Times are those of the sockets of one machine whose cores
do the work of all nodes: shares and orders, not speeds of a cluster.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev

from benchmarks import alltoall_model as model
from benchmarks.alltoall_cells import OVERLAP, SWEEP, Cell, Exchange, Layer, merge, paired_ratio, read_samples
from benchmarks.shaped_network import (
    NetworkError,
    ShapedNetwork,
    dropped_frames,
    reason_to_skip,
    run_on_nodes,
    up,
)
from piperjax.planner.charts import Axis, Point, Series, plot

ROOT = Path(__file__).resolve().parent.parent
TABLE, PICTURE = ROOT / "benchmarks" / "results" / "alltoall.csv", ROOT / "docs" / "alltoall.svg"
PARTS = ("bytes", "sweep", "overlap", "schedule")
SHAPE = model.Shape(nodes=4, local=8, bytes_per_second=25e6, cores=os.cpu_count() or 1)
OVERLAP_SHAPE = model.Shape(nodes=2, local=2, bytes_per_second=18.75e6, cores=os.cpu_count() or 1)
LIMIT_SECONDS, OVERLAP_LIMIT_SECONDS = 180, 360
# The quickest de-duplicated dispatch that drops nothing over flat that drops nothing, and over flat that may.
DEDUPLICATED = "halo2_dedup"
COMPARED = {"flat": 2.0, "flat capacity 1.5": 1.2}


def measure(
    shape: model.Shape, part: str, *, shaped: str = "links", limit_seconds: float = LIMIT_SECONDS
) -> tuple[model.Seconds, int]:
    """Seconds of every repeat by cell and variant on a shaped network, and frames that its queues dropped."""
    network = ShapedNetwork(
        num_nodes=shape.nodes, bytes_per_second=shape.bytes_per_second, shaped=shaped, owner=os.getpid()
    )
    arguments = ["--local", str(shape.local), "--part", part]
    with up(network):
        printed = run_on_nodes(network, "benchmarks.alltoall_node", arguments, limit_seconds=limit_seconds)
        return merge([read_samples(text) for text in printed]), dropped_frames(network)


# --- the sweep -------------------------------------------------------------------------------------------------


def sweep(*, write: bool) -> bool:
    """Measures the sweep, prints it beside the simulation, and says whether the bars are met."""
    start = time.monotonic()
    seconds, dropped = measure(SHAPE, "sweep")
    platform = model.platform_of(SHAPE, SWEEP, seconds)
    points = model.simulated(platform, SHAPE, SWEEP, seconds)
    choices = model.choices(platform, SHAPE, SWEEP, seconds)
    print(f"{SHAPE.nodes} nodes of {SHAPE.local} devices, {SHAPE.bytes_per_second * 8e-6:g} Mbit/s a node, "
          f"{SHAPE.cores} cores; {dropped} frames dropped; {time.monotonic() - start:.0f} s in all")  # fmt: skip
    print("\n".join(table(SWEEP, seconds)))
    (node, wire), cpu = platform.links, model.message_cpu_seconds(platform, SHAPE)
    print(f"\none message costs a core {cpu * 1e6:.0f} us (fitted)")
    inside, between = node.bytes_per_second / 1e6, wire.bytes_per_second / 1e6
    print(f"measured alone: {node.latency_seconds * 1e3:.1f} ms for a collective that moves nothing; of a device "
          f"{inside:.0f} MB/s inside a node, {between:.1f} between")  # fmt: skip
    print(f"{'':24s}{'simulated ms':>13s}{'measured ms':>13s}{'ratio':>7s}")
    for point in points:
        ratio = point.simulated_seconds / point.measured_seconds
        print(f"{point.pair_bytes:8d} B {point.algorithm:14s}{point.simulated_seconds * 1e3:13.1f}"
              f"{point.measured_seconds * 1e3:13.1f}{ratio:7.2f}")  # fmt: skip
    if write:
        TABLE.write_text("\n".join(rows_of(SWEEP, seconds)) + "\n", encoding="utf-8")
        PICTURE.write_text(chart(points), encoding="utf-8")
        print(f"wrote {TABLE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")
    print()
    bars = sweep_bars(SWEEP, seconds, choices, model.geometric_mean_error(points))
    met = [judge(*bar) for bar in bars]
    return all(met)


def sweep_bars(
    cells: Sequence[Cell], seconds: model.Seconds, choices: Sequence[model.Choice], error: float
) -> list[tuple[str, float, float, bool]]:
    """(claim, figure, bar, whether the figure must be at least the bar) of each."""
    smallest = min((cell for cell in cells if isinstance(cell, Exchange)), key=lambda cell: cell.pair_bytes)
    times = seconds[smallest.label]
    phased = max(paired_ratio(times["flat"], times[name]) for name in ("halo2", "halo3"))
    bars = [(f"halo2 or halo3 over flat, {smallest.label}", phased, 2.0, True)]
    for cell in cells:
        if isinstance(cell, Layer):
            times = seconds[cell.label]
            once = [name for name, way in cell.lossless.items() if way.dispatch == DEDUPLICATED]
            ours = min(once, key=lambda name: median(times[name]))
            for flat, bar in COMPARED.items():
                if flat in times:
                    ratio = paired_ratio(times[flat], times[ours])
                    bars.append((f"{ours} over {flat}, {cell.label}", ratio, bar, True))
    for choice in choices:
        claim = f"chosen {choice.chosen}, best {choice.best}: {choice.cell}"
        bars.append((claim, choice.fraction, 0.95, True))
    return [*bars, ("simulation: geometric mean of error factors", error, 1.3, False)]


# --- overlap ---------------------------------------------------------------------------------------------------


def overlap() -> bool:
    """Measures how much of the products hides behind the wire, and says whether the bars are met."""
    seconds, dropped = measure(OVERLAP_SHAPE, "overlap", shaped="medium", limit_seconds=OVERLAP_LIMIT_SECONDS)
    print(f"{OVERLAP_SHAPE.nodes} nodes of {OVERLAP_SHAPE.local} devices, {OVERLAP_SHAPE.bytes_per_second * 8e-6:g} "
          f"Mbit/s for both directions together; {dropped} frames dropped")  # fmt: skip
    print("\n".join(table(OVERLAP, seconds)))
    print()
    met = True
    for cell, bar in zip(OVERLAP, (0.7, 0.5), strict=True):
        hidden = {chunks: hidden_fraction(seconds[cell.label], chunks) for chunks in cell.chunks}
        best = max(hidden, key=lambda chunks: hidden[chunks])
        for chunks, fraction in hidden.items():
            print(f"{cell.label}, {chunks} chunks: {fraction:.0%} of the products hidden, give or take "
                  f"{hidden_error(seconds[cell.label], chunks):.0%}")  # fmt: skip
        times = seconds[cell.label]
        print(f"products are {mean(times['products']) / mean(times['wire']):.2f} of the wire; {best} chunks are "
              f"{mean(times['x1']) / mean(times[f'x{best}']):.2f} times as quick as 1")  # fmt: skip
        met &= judge(f"hidden part of the products, {cell.label}, {best} chunks", hidden[best], bar, True)
    return met


def hidden_fraction(times: Mapping[str, Sequence[float]], chunks: int) -> float:
    """Part of the products' seconds by which a layer in chunks is shorter than wire and products one after the other.

    Of means over repeats, (wire + products - layer) / products, where the wire is that of unchunked dispatch.
    """
    return mean(_saved(times, chunks)) / mean(times["products"])


def hidden_error(times: Mapping[str, Sequence[float]], chunks: int) -> float:
    """Standard error of `hidden_fraction`, from the scatter between repeats."""
    saved = _saved(times, chunks)
    return stdev(saved) / len(saved) ** 0.5 / mean(times["products"])


def _saved(times: Mapping[str, Sequence[float]], chunks: int) -> list[float]:
    together = zip(times["wire"], times["products"], times[f"x{chunks}"], strict=True)
    return [wire + products - layer for wire, products, layer in together]


# --- the command -----------------------------------------------------------------------------------------------


def judge(claim: str, figure: float, bar: float, at_least: bool) -> bool:
    """Prints one bar, and says whether it is met."""
    met = figure >= bar if at_least else figure <= bar
    sign = ">=" if at_least else "<="
    print(f"{claim:88s}{figure:8.2f} {sign} {bar:<5g} {'met' if met else 'MISSED'}")
    return met


def table(cells: Sequence[Cell], seconds: model.Seconds) -> list[str]:
    """Median milliseconds, and the smallest and largest, of every variant."""
    lines = [f"{'':48s}{'variant':22s}{'median ms':>10s}{'least':>9s}{'most':>9s}{'flat over':>11s}"]
    for cell in cells:
        for name, times in seconds[cell.label].items():
            flat = seconds[cell.label].get("flat")
            ratio = f"{paired_ratio(flat, times):10.2f}x" if flat and name != "flat" else ""
            lines.append(
                f"{cell.label:48s}{name:22s}{median(times) * 1e3:10.1f}{min(times) * 1e3:9.1f}"
                f"{max(times) * 1e3:9.1f}{ratio}"
            )
    return lines


def rows_of(cells: Sequence[Cell], seconds: model.Seconds) -> list[str]:
    """The table as lines of CSV."""
    lines = ["cell,variant,median_seconds,least_seconds,most_seconds,repeats"]
    for cell in cells:
        for name, times in seconds[cell.label].items():
            numbers = f"{median(times):.6g},{min(times):.6g},{max(times):.6g},{len(times)}"
            lines.append(f'"{cell.label}",{name},{numbers}')
    return lines


def chart(points: Sequence[model.Point]) -> str:
    """SVG of measured times as points and simulated ones as lines."""
    names = list(dict.fromkeys(point.algorithm for point in points))
    series = []
    for colour, name in enumerate(names):
        own = [point for point in points if point.algorithm == name]
        simulated = [Point(point.pair_bytes, point.simulated_seconds * 1e3) for point in own]
        measured = [
            Point(point.pair_bytes, ms, f"{name}, {point.pair_bytes} B: measured {ms:.1f} ms")
            for point in own
            for ms in (point.measured_seconds * 1e3,)
        ]
        series += [
            Series(name=name, points=measured, colour=colour),
            Series(name="", points=simulated, colour=colour, joined=True, dots=False, dashed=True),
        ]
    return plot(
        series,
        x=Axis(
            title="bytes of a pair of devices", log=True, ticks=tuple(sorted({p.pair_bytes for p in points}))
        ),
        y=Axis(title="milliseconds of an all-to-all: points measured, lines simulated", log=True),
    )


def main() -> int:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} and {PICTURE.name}")
    args = parser.parse_args()
    if wrong := [part for part in args.parts if part not in PARTS]:
        parser.error(f"there are {', '.join(PARTS)}, got {wrong[0]!r}")
    parts = args.parts or PARTS
    met = True
    if "bytes" in parts:
        from benchmarks import alltoall_bytes  # JAX, and 32 simulated devices

        met &= alltoall_bytes.run(judge)
    if "schedule" in parts:
        from piperjax.runtime import absent_gpus

        if reason := absent_gpus.reason_to_skip("cuda"):
            print(f"skipped schedule: {reason}")
        else:
            from benchmarks import alltoall_schedule

            met &= alltoall_schedule.run(judge)
    shaped = [part for part in parts if part in ("sweep", "overlap")]
    if shaped and (reason := reason_to_skip()):
        print(f"skipped {' and '.join(shaped)}: {reason}")
        shaped = []
    try:
        if "sweep" in shaped:
            met &= sweep(write=args.write)
        if "overlap" in shaped:
            met &= overlap()
    except NetworkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return not met


if __name__ == "__main__":
    sys.exit(main())
