"""Axis sizes: what a person gives becomes a whole mesh, or a sentence that says what would."""

import itertools
from math import prod

import pytest

from meshes.axes import AXES, BATCH, DATA, EXPERT, PIPE, divisors, resolve_axes


def test_axes_are_outermost_first():
    assert AXES == ("pipe", "data", "expert_group", "expert_node", "expert_local")
    assert AXES[1:] == BATCH
    assert (PIPE, DATA, *EXPERT) == AXES


@pytest.mark.parametrize(
    ("given", "pipe", "data", "expert"),
    [
        ({}, 1, 8, 1),
        ({"expert": 4}, 1, 2, 4),
        ({"pipe": 2}, 2, 4, 1),
        ({"pipe": 2, "expert": 4}, 2, 1, 4),
        ({"pipe": 2, "expert": -1}, 2, 1, 4),
        ({"expert": -1}, 1, 1, 8),
        ({"pipe": -1, "data": 2}, 4, 2, 1),
        ({"pipe": 2, "expert": 2, "data": -1}, 2, 2, 2),
        ({"pipe": 1, "expert": 1, "data": 8}, 1, 8, 1),
    ],
)
def test_what_is_given_is_completed(given, pipe, data, expert):
    sizes = resolve_axes(8, **given)
    assert (sizes.pipe, sizes.data, sizes.expert) == (pipe, data, expert)
    assert sizes.num_devices == 8


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"pipe": 3},
            "pipe 3 must divide the 8 devices, so that data can take the rest; use pipe = 1 or 2 or 4 or 8",
        ),
        (
            {"pipe": 2, "expert": 3},
            "pipe 2 x expert 3 = 6 must divide the 8 devices, so that data can take the rest; "
            "use expert = 1 or 2 or 4",
        ),
        (
            {"pipe": 2, "expert": 8, "data": -1},
            "pipe 2 x expert 8 = 16 must divide the 8 devices, so that data can take the rest; "
            "use pipe = 1, or expert = 1 or 2 or 4",
        ),
        (
            {"pipe": 2, "expert": 2, "data": 1},
            "pipe 2 x expert 2 x data 1 = 4 must equal the 8 devices; use pipe = 4, or expert = 4, or data = 2",
        ),
        (
            {"pipe": 2, "expert": 8, "data": 1},
            "pipe 2 x expert 8 x data 1 = 16 must equal the 8 devices; use pipe = 1, or expert = 4",
        ),
        (
            {"pipe": 3, "expert": 5, "data": 1},
            "pipe 3 x expert 5 x data 1 = 15 must equal the 8 devices; use sizes that are divisors of 8: 1, 2, 4, 8",
        ),
        ({"pipe": -1, "data": -1}, "only one axis can take the devices left over, got -1 for pipe and data"),
        ({"pipe": 0}, "pipe must be a positive number of devices, or -1 to take those left over, got 0"),
        (
            {"expert": -2},
            "expert must be a positive number of devices, or -1 to take those left over, got -2",
        ),
        ({"data": 2.0}, "data must be a positive number of devices, or -1 to take those left over, got 2.0"),
    ],
)
def test_impossible_sizes_say_what_would_work(given, sentence):
    with pytest.raises(ValueError) as error:
        resolve_axes(8, **given)
    assert str(error.value) == sentence


def test_every_remedy_works_and_every_result_multiplies():
    """Whatever is given for 12 devices, either the mesh is whole or each remedy named makes it so."""
    choices = [None, -1, 1, 2, 3, 4, 5, 24]
    for given in itertools.product(choices, repeat=3):
        sizes = dict(zip(("pipe", "expert", "data"), given, strict=True))
        try:
            resolved = resolve_axes(12, **sizes)
        except ValueError as error:
            if given.count(-1) > 1:
                continue
            _, remedies = str(error).split("; use ")
            for remedy in remedies.split(", or ") if " = " in remedies else []:
                name, values = remedy.split(" = ")
                for value in values.split(" or "):
                    assert resolve_axes(12, **{**sizes, name: int(value)}).num_devices == 12
        else:
            assert prod(resolved) == 12
            assert all(given in (None, -1, getattr(resolved, name)) for name, given in sizes.items())


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
