"""`python -m piperjax show`: a schedule as text or picture, with its bubble, for times that are given."""

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from math import inf
from pathlib import Path

from piperjax.schedules import registry
from piperjax.schedules.auto import PER_STAGE, auto, chunk_costs
from piperjax.schedules.draw import svg_gantt, text_gantt
from piperjax.schedules.schedule import Schedule
from piperjax.schedules.ticks import TickTable, pack
from piperjax.schedules.timeline import ActionCosts, PerStage, Timeline, lockstep, simulate

COSTS = tuple(field.name for field in fields(ActionCosts))


def add_arguments(parser: argparse.ArgumentParser):
    """Declares the options of the command."""
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
    parser.add_argument(
        "--cost",
        action="append",
        default=[],
        metavar="NAME=SECONDS",
        help=f"seconds of one microbatch, repeatable: {', '.join(COSTS)}; those of actions also one per stage, "
        "or for auto one per rank, with commas (default: forward 1, backward 2, of which input_gradient half)",
    )
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="STAGES",
        help="for auto: most activations of a rank's share of the layers that it may hold",
    )
    parser.add_argument("--svg", metavar="FILE", help="also write the executed timeline as an SVG picture")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a schedule, its timeline and its bubble; returns the exit code."""
    costs = parse_costs(args.cost)
    schedule, costs = _scheduled(args, costs)
    table = pack(schedule, units=_units(costs))
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


def parse_costs(texts: Sequence[str]) -> ActionCosts:
    """Reads `name=seconds` or `name=seconds,seconds,...`.

    Raises:
      ValueError: if there is no such cost or a number is none.
    """
    given: dict[str, PerStage] = {}
    for text in texts:
        name, _, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in COSTS:
            near = get_close_matches(name, COSTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no cost named {name!r}; costs are {', '.join(COSTS)}{hint}")
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            raise ValueError(
                f"--cost takes {name}=SECONDS, or one number per stage with commas, got {text!r}"
            ) from None
        if len(numbers) > 1 and name not in PER_STAGE:
            raise ValueError(f"{name} is the same for all stages, got {len(numbers)} numbers; give one")
        given[name] = numbers if len(numbers) > 1 else numbers[0]
    return _completed(given)


def _completed(given: dict[str, PerStage]) -> ActionCosts:
    for name in ("forward", "backward"):
        if min(_values(given.get(name, 1.0))) <= 0:
            raise ValueError(f"{name} seconds must be positive, got {given[name]}")
    backward = given.setdefault("backward", 2.0)
    inputs = given.setdefault("input_gradient", _each(backward, backward, lambda b, _: b / 2))
    given.setdefault("weight_gradient", _each(backward, inputs, lambda b, i: max(b - i, 0.0)))
    return ActionCosts(**given)


def _values(value: PerStage) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _each(a: PerStage, b: PerStage, function) -> PerStage:
    """A function of two costs, stage by stage if either is."""
    if not isinstance(a, tuple) and not isinstance(b, tuple):
        return function(a, b)
    longest = max(len(_values(a)), len(_values(b)))
    pairs = zip(*(_values(x) if isinstance(x, tuple) else (x,) * longest for x in (a, b)), strict=False)
    return tuple(function(*pair) for pair in pairs)


def _units(costs: ActionCosts) -> dict[str, float]:
    """Times of the slowest stage, by which tick tables are chosen."""
    names = {"F": "forward", "B": "backward", "I": "input_gradient", "W": "weight_gradient"}
    return {kind: max(_values(getattr(costs, name))) for kind, name in names.items()}


def _scheduled(args: argparse.Namespace, costs: ActionCosts) -> tuple[Schedule, ActionCosts]:
    """The schedule, and the costs of its stages."""
    if args.schedule != "auto":
        if args.memory_limit is not None:
            raise ValueError(
                f"--memory-limit is what auto keeps within, but {args.schedule} keeps what it keeps; show auto"
            )
        return _named_or_read(args), costs
    ranks = 4 if args.pipe is None else args.pipe
    microbatches = 8 if args.microbatches is None else args.microbatches
    if ranks < 1 or microbatches < 1:
        raise ValueError(
            f"auto needs at least one pipe rank and one microbatch, got {ranks} and {microbatches}"
        )
    chunks = registry.check("auto", ranks, microbatches, args.chunks)
    share = replace(
        costs,
        **{name: _each(getattr(costs, name), chunks, lambda seconds, v: seconds * v) for name in PER_STAGE},
    )
    for name in PER_STAGE:
        if isinstance(getattr(costs, name), tuple) and len(getattr(costs, name)) != ranks:
            raise ValueError(
                f"for auto, {name} seconds must be one number or one per pipe rank, got "
                f"{len(getattr(costs, name))} for {ranks} ranks"
            )
    limit = inf if args.memory_limit is None else args.memory_limit
    schedule = auto(ranks, microbatches, chunks, costs=share, memory_limit=limit, clock=args.clock)
    return schedule, chunk_costs(schedule, share)


def _named_or_read(args: argparse.Namespace) -> Schedule:
    if registry.is_file(args.schedule):
        schedule = registry.read(args.schedule)
        ranks = schedule.num_ranks if args.pipe is None else args.pipe
        microbatches = schedule.num_microbatches if args.microbatches is None else args.microbatches
    else:
        ranks = 4 if args.pipe is None else args.pipe
        microbatches = 8 if args.microbatches is None else args.microbatches
    return registry.build(args.schedule, ranks, microbatches, args.chunks)


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
