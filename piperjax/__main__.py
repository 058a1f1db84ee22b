"""`python -m piperjax show | simulate | measure | sample`: schedules, networks, this machine, generated text."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from piperjax.planner import network_table
from piperjax.schedules import registry
from piperjax.schedules.draw import svg_gantt, text_gantt
from piperjax.schedules.schedule import Schedule
from piperjax.schedules.ticks import TickTable, pack
from piperjax.schedules.timeline import ActionCosts, Timeline, lockstep, simulate
from piperjax.training import measure


class _Parser(argparse.ArgumentParser):
    """Ends with one sentence and exit code 2, without repeating the usage."""

    def error(self, message: str):
        print(f"piperjax: error: {message}; see `python -m piperjax --help`", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. A user's mistake is one sentence and code 2."""
    parser = _Parser(prog="python -m piperjax", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    show = commands.add_parser("show", help="draw a pipeline schedule as text, or as SVG with --svg")
    _add_show_arguments(show)
    simulation = commands.add_parser("simulate", help="all-to-alls on a machine: flat, halo2 and halo3")
    network_table.add_arguments(simulation)
    measurement = commands.add_parser("measure", help="time the devices at hand and write a platform file")
    measure.add_arguments(measurement)
    sample = commands.add_parser("sample", help="generate text from a run's checkpoint")
    _add_sample_arguments(sample)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except ValueError as error:
        print(f"piperjax: error: {error}", file=sys.stderr)
        return 2


def _add_show_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "schedule",
        help=f"{', '.join(registry.names())}, or a .txt or .csv file with one line of actions per pipe rank",
    )
    parser.add_argument("--pipe", type=int, help="pipe ranks (default 4, or as many as the file has)")
    parser.add_argument("--microbatches", type=int, help="microbatches per step (default 8, or the file's)")
    parser.add_argument(
        "--chunks", type=int, default=0, help="stages per pipe rank (default: the schedule's own number)"
    )
    parser.add_argument(
        "--clock",
        choices=("lockstep", "async"),
        default="lockstep",
        help="draw the ticks that are executed (default), or ranks that wait for nothing but their inputs",
    )
    parser.add_argument("--forward", type=float, default=1.0, help="seconds of a forward (default 1)")
    parser.add_argument("--backward", type=float, default=2.0, help="seconds of a backward (default 2)")
    parser.add_argument(
        "--input-gradient", type=float, help="seconds of an input gradient (default: half a backward)"
    )
    parser.add_argument(
        "--weight-gradient", type=float, help="seconds of a weight gradient (default: the rest of a backward)"
    )
    parser.add_argument(
        "--transfer", type=float, default=0.0, help="seconds of a transfer between ranks (default 0)"
    )
    parser.add_argument("--svg", metavar="FILE", help="also write the executed timeline as an SVG picture")
    parser.set_defaults(run=_show)


def _add_sample_arguments(parser: argparse.ArgumentParser):
    # Declared without importing JAX, so that `--help` and `show` answer at once.
    from piperjax.training import sample

    sample.add_arguments(parser)
    parser.set_defaults(run=sample.main)


def _show(args: argparse.Namespace) -> int:
    schedule = _named_or_read(args)
    costs = _costs(args)
    table = pack(schedule)
    timelines = {"async": simulate(schedule, costs), "lockstep": lockstep(table, costs)}
    print(_report(table, timelines, args.clock))
    if args.svg:
        title = (
            f"{Path(schedule.name).stem}, {schedule.num_ranks} pipe ranks, {schedule.num_microbatches} microbatches, "
            f"{'asynchronous' if args.clock == 'async' else 'in lockstep'}"
        )
        try:
            Path(args.svg).write_text(svg_gantt(timelines[args.clock], title=title))
        except OSError as error:
            raise ValueError(
                f"cannot write {args.svg}: {error.strerror}; give a file in an existing folder"
            ) from None
        print(f"\nwrote {args.svg}")
    return 0


def _named_or_read(args: argparse.Namespace) -> Schedule:
    if registry.is_file(args.schedule):
        schedule = registry.read(args.schedule)
        ranks = schedule.num_ranks if args.pipe is None else args.pipe
        microbatches = schedule.num_microbatches if args.microbatches is None else args.microbatches
    else:
        ranks = 4 if args.pipe is None else args.pipe
        microbatches = 8 if args.microbatches is None else args.microbatches
    return registry.build(args.schedule, ranks, microbatches, args.chunks)


def _costs(args: argparse.Namespace) -> ActionCosts:
    if args.forward <= 0 or args.backward <= 0:
        raise ValueError(
            f"forward and backward seconds must be positive, got {args.forward} and {args.backward}"
        )
    input_gradient = args.backward / 2 if args.input_gradient is None else args.input_gradient
    rest = max(args.backward - input_gradient, 0.0)
    return ActionCosts(
        forward=args.forward,
        backward=args.backward,
        input_gradient=input_gradient,
        weight_gradient=rest if args.weight_gradient is None else args.weight_gradient,
        transfer=args.transfer,
    )


def _report(table: TickTable, timelines: dict[str, Timeline], clock: str) -> str:
    schedule = table.schedule
    title = f"{Path(schedule.name).stem}: {schedule.num_stages} stages on {schedule.num_ranks} pipe ranks"
    drawn = f"as executed, {len(table.ticks)} ticks" if clock == "lockstep" else "asynchronous"
    return "\n".join(
        [
            f"{title}, {schedule.num_microbatches} microbatches",
            "",
            "order of actions (stage; F forward, B backward, I input gradient, W weight gradient; microbatch)",
            str(schedule),
            "",
            f"{drawn}; time from left to right, [m] is a backward, (m) I, {{m}} W, a prime a later chunk, · is idle",
            text_gantt(timelines[clock]),
            "",
            f"{'':14s}{'step':>8s}{'busy':>8s}{'bubble':>9s}  chunks held by rank",
            _row("asynchronous", timelines["async"], timelines["async"].peak_held()),
            _row("as executed", timelines["lockstep"], table.peak_held()),
        ]
    )


def _row(label: str, timeline: Timeline, held: tuple[int, ...]) -> str:
    return (
        f"{label:14s}{timeline.step_seconds:8.4g}{max(timeline.busy_seconds):8.4g}"
        f"{timeline.bubble_fraction:9.1%}  {' '.join(map(str, held))}"
    )


if __name__ == "__main__":
    sys.exit(main())
