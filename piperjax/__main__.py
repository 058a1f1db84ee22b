"""`python -m piperjax plan | show | simulate | compile | measure | sample | doctor`: what surrounds training."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from piperjax.doctor import command as doctor_command
from piperjax.planner import network_command, plan_command
from piperjax.schedules import show
from piperjax.training import measure

DESCRIPTION = "What surrounds training (train.py): planning it, looking at it, and the machine it runs on."


class _Parser(argparse.ArgumentParser):
    """Ends with one sentence and exit code 2, without repeating the usage; names the nearest of what is known."""

    def error(self, message: str):
        hint = ""
        if wrong := re.search(r"invalid choice: '(.*?)'", message):
            hint = self._nearest(
                wrong[1], [str(one) for action in self._actions for one in action.choices or ()]
            )
        if wrong := re.match(r"unrecognized arguments: (-[^\s=]+)", message):
            hint = self._nearest(
                wrong[1], [flag for action in self._actions for flag in action.option_strings]
            )
        print(f"piperjax: error: {message}{hint}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)

    @staticmethod
    def _nearest(name: str, known: Sequence[str]) -> str:
        near = get_close_matches(name, known, n=1)
        return f"; did you mean {near[0]}?" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. A user's mistake is one sentence and code 2."""
    parser = _Parser(prog="python -m piperjax", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    plan = commands.add_parser(
        "plan", help="find the best mesh and schedule for a model on a machine, and why"
    )
    plan_command.add_arguments(plan)
    drawing = _command(commands, "show", "draw a pipeline schedule as text, or as SVG with --svg")
    show.add_arguments(drawing)
    simulation = _command(
        commands, "simulate", "all-to-alls on a machine: seconds of flat, halo2 and halo3 by nodes and bytes"
    )
    network_command.add_arguments(simulation)
    measurement = commands.add_parser("measure", help="time the devices at hand and write a platform file")
    measure.add_arguments(measurement)
    _add_compile(commands)
    sample = _command(commands, "sample", "generate text from a run's checkpoint")
    _add_sample_arguments(sample)
    doctor = commands.add_parser("doctor", help="check this machine before a run")
    doctor_command.add_arguments(doctor)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
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


def _command(commands: argparse._SubParsersAction, name: str, what: str) -> argparse.ArgumentParser:
    """A command whose own help says what the list of commands says."""
    return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")


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
