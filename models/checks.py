"""This file is the checks of the fields of a model: each raises ValueError with one sentence."""

import math
from typing import Any, Literal, get_args


def check_counts(owner: Any, *names: str, at_least: int = 1) -> None:
    """Refuses what is not a whole number of at least `at_least`."""
    for name in names:
        value = getattr(owner, name)
        if type(value) is not int or value < at_least:
            rule = f"must be a whole number of at least {at_least}"
            raise ValueError(f"{name} of a {type(owner).__name__} {rule}, got {value!r}")


def check_numbers(owner: Any, *names: str, zero: Literal["allowed", "refused"] = "refused") -> None:
    """Refuses what is not a positive number, or zero where that is allowed."""
    for name in names:
        value = getattr(owner, name)
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not is_number or value < 0 or (value == 0 and zero == "refused"):
            rule = "a positive number" if zero == "refused" else "a number of at least 0"
            raise ValueError(f"{name} of a {type(owner).__name__} must be {rule}, got {value!r}")


def check_choice(owner: Any, name: str, choices: Any) -> None:
    """Refuses what is none of the values of a Literal."""
    value = getattr(owner, name)
    if (type(value), value) not in [(type(choice), choice) for choice in get_args(choices)]:
        allowed = ", ".join(repr(choice) for choice in get_args(choices))
        raise ValueError(f"{name} of a {type(owner).__name__} must be one of {allowed}, got {value!r}")


def check_even(owner: Any, name: str) -> None:
    """Refuses odd numbers of rotated features."""
    value = getattr(owner, name)
    if value % 2:
        raise ValueError(
            f"{name} must be even because rotary embedding turns pairs of features, "
            f"got {value}; use {value + 1}"
        )


def check_part(owner: Any, name: str, *types: type) -> None:
    """Refuses a part of another type."""
    if not isinstance(value := getattr(owner, name), types):
        names = " or ".join(cls.__name__ for cls in types)
        raise ValueError(f"{name} of a {type(owner).__name__} must be a {names}, got {short(value)}")


def short(value: Any) -> str:
    """Returns at most 60 characters of a value."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
