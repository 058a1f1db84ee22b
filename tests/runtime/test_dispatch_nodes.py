"""Rows that cross to a node once give the results and gradients of the dense sum, and cross no more often."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.dispatch_cases import (
    Case,
    assert_close,
    check,
    check_dead_rows,
    masked_multiply,
    route,
    truth,
)
from meshes.axes import EXPERT
from piperjax.runtime.dispatch import make_experts
from piperjax.runtime.dispatch_nodes_limited import limits
from piperjax.runtime.dispatcher import Sharing

# Fewer and more experts on a device than a token takes; every axis alone and together.
CASES = [
    Case(P=8, E=16, k=4, factors=(2, 2, 2)),
    Case(P=8, E=8, k=3, factors=(1, 2, 4)),
    Case(P=8, E=32, k=2, factors=(1, 4, 2)),
    Case(P=4, E=8, k=2, factors=(2, 2, 1)),
    Case(P=4, E=8, k=2, factors=(1, 1, 4)),
    Case(P=1, E=8, k=2, factors=(1, 1, 1)),
]


def sharing_of(case, capacity_factor):
    return Sharing(
        axes=EXPERT, sizes=case.factors, num_experts=case.E, experts_per_token=case.k, num_tokens=case.T,
        capacity_factor=capacity_factor,
    )  # fmt: skip


def simulate_drops(case, ids, *, capacity_factor):
    """Which slots find room [tokens, k]: token by token, device by device, every limit counted for itself."""
    sharing = sharing_of(case, capacity_factor)
    limit, local = limits(sharing), case.factors[2]
    kept = np.ones(ids.shape, bool)
    for source in range(case.P * case.data):
        on_node, on_device, copies = [0] * sharing.num_nodes, [0] * case.P, [0] * case.P
        for token in range(source * case.T, (source + 1) * case.T):
            device_of = ids[token] // sharing.experts_per_device
            for node in set(device_of // local):
                on_node[node] += 1
            for device in set(device_of):
                on_device[device] += 1
                copies[device] += int((device_of == device).sum())
                fits = (
                    on_node[device // local] <= limit.node
                    and on_device[device] <= limit.device
                    and copies[device] <= limit.copies
                )
                kept[token, device_of == device] = fits
    return kept


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            # The second is compared below, through leaders.
            case,
            marks=[] if number in (0, 2) else [pytest.mark.slow],
            id=f"{case.factors}-E{case.E}-k{case.k}",
        )
        for number, case in enumerate(CASES)
    ],
)
def test_equals_the_dense_sum(case):
    check(
        case,
        case.compiled(make_experts("halo2_dedup", EXPERT, 0.0), masked_multiply),
        np.random.default_rng(0),
    )


@pytest.mark.parametrize(
    ("case", "options"),
    [
        # Two leaders for each pair of nodes; as many nodes as devices in one; two pairs for each leader.
        (CASES[1], dict(capacity_factor=0.0)),
        (CASES[0], dict(capacity_factor=0.75, chunks=2)),
        (CASES[2], dict(capacity_factor=0.5, chunks=2, overflow="passes")),
        pytest.param(CASES[0], dict(capacity_factor=0.0, chunks=3), marks=pytest.mark.slow),
        pytest.param(CASES[2], dict(capacity_factor=0.0), marks=pytest.mark.slow),
        pytest.param(CASES[1], dict(capacity_factor=1.25), marks=pytest.mark.slow),
        pytest.param(CASES[3], dict(capacity_factor=0.0), marks=pytest.mark.slow),
        pytest.param(CASES[4], dict(capacity_factor=0.75), marks=pytest.mark.slow),
        pytest.param(CASES[5], dict(capacity_factor=0.0), marks=pytest.mark.slow),
    ],
)
def test_leaders_change_no_bit(case, options):
    rng = np.random.default_rng(5)
    arrays = case.arrays(rng)
    ids = route(rng, "zipf", len(arrays["x"]), case.E, case.k)
    direct, led = (
        case.compiled(make_experts(name, EXPERT, **options), masked_multiply)(arrays, ids)
        for name in ("halo2_dedup", "halo3_dedup")
    )
    jax.tree.map(np.testing.assert_array_equal, led, direct)
    if not options["capacity_factor"]:
        (y, _), grads = led
        expected, expected_grads = truth(arrays, ids)
        assert_close(y, expected, 1e-6)
        for found, wanted in zip(grads, expected_grads, strict=True):
            assert_close(found, wanted, 1e-5)


@pytest.mark.parametrize(
    ("case", "capacity_factor"),
    [
        # Every day every case, by turns with a tight limit and a wider one.
        pytest.param(case, capacity_factor, marks=[pytest.mark.slow] if (i + j) % 2 else [])
        for i, case in enumerate(CASES[:3] + CASES[5:])
        for j, capacity_factor in enumerate((0.6, 1.25))
    ],
)
def test_limits_drop_later_tokens_and_count_them(case, capacity_factor):
    run = case.compiled(make_experts("halo2_dedup", EXPERT, capacity_factor), masked_multiply)
    kept_of = functools.partial(simulate_drops, case, capacity_factor=capacity_factor)
    check(case, run, np.random.default_rng(1), kept_of=kept_of)


def test_equals_flat_bit_for_bit_where_nothing_is_added_up():
    # With one expert per token there are no sums.
    case = Case(P=8, E=16, k=1, factors=(1, 2, 4))
    rng = np.random.default_rng(2)
    arrays = case.arrays(rng)
    ids = route(rng, "zipf", len(arrays["x"]), case.E, case.k)
    (flat, flat_grads), (ours, our_grads) = (
        case.compiled(make_experts(name, EXPERT, 0.0), masked_multiply)(arrays, ids)
        for name in ("flat", "halo2_dedup")
    )
    np.testing.assert_array_equal(ours[0], flat[0])
    for found, expected in zip(our_grads[:2], flat_grads[:2], strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "capacity_factor", "chunks"),
    [
        pytest.param("halo2_dedup", 0.0, 1, marks=pytest.mark.slow),
        # Two chunks go every day in test_dispatch_passes.py.
        pytest.param("halo2_dedup", 0.75, 2, marks=pytest.mark.slow),
        ("halo3_dedup", 0.75, 1),
    ],
)
def test_dead_rows_full_of_nan_change_nothing(monkeypatch, name, capacity_factor, chunks):
    case = Case(P=8, E=16, k=3, factors=(1, 4, 2))
    experts = make_experts(name, EXPERT, capacity_factor, chunks=chunks)
    check_dead_rows(case, experts, masked_multiply, np.random.default_rng(3), monkeypatch)


def test_experts_may_live_anywhere():
    case = Case(P=8, E=16, k=2, factors=(1, 2, 4))
    rng = np.random.default_rng(4)
    arrays = case.arrays(rng)
    ids = route(rng, "zipf", len(arrays["x"]), case.E, case.k)
    physical = rng.permutation(case.E)
    moved = arrays | {"w": arrays["w"][np.argsort(physical)]}
    experts = functools.partial(
        make_experts("halo2_dedup", EXPERT, 0.0), placement=jnp.asarray(physical, jnp.int32)
    )
    (y, _), (dx, dgates, dw) = case.compiled(experts, masked_multiply)(moved, ids)
    expected, (truth_dx, truth_dgates, truth_dw) = truth(arrays, ids)
    assert_close(y, expected, 1e-6)
    for found, wanted in ((dx, truth_dx), (dgates, truth_dgates), (np.asarray(dw)[physical], truth_dw)):
        assert_close(found, wanted, 1e-5)


@pytest.mark.slow
def test_sixteen_devices():
    program = """
import sys; sys.path[:0] = ['.', 'tests/runtime']
from test_dispatch_nodes import *
shapes = ((2, 2, 4), 32, 4), ((1, 4, 4), 16, 3), ((1, 8, 2), 64, 2), ((4, 4, 1), 16, 2), ((1, 1, 16), 32, 2)
for factors, E, k in shapes:
    case = Case(P=16, E=E, k=k, factors=factors)
    for name in ('flat', 'halo2', 'halo3'):
        check(case, case.compiled(make_experts(name, EXPERT, 0.0), masked_multiply), np.random.default_rng(0))
    kept_of = functools.partial(simulate_drops, case, capacity_factor=0.8)
    for name in ('halo2_dedup', 'halo3_dedup'):
        for chunks in (1, 3):
            run = case.compiled(make_experts(name, EXPERT, 0.0, chunks=chunks), masked_multiply)
            check(case, run, np.random.default_rng(0))
        run = case.compiled(make_experts(name, EXPERT, 0.8), masked_multiply)
        check(case, run, np.random.default_rng(0), kept_of=kept_of)
"""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=16"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
