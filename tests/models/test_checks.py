"""Checks of fields: what is refused, in which words."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from models.checks import check_choice, check_counts, check_even, check_numbers, check_part, short


@dataclass
class Thing:
    value: Any


@pytest.mark.parametrize(
    ("check", "good", "bad", "words"),
    [
        (
            check_counts,
            (1, 7),
            (0, 1.0, True, "2"),
            "value of a Thing must be a whole number of at least 1, got",
        ),
        (
            check_numbers,
            (0.5, 2),
            (0, -1.0, float("nan"), "1"),
            "value of a Thing must be a positive number, got",
        ),
        (check_even, (2, 128), (3,), "rotary embedding turns pairs of features, got 3; use 4"),
    ],
)
def test_values_are_refused_in_one_sentence(check, good, bad, words):
    for value in good:
        check(Thing(value), "value")
    for value in bad:
        with pytest.raises(ValueError, match=words):
            check(Thing(value), "value")


def test_bounds_choices_and_parts():
    check_counts(Thing(0), "value", at_least=0)
    check_numbers(Thing(0.0), "value", zero="allowed")
    check_choice(Thing("a"), "value", Literal["a", 2])
    check_part(Thing(Thing(1)), "value", Thing)
    with pytest.raises(ValueError, match="must be one of 'a', 2, got 2.0"):
        check_choice(Thing(2.0), "value", Literal["a", 2])
    with pytest.raises(ValueError, match="value of a Thing must be a int or str, got None"):
        check_part(Thing(None), "value", int, str)
    assert short("x" * 100) == "'" + "x" * 56 + "..."
