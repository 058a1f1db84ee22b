"""Dispatchers by name: what each can do, and sentences for what none can."""

import pytest

from piperjax.planner.dispatchers import (
    DISPATCHERS,
    Dispatcher,
    Way,
    check_chunks,
    check_pipe,
    named,
    ways,
)


def test_names_say_what_they_do():
    assert all(name == one.name for name, one in DISPATCHERS.items())
    assert all(one.name.startswith(one.algorithm) for one in DISPATCHERS.values())
    assert all(one.deduplicates == one.name.endswith("_dedup") for one in DISPATCHERS.values())
    assert named("halo2_dedup").algorithm == "halo2"


def test_what_can_be_planned_is_what_the_runtime_has():
    runtime = pytest.importorskip("piperjax.runtime.dispatch")
    assert set(DISPATCHERS) == set(runtime.DISPATCHERS)


def test_ways_are_dispatchers_with_chunks():
    assert ways(["flat", "halo2"], [1, 4]) == (("flat", 1), ("flat", 4), ("halo2", 1), ("halo2", 4))
    assert [str(way) for way in (Way("flat"), Way("halo2_dedup", 4))] == ["flat", "halo2_dedup x4"]


def test_chunks_divide_the_tokens():
    check_chunks("halo2", 4, 4096)
    check_chunks("flat", 1, 7)
    for dispatcher, chunks, tokens, words in (
        ("halo", 1, 8, "no dispatcher named 'halo'; there are flat, .* did you mean 'halo[23]'"),
        ("halo2", 0, 8, "dispatch_chunks must be at least 1, got 0"),
        ("halo2", 4, 6, "must divide the 6 tokens of a microbatch on a device, got 4; use 3"),
    ):
        with pytest.raises(ValueError, match=words):
            check_chunks(dispatcher, chunks, tokens)


def test_a_flat_exchange_cannot_de_duplicate():
    with pytest.raises(ValueError, match="use halo2 or halo3 to de-duplicate"):
        Dispatcher(name="mine", algorithm="flat", deduplicates=True)


def test_permutes_have_no_place_in_a_pipeline():
    check_pipe("halo2_dedup", 4)
    check_pipe("halo3", 1)
    with pytest.raises(ValueError, match="pipe must be 1, got 2; use 'halo2_dedup'"):
        check_pipe("halo3_dedup", 2)
