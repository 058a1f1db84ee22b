"""This file is `--set a.b=c`: dotted paths into nested dataclasses, values read by the field's annotation."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")
Tree = dict[str, Any]


def parse_assignments(assignments: Iterable[str]) -> Tree:
    """Reads `a.b=c` texts into a tree {"a": {"b": "c"}}; a later text wins.

    Raises:
      ValueError: if a text is not an assignment, or sets a field and a part of the same field.
    """
    tree: Tree = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        names = [name.strip() for name in path.split(".")]
        if not equals or not all(names):
            raise ValueError(f"--set takes FIELD=VALUE such as optimizer.peak_lr=3e-4, got {text!r}")
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set {text}: '{name}' was already set as a whole")
        if isinstance(node.get(names[-1]), dict):
            raise ValueError(f"--set {text}: a part of '{path.strip()}' was already set")
        node[names[-1]] = value.strip()
    return tree


def override(config: Config, tree: Tree, *, where: str = "") -> Config:
    """Returns `config` with the leaves of `tree` replaced; every dataclass on the way is built once, and so checked.

    A step into a tuple is an index, or `*` for every element that has the field:
    `model.layers.*.ffn.router.balance`.

    Raises:
      ValueError: for an unknown path (names the nearest field) or a value of another type (says which type).
    """
    fields = _settable_fields(config)
    changes = {}
    for name, value in tree.items():
        path = f"{where}.{name}" if where else name
        if name not in fields:
            raise ValueError(_unknown(path, fields))
        current = getattr(config, name)
        if not isinstance(value, dict):
            if _is_dataclass(current):
                inside = ", ".join(f"{path}.{entry.name}" for entry in dataclasses.fields(current)[:3])
                raise ValueError(f"{path} is a group of fields and has no value itself; set {inside}, ...")
            changes[name] = parse(value, fields[name], where=path)
        elif _is_dataclass(current):
            changes[name] = override(current, value, where=path)
        elif isinstance(current, tuple) and all(map(_is_dataclass, current)):
            changes[name] = _override_elements(current, value, where=path)
        else:
            raise ValueError(f"{path} is a single value, so {path}.{next(iter(value))} does not exist")
    return dataclasses.replace(config, **changes)


def parse(text: str, annotation: Any, *, where: str) -> Any:
    """Reads a value of the annotated type: int, float, bool, str, Literal, or a tuple of these separated by commas."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        for choice in arguments:
            if str(choice) == text:
                return choice
        raise ValueError(f"{where} must be one of {', '.join(map(str, arguments))}, got '{text}'")
    if origin is tuple:
        return _parse_tuple(text, arguments, where=where)
    if annotation is str:
        return text
    if annotation is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where} must be true or false, got '{text}'")
        return text.lower() == "true"
    kinds = {int: "a whole number", float: "a number"}
    if annotation not in kinds:
        raise ValueError(f"{where} cannot be set from the command line; set one of its parts")
    try:
        return annotation(text)
    except ValueError:
        raise ValueError(f"{where} must be {kinds[annotation]}, got '{text}'") from None


def _parse_tuple(text: str, arguments: tuple[Any, ...], *, where: str) -> tuple[Any, ...]:
    items = [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(items)
    if len(items) != len(arguments):
        raise ValueError(f"{where} must be {len(arguments)} values separated by commas, got '{text}'")
    return tuple(parse(item, kind, where=where) for item, kind in zip(items, arguments, strict=True))


def _override_elements(elements: tuple[Any, ...], tree: Tree, *, where: str) -> tuple[Any, ...]:
    """Returns the elements of a tuple with the overrides of each index, or of `*`."""
    changed = list(elements)
    for name, subtree in tree.items():
        path = f"{where}.{name}"
        if not isinstance(subtree, dict):
            raise ValueError(f"{path} is a group of fields and has no value itself; name a field inside it")
        if name == "*":
            chosen = [index for index, element in enumerate(changed) if _reaches(element, subtree)]
            chosen = chosen or [0]  # no element has the field: fail on the first, which names the nearest
        elif name.isdigit() and int(name) < len(changed):
            chosen = [int(name)]
        else:
            raise ValueError(f"{path} does not exist; use * or an index from 0 to {len(changed) - 1}")
        for index in chosen:
            changed[index] = override(changed[index], subtree, where=path)
    return tuple(changed)


def _reaches(config: Any, tree: Tree) -> bool:
    """True if every path of `tree` exists in `config`."""
    return all(
        hasattr(config, name) and (not isinstance(value, dict) or _reaches(getattr(config, name), value))
        for name, value in tree.items()
    )


def _settable_fields(config: Any) -> dict[str, Any]:
    """Returns field name -> annotation, with `X | None` read as X."""
    hints = typing.get_type_hints(type(config))
    return {entry.name: _without_none(hints[entry.name]) for entry in dataclasses.fields(config)}


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(annotation) if part is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _unknown(path: str, fields: Iterable[str]) -> str:
    parent, _, name = path.rpartition(".")
    nearest = difflib.get_close_matches(name, list(fields), n=1, cutoff=0.0)[0]
    suggestion = f"{parent}.{nearest}" if parent else nearest
    return f"there is no field '{path}'; did you mean '{suggestion}'?"
