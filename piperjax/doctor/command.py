"""This file is `python -m piperjax doctor`: checks a machine before a run, and says what to do."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from meshes.platform import load_platform
from piperjax.doctor import devices, flags, host, network, slurm, software
from piperjax.doctor.environment import Environment
from piperjax.doctor.finding import Finding, warning
from piperjax.doctor.report import counts, json_report, text_report
from piperjax.doctor.this_machine import this_machine

Check = Callable[[Environment], list[Finding]]

# In the order of the report; JAX is started by the first that asks for devices.
CHECKS: tuple[Check, ...] = (
    *software.CHECKS,
    *flags.CHECKS,
    *slurm.CHECKS,
    *host.CHECKS,
    *network.CHECKS,
    *devices.CHECKS,
)

DESCRIPTION = """\
Checks this machine before a run: versions, plugins, devices, compiler flags, the environment of the network, SLURM,
processor cores, limits and room. Each finding says what to do. Exit code 2 if a run cannot work, else 0. Under srun,
each process checks itself: srun --ntasks=1 is enough for most, one task per GPU checks how they are bound.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "--platform", metavar="NAME", help="the machine it should be: one of meshes/, or a .toml file"
    )
    parser.add_argument(
        "--out", default="runs", metavar="DIR", help="where checkpoints will be (default runs)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Runs every check and prints what was found; returns 2 if there is an error, else 0.

    Raises:
      ValueError: if no platform has the name.
    """
    start = time.monotonic()
    expected = None if args.platform in (None, "auto") else load_platform(args.platform)
    findings = examine(this_machine(out=Path(args.out), expected=expected))
    seconds = time.monotonic() - start
    if args.json:
        print(json_report(findings, seconds=seconds))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        width = shutil.get_terminal_size((120, 24)).columns
        print(text_report(findings, seconds=seconds, width=width, colour=colour))
    return 2 if counts(findings)["error"] else 0


def examine(env: Environment, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """Returns what the checks find; one that fails itself is a finding too, since a machine may be odd in any way."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check(env)
        except Exception as problem:
            found = f"the check {check.__name__} failed: {type(problem).__name__}: {problem}"
            findings.append(
                warning("doctor", " ".join(found.split()), "look at it yourself, and report this")
            )
    return findings
