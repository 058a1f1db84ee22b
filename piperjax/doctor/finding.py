"""This file is what a check finds: how bad it is, what was found, and what to do."""

from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["error", "warning", "note", "ok"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence about the machine.

    Attributes:
      check: what was looked at, one or two words.
      level: "error" if a run cannot work, "warning" if it may fail, hang or be slow, "note" if it is worth knowing.
      found: what was found.
      advice: what to do; an error or a warning has it.
    """

    check: str
    level: Level
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"level must be one of {', '.join(get_args(Level))}, got {self.level!r}")
        if self.level in ("error", "warning") and not self.advice:
            raise ValueError(f"an {self.level} must say what to do, but '{self.found}' does not")

    @property
    def sentence(self) -> str:
        """What was found; and what to do."""
        return f"{self.found}; {self.advice}" if self.advice else self.found


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, level="ok", found=found)


def note(check: str, found: str, advice: str = "") -> Finding:
    """Worth knowing."""
    return Finding(check=check, level="note", found=found, advice=advice)


def warning(check: str, found: str, advice: str) -> Finding:
    """May fail, hang or be slow."""
    return Finding(check=check, level="warning", found=found, advice=advice)


def error(check: str, found: str, advice: str) -> Finding:
    """Cannot work."""
    return Finding(check=check, level="error", found=found, advice=advice)
