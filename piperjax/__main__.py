"""`python -m piperjax plan | show | simulate | compile | measure | sample | doctor`: what surrounds training."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from piperjax.doctor import command as doctor_command
from piperjax.planner import network_command, plan_command
from piperjax.schedules import show
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
    plan = commands.add_parser(
        "plan", help="find the best mesh and schedule for a model on a machine, and why"
    )
    plan_command.add_arguments(plan)
    drawing = commands.add_parser("show", help="draw a pipeline schedule as text, or as SVG with --svg")
    show.add_arguments(drawing)
    simulation = commands.add_parser("simulate", help="all-to-alls on a machine: flat, halo2 and halo3")
    network_command.add_arguments(simulation)
    measurement = commands.add_parser("measure", help="time the devices at hand and write a platform file")
    measure.add_arguments(measurement)
    _add_compile(commands)
    sample = commands.add_parser("sample", help="generate text from a run's checkpoint")
    _add_sample_arguments(sample)
    doctor = commands.add_parser("doctor", help="check this machine before a run")
    doctor_command.add_arguments(doctor)
    args = parser.parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # `... | head`: without this, Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ValueError as error:
        print(f"piperjax: error: {error}", file=sys.stderr)
        return 2


def _add_compile(commands: argparse._SubParsersAction):
    from piperjax.training import cli, compile_command

    # The flags of train.py, with their own help.
    compile_command.add_arguments(
        commands.add_parser(
            "compile",
            parents=[cli.build_parser()],
            conflict_handler="resolve",
            description=compile_command.DESCRIPTION,
            help="compile a training step for simulated devices and compare it with the plan's prediction",
        )
    )


def _add_sample_arguments(parser: argparse.ArgumentParser):
    # Declared without importing JAX, so that `--help` and `show` answer at once.
    from piperjax.training import sample

    sample.add_arguments(parser)
    parser.set_defaults(run=sample.main)


if __name__ == "__main__":
    sys.exit(main())
