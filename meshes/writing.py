"""This file writes a machine description as TOML, so that `load_platform` reads back what was written."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from decimal import Decimal
from typing import Any

from meshes.platform import Platform

DEVICE_TABLES = ("matmul", "grouped_matmul", "attention")


def platform_toml(
    platform: Platform, *, header: Sequence[str] = (), notes: Mapping[str, str] | None = None
) -> str:
    """Returns the text of a platform file; fields that have their default are left out.

    Args:
      platform: what to describe. Its name is that of the file, and not in it.
      header: lines of a comment at the top.
      notes: a comment for each table by its name, such as "device.matmul" or the name of a link.
    """
    notes = notes or {}
    lines = [f"# {line}".rstrip() for line in header]
    lines += _entries(platform, skip=("name", "device", "links"))
    lines += ["", _heading("[device]", notes.get("device"))]
    lines += _entries(platform.device, skip=DEVICE_TABLES)
    for table in DEVICE_TABLES:
        if getattr(platform.device, table) is not None:
            lines += ["", _heading(f"[device.{table}]", notes.get(f"device.{table}"))]
            lines += _entries(getattr(platform.device, table))
    for number, link in enumerate(platform.links):
        lines += ["", _heading("[[links]]", "innermost first" if number == 0 else None)]
        lines += [f"# {notes[link.name]}"] if link.name in notes else []
        lines += _entries(link)
    return "\n".join(lines) + "\n"


def _heading(text: str, note: str | None) -> str:
    return f"{text:<39} # {note}" if note else text


def _entries(value: Any, skip: Sequence[str] = ()) -> list[str]:
    assert is_dataclass(value)
    lines = []
    for entry in fields(value):
        found = getattr(value, entry.name)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if entry.name not in skip and found is not None and (found != default or entry.name == "provenance"):
            lines.append(f"{entry.name} = {_literal(found)}")
    return lines


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + " }"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
        return f'"{escaped}"'
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, int):
        return f"{value:_}"
    number = float(value)
    if number == 0 or 1e-3 <= abs(number) < 1e6:
        return repr(number)
    # The shortest digits that read back as the same number, as in 1.915e14.
    digits, _, exponent = f"{Decimal(repr(number)).normalize():E}".partition("E")
    return f"{digits}e{int(exponent)}"
