"""This file is the command line of train.py: flags to a TrainConfig, and every mistake to one sentence."""

import argparse
import dataclasses
import difflib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from models.presets import PRESETS, named_model
from piperjax.schedules import registry
from piperjax.training.config import DataConfig, LogConfig, TrainConfig
from piperjax.training.overrides import Tree, override, parse_assignments
from piperjax.training.planning import PlanFile, make_plan, read_plan_file, requested_sizes, without_plan
from piperjax.training.run_file import read_run_file

DEFAULT_MODEL = "tiny"

DESCRIPTION = "Train a mixture-of-experts language model. The same command resumes when it was interrupted."
EPILOG = """\
examples:
  python train.py                                   tiny model, Python's own source text, one device
  python train.py --devices 8 --pipe 2 --expert 4   the same on eight simulated devices
  python train.py --data 'books/*.txt' --model small --steps 5000 --out runs/books
  python train.py --resume runs/books --steps 9000  go on, on whatever devices there are now
  python train.py --set optimizer.peak_lr=1e-3 --set checkpoint.every_steps=50
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser; every default is None, so that `--resume` can tell what was given."""
    parser = _Parser(
        prog="train.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Formatter,
        usage="train.py [flags]",
        allow_abbrev=False,
    )
    _add_what(parser)
    _add_where(parser)
    _add_how(parser)
    processes = parser.add_argument_group("several processes (found by themselves under SLURM)")
    processes.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    processes.add_argument("--processes", type=int, metavar="N", help="number of processes")
    processes.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    data = {entry.name: entry.default for entry in dataclasses.fields(DataConfig)}
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--model",
        metavar="NAME",
        help=f"{', '.join(PRESETS)}, or a .json file (default {DEFAULT_MODEL})",
    )
    what.add_argument(
        "--data",
        metavar="PATH",
        help=".txt .md .py .jsonl .parquet, a directory or a glob, compressed or not "
        f"(default {data['path']}: the source text of Python's own library)",
    )
    what.add_argument(
        "--tokenizer", metavar="PATH", help=f"a Hugging Face tokenizer.json (default {data['tokenizer']})"
    )
    what.add_argument(
        "--batch", type=int, metavar="N", help=f"sequences per step (default {data['batch_size']})"
    )
    what.add_argument("--seq", type=int, metavar="N", help=f"tokens per sequence (default {data['seq_len']})")
    what.add_argument(
        "--steps", type=int, metavar="N", help=f"length of the run (default {TrainConfig.steps})"
    )
    what.add_argument(
        "--seed", type=int, metavar="N", help="of initial parameters and data order (default 0)"
    )


def _add_where(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="devices per process; a CPU simulates them (default all there are)",
    )
    where.add_argument(
        "--mesh",
        metavar="SIZES",
        help="auto, or such as pipe=2,expert=4,data=1 (default auto: the planner chooses what is not given)",
    )
    where.add_argument(
        "--plan", metavar="FILE", help="a plan that python -m piperjax plan --out wrote, instead of a mesh"
    )
    where.add_argument("--pipe", type=int, metavar="N", help="pipe ranks; -1 takes the devices that are left")
    where.add_argument(
        "--expert", type=int, metavar="N", help="devices that share a layer's experts; -1 likewise"
    )
    where.add_argument("--data-parallel", type=int, metavar="N", help="replicas of the experts; -1 likewise")
    where.add_argument(
        "--platform", metavar="NAME", help="a machine of meshes/, or a .toml file (default auto: recognised)"
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how it runs")
    how.add_argument(
        "--schedule",
        metavar="NAME",
        help=f"{', '.join(registry.names())} (1f1b is short for one_f_one_b), or a schedule file; see python -m "
        "piperjax show (default: the planner's choice)",
    )
    how.add_argument("--microbatches", type=int, metavar="N", help="per step (default: the planner's choice)")
    how.add_argument("--dtype", metavar="TYPE", help=f"float32 or bfloat16 (default {TrainConfig.dtype})")
    how.add_argument(
        "--out", metavar="DIR", help="run directory (default runs/MODEL); resumes if it was begun"
    )
    how.add_argument(
        "--resume", metavar="DIR", help="go on with the run in DIR; other flags change what may change"
    )
    how.add_argument(
        "--log-every",
        type=int,
        metavar="N",
        help=f"steps between printed lines (default {LogConfig.log_every})",
    )
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of the configuration (piperjax/training/config.py) by its dotted path, repeatable",
    )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the code."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=100)


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage and leaving."""

    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix("argument "))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs train.py; returns the exit code: 0, 2 for a mistake, 128 + N after signal N."""
    try:
        code = run(parse_arguments(argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        # Once the steps have begun, Ctrl-C saves instead (interrupt.py).
        print("\nstopped before the first step", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # `train.py | head`: without this, Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, RuntimeError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"train.py: error: {sentence}", file=sys.stderr)
        return 2


def _sentence(error: Exception) -> str | None:
    """Returns what to tell the user, None for an error that is ours and needs its traceback."""
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return f"cannot read or write{where}: {error.strerror or error}"
    if isinstance(error, ValueError):
        return " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in str(error):
        return (
            "the devices ran out of memory; use more --microbatches, --set plan.memory_mode=stage, a smaller "
            "--batch or --seq, or more devices"
        )
    return None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags.

    Raises:
      ValueError: for an unknown flag (names the nearest) or a value of another type.
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            raise ValueError(f"'{unknown[0]}' belongs to no flag; see train.py --help")
        nearest = difflib.get_close_matches(name, flags, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no flag {name}; did you mean {nearest}?")
    return args


def run(args: argparse.Namespace) -> int:
    """Builds the configuration, starts the devices and trains; returns the exit code.

    Raises:
      ValueError: if something is impossible.
    """
    # Everything that needs no devices is checked before JAX starts, so that mistakes are told at once.
    tree, plan_tree = without_plan(parse_assignments(args.set))
    requested_sizes(args)
    plan_file = None if args.plan is None else read_plan_file(args.plan)
    config = configuration(args, tree, plan_file)
    config.model.check_trainable()

    from piperjax.runtime import backend
    from piperjax.training import distributed

    group = distributed.process_group(args.coordinator, args.processes, args.process_id)
    flag_lines = backend.prepare(args.devices)
    distributed.initialize(group)
    if distributed.is_writer():
        for line in flag_lines:
            print(f"{'xla':<9} {line}")

    from piperjax.training.loop import train
    from piperjax.training.machine import find_platform

    devices = distributed.first_devices(args.devices)
    platform = find_platform(config.platform, devices)
    choice = make_plan(args, config, platform, len(devices), plan_file=plan_file, changes=plan_tree)
    config = dataclasses.replace(config, plan=choice.plan)
    return train(config, devices=devices, notes=choice.notes).exit_code


def configuration(args: argparse.Namespace, tree: Tree, plan_file: PlanFile | None = None) -> TrainConfig:
    """Returns the configuration that flags and assignments describe; its plan is that of `--resume`, or None.

    Model, batch and sequence length of a new run are by default those that the plan file was made for.
    """
    batch, seq_len = args.batch, args.seq
    if args.resume is not None:
        if args.out is not None:
            raise ValueError("--resume and --out both name the run directory; give one of them")
        config = read_run_file(args.resume)
        if args.model is not None:
            config = dataclasses.replace(config, model=named_model(args.model), plan=None)
    else:
        planned_for = plan_file.model if plan_file else ""
        model = named_model(args.model or planned_for or DEFAULT_MODEL)
        config = TrainConfig(model=model, out=args.out or f"runs/{model.name}")
        if plan_file:
            batch = plan_file.plan.batch_size if batch is None else batch
            seq_len = plan_file.plan.seq_len if seq_len is None else seq_len
    flags = {
        "data": {
            "path": args.data,
            "tokenizer": args.tokenizer,
            "batch_size": batch,
            "seq_len": seq_len,
        },
        "log": {"log_every": args.log_every},
    }
    changes: dict[str, Any] = {
        "steps": args.steps,
        "dtype": args.dtype,
        "platform": args.platform,
        "seed": args.seed,
    }
    if args.seed is not None:
        flags["data"]["seed"] = args.seed
    for section, values in flags.items():
        given = {name: value for name, value in values.items() if value is not None}
        changes[section] = dataclasses.replace(getattr(config, section), **given)
    given = {name: value for name, value in changes.items() if value is not None}
    # The plan is made anew below; meanwhile it would contradict a changed batch.
    plan = config.plan
    config = override(dataclasses.replace(config, plan=None, **given), tree)
    fits = plan is not None and (plan.batch_size, plan.seq_len) == (
        config.data.batch_size,
        config.data.seq_len,
    )
    return (
        dataclasses.replace(config, plan=plan)
        if fits and plan.num_layers == config.model.num_layers
        else config
    )
