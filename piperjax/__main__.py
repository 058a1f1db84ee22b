"""`python -m piperjax show | sample`: look at schedules, and generate text from a checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from piperjax.schedules import classic
from piperjax.schedules.draw import svg_gantt, text_gantt
from piperjax.schedules.schedule import Schedule, parse
from piperjax.schedules.ticks import TickTable, pack
from piperjax.schedules.timeline import ActionCosts, Timeline, lockstep, simulate


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
        "schedule", help="gpipe, one_f_one_b (or 1f1b), or a text file with one line per pipe rank"
    )
    parser.add_argument("--pipe", type=int, default=4, help="pipe ranks (default 4)")
    parser.add_argument("--microbatches", type=int, default=8, help="microbatches per step (default 8)")
    parser.add_argument("--forward", type=float, default=1.0, help="seconds of a forward (default 1)")
    parser.add_argument("--backward", type=float, default=2.0, help="seconds of a backward (default 2)")
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
    schedule = _named_or_read(args.schedule, args.pipe, args.microbatches)
    costs = ActionCosts(forward=args.forward, backward=args.backward, transfer=args.transfer)
    if args.forward <= 0 or args.backward <= 0:
        raise ValueError(
            f"forward and backward seconds must be positive, got {args.forward} and {args.backward}"
        )
    table = pack(schedule)
    executed = lockstep(table, costs)
    print(_report(schedule, table, simulate(schedule, costs), executed))
    if args.svg:
        title = f"{schedule.name}, {schedule.num_ranks} pipe ranks, {schedule.num_microbatches} microbatches"
        try:
            Path(args.svg).write_text(svg_gantt(executed, title=title))
        except OSError as error:
            raise ValueError(
                f"cannot write {args.svg}: {error.strerror}; give a file in an existing folder"
            ) from None
        print(f"\nwrote {args.svg}")
    return 0


def _named_or_read(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    path = Path(name)
    if path.is_file():
        try:
            return parse(path.read_text(), name=path.stem)
        except UnicodeDecodeError:
            raise ValueError(
                f"{name} is not text; a schedule file has one line of actions per pipe rank"
            ) from None
    return classic.build(name, num_ranks, num_microbatches)


def _report(schedule: Schedule, table: TickTable, asynchronous: Timeline, executed: Timeline) -> str:
    busy = max(executed.busy_seconds)
    title = f"{schedule.name}: {schedule.num_stages} stages on {schedule.num_ranks} pipe ranks"
    return "\n".join(
        [
            f"{title}, {schedule.num_microbatches} microbatches",
            "",
            "order of actions (stage, F forward or B backward, microbatch)",
            str(schedule),
            "",
            f"as executed, {len(table.ticks)} ticks; time from left to right, [m] is a backward, · is idle",
            text_gantt(executed),
            "",
            f"{'':14s}{'step':>8s}{'busy':>8s}{'bubble':>9s}  in flight by rank",
            _row("asynchronous", asynchronous, busy, asynchronous.peak_in_flight()),
            _row("as executed", executed, busy, table.peak_in_flight()),
        ]
    )


def _row(label: str, timeline: Timeline, busy: float, in_flight: tuple[int, ...]) -> str:
    return (
        f"{label:14s}{timeline.step_seconds:8.4g}{busy:8.4g}{timeline.bubble_fraction:9.1%}  "
        f"{' '.join(map(str, in_flight))}"
    )


if __name__ == "__main__":
    sys.exit(main())
