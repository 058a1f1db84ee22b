"""Rows that travel in later passes: the dense sum and its gradients, whatever the routing, and nothing dropped."""

import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.dispatch_cases import (
    Case,
    D,
    assert_close,
    check,
    check_dead_rows,
    masked_multiply,
    route,
    truth,
)
from meshes.axes import BATCH, EXPERT
from models.moe import weigh
from piperjax.planner.dispatchers import named
from piperjax.runtime.dispatch import DISPATCHERS, make_experts
from piperjax.runtime.dispatcher import Sharing
from piperjax.runtime.grouped_matmul import grouped_matmul
from piperjax.runtime.lint import collectives

CASE = Case(P=8, E=16, k=3, factors=(1, 4, 2))
ALONE = Case(P=1, E=8, k=2)
GRID = list(itertools.product(DISPATCHERS, (1, 2), (0.3, 1.0, 1.5), (False, True)))
# Every dispatcher; one chunk and two, each with and without a split backward, and with a tight limit and a wider one.
DAILY = {
    ("flat", 1, 0.3, True), ("halo2", 1, 1.0, False), ("halo3", 2, 0.3, False), ("halo2_dedup", 2, 1.0, True),
    ("halo3_dedup", 1, 1.5, True),
}  # fmt: skip


def in_passes(name, capacity_factor, **options):
    return make_experts(name, EXPERT, capacity_factor, overflow="passes", **options)


def admitted(case, name, ids, *, capacity_factor, chunks=1):
    """Which slots find room in pass 1, [tokens, k], as the dispatcher says of every device and chunk."""
    sharing = Sharing(
        axes=EXPERT, sizes=case.factors or (1, 1, case.P), num_experts=case.E, experts_per_token=case.k,
        num_tokens=case.T // chunks, capacity_factor=capacity_factor,
    )  # fmt: skip
    parts = [DISPATCHERS[name].admit(jnp.asarray(part), sharing) for part in np.split(ids, case.P * chunks)]
    return np.ones(ids.shape, bool) if parts[0] is None else np.concatenate(parts)


@pytest.mark.parametrize(
    ("name", "chunks", "capacity_factor", "splits"),
    [pytest.param(*cell, marks=[] if cell in DAILY else [pytest.mark.slow]) for cell in GRID],
)
def test_equals_the_dense_sum_and_drops_nothing(name, chunks, capacity_factor, splits):
    run = CASE.compiled(in_passes(name, capacity_factor, chunks=chunks, splits=splits), masked_multiply)
    first = functools.partial(admitted, CASE, name, capacity_factor=capacity_factor, chunks=chunks)
    check(CASE, run, np.random.default_rng(0), kept_of=first, overflow="passes")


@pytest.mark.parametrize("capacity_factor", [0.3, pytest.param(2.0, marks=pytest.mark.slow)])
def test_one_device_works_through_its_rows(capacity_factor):
    run = ALONE.compiled(in_passes("flat", capacity_factor), grouped_matmul)
    first = functools.partial(admitted, ALONE, "flat", capacity_factor=capacity_factor)
    check(ALONE, run, np.random.default_rng(1), kept_of=first, overflow="passes")


@pytest.mark.slow
def test_equals_the_dense_sum_in_float64():
    with jax.enable_x64(True):
        case = Case(P=4, E=8, k=2, data=2, dtype="float64")
        run = case.compiled(in_passes("halo2_dedup", 0.5), grouped_matmul)
        rng = np.random.default_rng(2)
        arrays = case.arrays(rng)
        ids = route(rng, "zipf", len(arrays["x"]), case.E, case.k)
        (y, _), grads = run(arrays, ids)
        expected, expected_grads = truth(arrays, ids)
        for found, wanted in zip((y, *grads), (expected, *expected_grads), strict=True):
            assert_close(found, wanted, 1e-12)


@pytest.mark.parametrize("name", ["halo2_dedup", pytest.param("halo2", marks=pytest.mark.slow)])
def test_dead_rows_full_of_nan_change_nothing(monkeypatch, name):
    experts = in_passes(name, 0.6, chunks=2)
    check_dead_rows(CASE, experts, masked_multiply, np.random.default_rng(3), monkeypatch)


def test_passes_are_as_many_as_the_fullest_buffer_needs():
    case = Case(P=4, E=8, k=2)
    made = []

    def multiply(rows, w, sizes):
        jax.debug.callback(lambda sizes: made.append(int(sizes.sum())), sizes)
        return masked_multiply(rows, w, sizes)

    run = jax.jit(case.function(in_passes("flat", 1.0), multiply))
    arrays = case.arrays(np.random.default_rng(4))
    # Twelve tokens of a device to experts 0 and 1 of device 0: 24 rows, of which buffers hold six at a time.
    for ids, passes in (
        (np.tile([0, 1], (48, 1)), 4),
        (np.stack([np.arange(48) % 8, (np.arange(48) + 4) % 8], 1), 1),
    ):
        made.clear()
        _, overflow = run(arrays["x"], arrays["gates"], arrays["w"], ids.astype(np.int32))
        jax.effects_barrier()
        assert len(made) == case.P * passes
        assert sum(made) == ids.size
        assert overflow.sum() == (0 if passes == 1 else 4 * (24 - 6))


@functools.cache
def traced(name):
    case = Case(P=4, E=8, k=2, data=2)
    arrays = case.arrays(np.random.default_rng(0))
    ids = np.zeros((len(arrays["x"]), case.k), np.int32)
    function = case.function(in_passes(name, 0.5), masked_multiply)
    return jax.make_jaxpr(jax.grad(lambda *args: function(*args, ids)[0].sum(), argnums=(0, 1, 2)))(
        arrays["x"], arrays["gates"], arrays["w"]
    )


@pytest.mark.parametrize("name", DISPATCHERS)
def test_only_devices_that_exchange_agree_on_passes(name):
    # Replicas make passes of their own, unless messages wait for all devices.
    assert DISPATCHERS[name].waits_for_all == named(name).waits_for_all
    found = collectives(traced(name))
    assert not any(collective.may_deadlock for collective in found)
    divergent = frozenset().union(*(collective.divergent_axes for collective in found))
    assert divergent == (frozenset() if DISPATCHERS[name].waits_for_all else {"data"})


def test_no_scatter():
    assert "scatter" not in str(traced("halo2_dedup"))


def test_room_for_all_costs_nothing():
    case = Case(P=4, E=8, k=2)
    arrays = case.arrays(np.random.default_rng(0))
    ids = np.zeros((len(arrays["x"]), case.k), np.int32)
    roomy, dropless = (
        str(
            jax.make_jaxpr(case.function(experts, masked_multiply))(
                arrays["x"], arrays["gates"], arrays["w"], ids
            )
        )
        for experts in (in_passes("flat", 100.0), make_experts("flat", EXPERT, 0.0))
    )
    assert roomy == dropless


def test_weights_that_replicas_share_are_refused():
    case = Case(P=2, E=8, k=2, data=2)
    experts = in_passes("flat", 0.5)

    def per_device(x, gates, w, ids):
        def expert_ffn(rows, sizes, gates):
            return weigh(masked_multiply(rows, w, sizes), gates)

        return experts(expert_ffn, x, ids, gates, case.E)[0]

    spec = jax.P(BATCH)
    mapped = jax.shard_map(
        per_device, mesh=case.mesh(), in_specs=(spec, spec, jax.P(EXPERT), spec), out_specs=spec
    )
    x = jnp.zeros((48, D))
    with pytest.raises(ValueError, match=r"must vary over the axes of the tokens, got some that do not over"):
        jax.eval_shape(mapped, x, jnp.zeros((48, 2)), jnp.zeros((8, D, D)), jnp.zeros((48, 2), jnp.int32))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(capacity_factor=1.0, overflow="pass"), "overflow must be one of drop, passes, got 'pass'"),
        (dict(capacity_factor=0.0, overflow="passes"), "overflow 'passes' needs a capacity_factor"),
    ],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        make_experts("flat", EXPERT, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("factors", "E", "k"), [((2, 2, 4), 32, 4), ((1, 8, 2), 64, 2), ((1, 1, 16), 32, 2)])
def test_sixteen_devices(factors, E, k):
    program = f"""
import sys; sys.path[:0] = ['.', 'tests/runtime']
from test_dispatch_passes import *
case = Case(P=16, E={E}, k={k}, factors={factors})
for name, chunks, capacity_factor in itertools.product(DISPATCHERS, (1, 3), (0.5, 1.25)):
    run = case.compiled(in_passes(name, capacity_factor, chunks=chunks), masked_multiply)
    first = functools.partial(admitted, case, name, capacity_factor=capacity_factor, chunks=chunks)
    check(case, run, np.random.default_rng(0), kept_of=first, overflow='passes')
"""
    # A later flag of the same name counts: others stay those with which tests compile.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=16"
    env = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
