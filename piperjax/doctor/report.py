"""This file is findings as text for people and as JSON for programs."""

import json
import textwrap
from collections.abc import Sequence
from typing import get_args

from piperjax.doctor.finding import Finding, Level

# Colours of terminals: red, yellow, cyan, green.
_COLOURS = {"error": "31", "warning": "33", "note": "36", "ok": "32"}


def text_report(
    findings: Sequence[Finding], *, seconds: float, width: int = 120, colour: bool = False
) -> str:
    """Returns a line or two for each finding, the worst first, and a count.

    Args:
      findings: in the order of checks.
      seconds: that the checks took.
      width: of the lines.
      colour: whether levels are coloured, for a terminal.
    """
    label = max((len(finding.check) for finding in findings), default=0)
    first = len("warning") + label + 4
    lines = []
    for finding in worst_first(findings):
        level = f"{finding.level:<7}"
        shown = f"\033[{_COLOURS[finding.level]}m{level}\033[0m" if colour else level
        text = textwrap.wrap(
            finding.sentence, max(width - first, 30), break_long_words=False, break_on_hyphens=False
        )
        lines.append(f"{shown}  {finding.check:<{label}}  {text[0] if text else ''}".rstrip())
        lines += [" " * first + more for more in text[1:]]
    return "\n".join([*lines, "", f"{summary(findings)}, in {seconds:.1f} s"])


def json_report(findings: Sequence[Finding], *, seconds: float) -> str:
    """Returns one object: findings, how many of each level, and the seconds that it took."""
    listed = [
        {"level": finding.level, "check": finding.check, "found": finding.found, "advice": finding.advice}
        for finding in worst_first(findings)
    ]
    return json.dumps(
        {"findings": listed, "counts": counts(findings), "seconds": round(seconds, 3)}, indent=2
    )


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Returns errors, warnings, notes and the rest, each in the order of checks."""
    return sorted(findings, key=lambda finding: get_args(Level).index(finding.level))


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """Returns how many findings there are of each level."""
    return {level: sum(finding.level == level for finding in findings) for level in get_args(Level)}


def summary(findings: Sequence[Finding]) -> str:
    """Returns such as "1 error, 2 warnings, 3 notes, 12 ok"."""
    found = counts(findings)
    words = [
        f"{number} {level}{'s' if number != 1 and level != 'ok' else ''}" for level, number in found.items()
    ]
    return ", ".join(words)
