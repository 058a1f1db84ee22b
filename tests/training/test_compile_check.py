"""A step predicted and compiled: state exactly, everything closely."""

import dataclasses

import pytest

from benchmarks.cases import make_executor, moe_model
from piperjax.training import compile_check
from piperjax.training.config import TrainConfig


@pytest.fixture(scope="module")
def comparison():
    executor = make_executor(
        moe_model(num_layers=4), pipe=2, data=2, expert=2, num_microbatches=4, microbatch_size=2, seq_len=128
    )
    config = TrainConfig(model=executor.config, out="unused", dtype=executor.dtype)
    compiled, seconds = compile_check.compile_step(executor, config)
    assert set(seconds) == {"trace", "compile"}
    return compile_check.compare(executor, compiled, with_work=True)


def test_arguments_are_predicted_exactly(comparison):
    for name, num_bytes in comparison.state_bytes.items():
        assert comparison.predicted.terms[name] == num_bytes
    state = sum(comparison.state_bytes.values())
    assert state <= comparison.memory.arguments <= state + 1024  # Besides: step, router bias, stop.
    assert comparison.memory.total == (
        comparison.memory.arguments
        + comparison.memory.outputs
        - comparison.memory.aliased
        + comparison.memory.temporaries
    )


def test_flop_is_that_of_the_compiled_step(comparison):
    assert comparison.predicted_flop == pytest.approx(comparison.work.flop, rel=0.01)


def test_rows_travel_between_experts_five_times_per_layer_and_microbatch(comparison):
    # [P C, D] with C = T min(k, E / P), of which one half stays; T = 256, k = 2, D = 64, P = 2, two layers per rank.
    # Forward, there again, and backward; and in each, gates of the rows, or their gradients, and how many rows go to
    # every expert.
    rows, beside = 2 * 256 * 2 * 64 * 4 / 2, (2 * 256 * 2 + 8) * 4 / 2
    sent = comparison.work.sent_bytes["expert", "all-to-all"]
    assert sent == pytest.approx(4 * 2 * (5 * rows + 3 * beside), rel=0.001)


def test_memory_is_predicted_closely(comparison):
    assert -0.02 < comparison.memory_error < 0.12


@pytest.mark.parametrize("schedule", ["zb_h1", pytest.param("one_f_one_b", marks=pytest.mark.slow)])
def test_tokens_that_travel_in_chunks_are_predicted_closely(schedule):
    executor = make_executor(
        moe_model(num_layers=2, d_ff=256), pipe=2, expert=2, num_microbatches=4, microbatch_size=2,
        seq_len=128, schedule=schedule, dispatch_chunks=2, capacity_factor=1.25,
    )  # fmt: skip
    config = TrainConfig(model=executor.config, out="unused", dtype=executor.dtype)
    found = compile_check.compare(executor, compile_check.compile_step(executor, config)[0], with_work=True)
    # The loops of one chunk walk over its rows alone.
    assert found.predicted_flop == pytest.approx(found.work.flop, rel=0.01)
    assert -0.02 < found.memory_error < 0.12


@pytest.mark.parametrize("schedule", ["one_f_one_b", pytest.param("zb_h1", marks=pytest.mark.slow)])
def test_later_passes_are_not_counted(schedule):
    executor = make_executor(
        moe_model(num_layers=2, d_ff=256), pipe=2, expert=2, num_microbatches=4, microbatch_size=2,
        seq_len=128, schedule=schedule, capacity_factor=1.25, overflow="passes",
    )  # fmt: skip
    config = TrainConfig(model=executor.config, out="unused", dtype=executor.dtype)
    found = compile_check.compare(executor, compile_check.compile_step(executor, config)[0], with_work=True)
    # With even loads there are none.
    assert found.predicted_flop == pytest.approx(found.work.flop, rel=0.01)


def test_what_is_printed_says_both(comparison):
    assert "predicted" in comparison.line() and "compiled" in comparison.line()
    table = "\n".join(comparison.lines())
    for word in ("parameters", "temporaries", "FLOP of products", "expert: all-to-all"):
        assert word in table
    reserved = dataclasses.replace(
        comparison, predicted=dataclasses.replace(comparison.predicted, reserve=2**30)
    )
    assert reserved.memory_error == pytest.approx(comparison.memory_error)
