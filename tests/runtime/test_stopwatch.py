"""Times of operations in a loop: they grow with the work, the loop runs what it should, and all agree on its length."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piperjax.runtime import stopwatch as watch
from piperjax.runtime.stopwatch import Stopwatch, line_of, looped, looped_over_stack, operand


@pytest.fixture
def clock(monkeypatch):
    """Programs that take the seconds they are told, on a clock that only they move."""
    now = [0.0]
    monkeypatch.setattr(watch.time, "perf_counter", lambda: now[0])

    def program(call_seconds, round_seconds):
        def run(rounds):
            now[0] += call_seconds + int(rounds) * round_seconds
            run.longest = max(run.longest, int(rounds))
            return jnp.zeros(())

        run.longest = 0
        return run

    return program


@pytest.mark.parametrize("round_seconds", [1e-7, 1e-5, 1e-3, 1.0])
def test_the_cost_of_the_call_is_taken_off(clock, round_seconds):
    program = clock(5e-4, round_seconds)
    assert Stopwatch().seconds(program) == pytest.approx(round_seconds, rel=1e-6)
    # About the wanted time, and never without end.
    assert program.longest * round_seconds < max(0.1, 4 * round_seconds)


def test_operations_of_a_round_share_its_time(clock):
    assert Stopwatch().seconds(clock(1e-3, 4e-3), operations=4) == pytest.approx(1e-3)


def test_a_call(clock):
    assert Stopwatch().call_seconds(clock(2e-3, 1e-6)) == pytest.approx(2.001e-3)


def test_all_processes_run_loops_of_one_length(clock):
    said = []

    def agree(number):
        said.append(number)
        return number

    Stopwatch(agree=agree).seconds(clock(1e-3, 1e-4))
    # Whether it is long enough, at each length, and the length at last.
    assert said[:-1] == [0] * (len(said) - 2) + [1]
    assert said[-1] == pytest.approx(0.02 / 1e-4, rel=0.01)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_loop_runs_its_rounds_on_every_device(num_devices):
    mesh = line_of(jax.devices()[:num_devices])
    calls = []

    def body(x):
        jax.debug.callback(lambda: calls.append(1))
        return x * 2

    x = operand(mesh, (3, 5))
    assert x.shape == (num_devices, 3, 5)
    result = looped(body, mesh)(np.int32(7), x)
    jax.effects_barrier()
    np.testing.assert_array_equal(result, x[:, 0, 0])  # operands stay what they are
    assert len(calls) == 7 * num_devices


def recorded():
    """A body, and the first elements of the operands with which it ran."""
    seen = []

    def body(x, y):
        jax.debug.callback(lambda x, y: seen.append((float(x[0]), float(y[0]))), x, y)
        return x + y

    return body, seen


def test_a_round_goes_through_all_sets_of_operands():
    mesh = line_of(jax.devices()[:2])
    body, seen = recorded()
    arrays = [jnp.full((2, 4), value) for value in (0.0, 10.0, 1.0, 11.0, 2.0, 12.0)]
    jax.block_until_ready(looped(body, mesh, sets=3)(np.int32(2), *arrays))
    jax.effects_barrier()
    assert sorted(seen) == sorted(2 * 2 * [(turn, 10.0 + turn) for turn in (0.0, 1.0, 2.0)])


def test_rounds_take_turns_between_sets_of_operands_in_a_stack():
    mesh = line_of(jax.devices()[:2])
    body, seen = recorded()
    x, y = (jnp.tile(jnp.arange(3.0).reshape(1, 3, 1) + start, (2, 1, 4)) for start in (0, 10))
    jax.block_until_ready(looped_over_stack(body, mesh, sets=3)(np.int32(5), x, y))
    jax.effects_barrier()
    assert sorted(seen) == sorted(2 * [(turn, 10.0 + turn) for turn in (0.0, 1.0, 2.0, 0.0, 1.0)])


@pytest.mark.parametrize("sets", [1, 2, None])
def test_nothing_is_left_out_because_nobody_reads_it(sets):
    """The whole result is computed in every round, not only the element for which the next one waits."""
    mesh = line_of(jax.devices()[:1])

    def body(x):
        return jnp.exp(x), x + 1

    if sets is None:
        program, operands = looped_over_stack(body, mesh, sets=2), [operand(mesh, (2, 3, 5))]
    else:
        program, operands = looped(body, mesh, sets=sets), sets * [operand(mesh, (3, 5))]
    text = program.lower(np.int32(2), *operands).compile().as_text()
    assert re.findall(r"= f32\[(?:1,)?([\d,]*)\]\S* exponential\(", text) == (sets or 1) * ["3,5"]


def test_operands_are_small_and_of_both_signs():
    x = operand(line_of(jax.devices()[:2]), (64,), "bfloat16")
    assert x.dtype == jnp.bfloat16
    assert -0.25 < float(x.min()) < 0 < float(x.max()) < 0.25
