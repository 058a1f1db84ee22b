"""This file is `python -m piperjax measure`: micro-benchmarks of the devices at hand, written as a platform file."""

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from meshes.platform import Platform, load_platform
from meshes.writing import platform_toml
from piperjax.planner.calibration import Calibration, Measurements, calibrate
from piperjax.planner.calibration_report import charts, quality_notes, table

if TYPE_CHECKING:
    import jax

DESCRIPTION = """\
Times products, attention, elementwise work, collectives and copies on the devices at hand, fits a law to each, and
writes a platform file that plans can be made for. All devices should be idle. Across processes, start the same command
in every one, as for train.py; process 0 writes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags; imports no JAX, so that help answers at once."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "--out",
        default="measured.toml",
        metavar="FILE",
        help="platform file to write (default measured.toml)",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="picture of samples and laws (default beside the file, .svg)"
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="devices per process; a CPU simulates them (default all there are)",
    )
    parser.add_argument(
        "--platform",
        default="auto",
        metavar="NAME",
        help="machine whose levels and peaks are kept: one of meshes/, or a .toml file (default recognised)",
    )
    parser.add_argument("--quick", action="store_true", help="under a minute, with fewer shapes and repeats")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes")
    parser.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Measures, writes the files and prints how well the laws fit; returns the exit code.

    Raises:
      ValueError: if a flag is wrong, or the devices cannot be had.
    """
    out = _writable(args.out, ".toml")
    picture = _writable(args.plot or str(out.with_suffix(".svg")), ".svg")
    if args.platform != "auto":
        load_platform(args.platform)

    from piperjax.runtime import backend
    from piperjax.training import distributed

    group = distributed.process_group(args.coordinator, args.processes, args.process_id)
    backend.prepare(args.devices)
    distributed.initialize(group)

    from piperjax.training.machine import find_platform

    devices = distributed.first_devices(args.devices)
    known = find_platform(args.platform, devices)
    shares_cores = devices[0].platform == "cpu"
    if shares_cores:  # How much of the host's memory a device has depends on how many are simulated.
        known = replace(known, device=replace(known.device, memory_bytes=None))
    measurements = measure(known, devices, quick=args.quick)
    if not distributed.is_writer():
        return 0
    calibration = calibrate(known, measurements, shares_cores=shares_cores)
    notes = quality_notes(calibration)
    header = _header(devices, quick=args.quick)
    out.write_text(platform_toml(calibration.platform, header=header, notes=notes), encoding="utf-8")
    picture.write_text(charts(calibration, measurements), encoding="utf-8")
    print("\n".join([*_summary(calibration), "", table(calibration), "", f"wrote {out} and {picture}"]))
    return 0


def measure(platform: Platform, devices: "Sequence[jax.Device]", *, quick: bool) -> Measurements:
    """Runs the benchmarks on the devices of all processes, with a progress bar on process 0.

    Args:
      platform: its levels decide between which devices collectives are measured.
      devices: of all processes; what they compute is measured by each process on its own.
      quick: fewer shapes, shorter and fewer times.
    """
    import jax
    from tqdm import tqdm

    from piperjax.runtime.exchange_benchmarks import exchange_sizes, exchange_tasks
    from piperjax.runtime.microbenchmarks import compute_tasks, shapes_for
    from piperjax.runtime.stopwatch import Stopwatch

    backend = devices[0].platform
    local = [device for device in devices if device.process_index == jax.process_index()]
    own = Stopwatch(repeats=3, target_seconds=0.015) if quick else Stopwatch(repeats=5, target_seconds=0.04)
    together = Stopwatch(repeats=own.repeats, target_seconds=own.target_seconds, agree=_agree)
    sizes = exchange_sizes(quick=quick, backend=backend)
    tasks = [
        *compute_tasks(shapes_for(backend, quick=quick), own, local),
        *exchange_tasks(platform, sizes, together, devices),
    ]
    results: dict[str, list] = {}
    silent = jax.process_index() != 0
    with tqdm(tasks, disable=silent, file=sys.stderr, unit="", mininterval=0.5) as progress:
        for task in progress:
            progress.set_description(f"{task.label:<50.50}", refresh=False)
            results.setdefault(task.field, []).append(task.run())
    single = {name: results.pop(name)[0] for name in ("call_seconds", "launch_seconds")}
    samples = {name: tuple(sample for part in parts for sample in part) for name, parts in results.items()}
    return Measurements(num_local=len(local), **single, **samples)


def _agree(number: int) -> int:
    """What process 0 says."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _writable(name: str, suffix: str) -> Path:
    path = Path(name)
    if path.suffix != suffix:
        raise ValueError(f"the file to write must end in {suffix}, got {name}")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {name}: there is no folder {path.parent}; make it first")
    return path


def _header(devices: "Sequence[jax.Device]", *, quick: bool) -> list[str]:
    import jax

    number, processes = len(devices), jax.process_count()
    where = "1 process" if processes == 1 else f"{processes} processes"
    command = f"python -m piperjax measure{' --quick' if quick else ''}"
    return [
        f"Measured on {datetime.date.today().isoformat()} with jax {jax.__version__} by `{command}`:",
        f"{number} x {devices[0].device_kind} ({devices[0].platform}) in {where}.",
        "Seconds and rates are those of one device alone; several that share cores take turns, concurrent_devices at a",
        "time. Predictions outside smallest_* to largest_* are extrapolated, and say so.",
    ]


def _summary(calibration: Calibration) -> list[str]:
    device = calibration.platform.device
    lines = [
        f"{dtype:<10} {peak / 1e9:10,.1f} GFLOP/s in large products, "
        f"{device.matmul.efficiency.get(dtype, 0) * peak / 1e9:,.1f} by the law of dense ones"
        for dtype, peak in device.peak_flop_per_second.items()
        if device.matmul
    ]
    if device.concurrent_devices is not None:
        lines.append(f"{device.concurrent_devices:.3g} devices compute at once")
    lines += [
        f"link {link.name}: {link.bytes_per_second / 1e9:.3g} GB/s, {link.latency_seconds * 1e6:.3g} us, "
        f"{link.message_seconds * 1e6:.3g} us for each further message or member"
        for link in calibration.platform.links
        if link.provenance == "measured"
    ]
    return lines
