"""Checks of fields: what passes, and the sentence for what does not."""

import math

import numpy as np
import pytest

from meshes import fields
from meshes.platform import Link


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "1", True])
def test_rates_are_positive_and_finite(value):
    fields.check_rate("rate", 1)
    fields.check_rate("rate", 2.5)
    with pytest.raises(ValueError, match="rate must be a positive number in base units"):
        fields.check_rate("rate", value)


def test_sizes_may_be_zero_and_fractions_at_most_one():
    fields.check_size("size", 0)
    with pytest.raises(ValueError, match="size must be a number of at least 0 in base units"):
        fields.check_size("size", -0.1)
    fields.check_fraction("part", 1)
    with pytest.raises(ValueError, match="part must be at most 1, got 57"):
        fields.check_fraction("part", 57)


def test_counts():
    fields.check_count("count", 0, least=0)
    with pytest.raises(ValueError, match="count must be a whole number of at least 1, got 0"):
        fields.check_count("count", 0)


@pytest.mark.parametrize(
    ("smallest", "largest", "sentence"),
    [
        (1, None, "bytes must have both ends, smallest and largest, or neither, got only one"),
        (2, 1, "bytes must not begin (2) after its end (1)"),
        (0, 1, "bytes, smallest, must be a positive number"),
    ],
)
def test_ranges_have_two_ends_in_order(smallest, largest, sentence):
    fields.check_range("bytes", None, None)
    fields.check_range("bytes", 1, 2)
    with pytest.raises(ValueError) as error:
        fields.check_range("bytes", smallest, largest)
    assert sentence in str(error.value)


def test_within_range():
    assert fields.within_range(5, 1, 10)
    assert not fields.within_range(0.5, 1, 10)
    assert fields.within_range(1e30, None, None)  # nothing is known to be left
    np.testing.assert_array_equal(
        fields.within_range(np.array([0, 1, 10, 11]), 1, 10), [False, True, True, False]
    )


def test_fields_of_a_dataclass():
    values = {"name": "wire", "devices": 8, "bytes_per_second": 1e9, "latency_seconds": 1e-6}
    assert fields.checked_fields(Link, values, "[[links]]") == values
    with pytest.raises(ValueError, match="has no field 'device', did you mean 'devices'"):
        fields.checked_fields(Link, {**values, "device": 8}, "[[links]]")


def test_rates_by_size_are_a_power_law_between_what_is_known():
    rates = [[1e6, 4e10], [1e8, 1e10]]
    fields.check_rate_by_size("norm", rates)
    fields.check_rate_by_size("norm", 3e10)
    assert fields.rate_at(3e10, 1e5) == 3e10
    np.testing.assert_allclose(
        fields.rate_at(rates, np.array([0, 1e6, 1e7, 1e8, 1e9])), [4e10, 4e10, 2e10, 1e10, 1e10]
    )


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        (-1.0, "norm must be a positive number"),
        (
            [1e6, 2e10],
            r"norm must be a rate, or pairs of bytes and a rate as in \[\[1e6, 2e10\], \[1e7, 1e10\]\]",
        ),
        ("fast", "norm must be a rate, or pairs"),
        ([[1e6, 0]], "norm, rate, must be a positive number"),
        ([[1e7, 1e10], [1e6, 2e10]], "norm must have rates for growing numbers of bytes"),
        ([], "norm must have rates for growing numbers"),
    ],
)
def test_rates_by_size_that_are_none_are_named(rates, sentence):
    with pytest.raises(ValueError, match=sentence):
        fields.check_rate_by_size("norm", rates)
