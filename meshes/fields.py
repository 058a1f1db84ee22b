"""This file checks the fields of a machine description: every mistake is one sentence that names the field."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from math import inf, isfinite
from typing import Any, Literal, get_args

import numpy as np

# measured: here, by `python -m piperjax measure`. published: by somebody who measured it. vendor: a data sheet's peak.
# assumed: an order of magnitude, or what follows from the others.
Provenance = Literal["measured", "published", "vendor", "assumed"]


def checked_fields(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the values as arguments of the dataclass `cls`, if they are fields of it and none is missing."""
    known = {entry.name: entry for entry in fields(cls)}
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ";"
            raise ValueError(f"{where} has no field '{key}'{hint} its fields are {', '.join(known)}")
    for key, entry in known.items():
        if key not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{where} needs the field {key}")
    return dict(values)


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """A whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_rate(name: str, value: Any) -> None:
    """A positive finite number."""
    if type(value) not in (int, float) or not isfinite(value) or value <= 0:
        raise ValueError(
            f"{name} must be a positive number in base units (bytes, seconds, FLOP), got {value!r}"
        )


def check_rate_by_size(name: str, value: Any) -> None:
    """A rate, or rates by size: pairs of a size and the rate there, sizes growing."""
    if not isinstance(value, Sequence):
        check_rate(name, value)
        return
    if isinstance(value, str) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in value):
        raise ValueError(
            f"{name} must be a rate, or pairs of bytes and a rate as in [[1e6, 2e10], [1e7, 1e10]]"
        )
    for size, rate in value:
        check_rate(f"{name}, bytes,", size)
        check_rate(f"{name}, rate,", rate)
    sizes = [size for size, _ in value]
    if not sizes or sizes != sorted(set(sizes)):
        raise ValueError(f"{name} must have rates for growing numbers of bytes, got {sizes}")


def as_pairs(rates: Any) -> Any:
    """The same rate, or the same pairs as tuples."""
    return tuple(map(tuple, rates)) if isinstance(rates, Sequence) else rates


def rate_at(rates: Any, size: Any) -> Any:
    """The rate at a size, or at an array of sizes: between those that are known a power law, the nearest beyond."""
    if not isinstance(rates, Sequence):
        return rates
    sizes, known = np.log(np.array(rates, float)).T
    return np.exp(np.interp(np.log(np.maximum(size, 1.0)), sizes, known))


def check_size(name: str, value: Any) -> None:
    """A finite number of at least 0."""
    if type(value) not in (int, float) or not isfinite(value) or value < 0:
        raise ValueError(
            f"{name} must be a number of at least 0 in base units (bytes, seconds, FLOP), got {value!r}"
        )


def check_fraction(name: str, value: Any) -> None:
    """A number above 0 and at most 1."""
    check_rate(name, value)
    if value > 1:
        raise ValueError(f"{name} must be at most 1, got {value!r}")


def check_part(name: str, value: Any) -> None:
    """A number from 0 to 1."""
    check_size(name, value)
    if value > 1:
        raise ValueError(f"{name} must be at most 1, got {value!r}")


def check_by_dtype(name: str, values: Any, check: Callable[[str, Any], None], *, example: str) -> None:
    """A table of one number for each dtype."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must give a rate for each dtype, such as {{ {example} }}, got {values!r}")
    for dtype, value in values.items():
        check(f"{name}.{dtype}", value)


def check_by_kind(name: str, values: Any, kinds: Sequence[str], check: Callable[[str, Any], None]) -> None:
    """A table of one number for each of some kinds."""
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{name} must give a rate for each kind, such as {{ {kinds[0]} = 1e10 }}, got {values!r}"
        )
    for kind, value in values.items():
        if kind not in kinds:
            raise ValueError(f"{name} has no kind '{kind}'; its kinds are {', '.join(kinds)}")
        check(f"{name}.{kind}", value)


def check_range(name: str, smallest: Any, largest: Any) -> None:
    """Two ends of a measured range, both positive and in order, or neither."""
    if smallest is None and largest is None:
        return
    if smallest is None or largest is None:
        raise ValueError(f"{name} must have both ends, smallest and largest, or neither, got only one")
    check_rate(f"{name}, smallest,", smallest)
    check_rate(f"{name}, largest,", largest)
    if smallest > largest:
        raise ValueError(f"{name} must not begin ({smallest!r}) after its end ({largest!r})")


def check_text(name: str, value: Any) -> None:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a non-empty text, got {value!r}")


def check_provenance(where: str, value: Any) -> None:
    """One of `Provenance`."""
    if value not in get_args(Provenance):
        raise ValueError(
            f"{where} provenance must be one of {', '.join(get_args(Provenance))}, got {value!r}"
        )


def within_range(value: Any, smallest: float | None, largest: float | None) -> Any:
    """Whether a value, or each of an array, lies in a measured range; True where there is none to leave."""
    return (value >= (0.0 if smallest is None else smallest)) & (
        value <= (inf if largest is None else largest)
    )
