"""Every all-to-all returns the bits that the transposition of a matrix of blocks says, forward and backward."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshes.axes import BATCH, EXPERT
from meshes.mesh import build_mesh
from piperjax.planner.collectives import handed_fraction
from piperjax.runtime.all_to_all import ALL_TO_ALLS, _Leaders

FACTORS = [(2, 2, 2), (1, 2, 4), (1, 4, 2), (4, 2, 1), (1, 1, 8), (1, 3, 2), (1, 2, 3)]
FACTORS_OF_16 = [(2, 2, 4), (2, 4, 2), (1, 2, 8), (1, 8, 2), (4, 4, 1), (1, 3, 5)]


def moved(algorithm, factors, rows):
    """For rows of every device [P, P C, ...]: the function that moves them; of floats also the gradient of y^2 / 2."""
    P = np.prod(factors)
    mesh = build_mesh(pipe=1, data=1, expert_factors=factors, devices=jax.devices()[:P])

    def per_device(x):
        return ALL_TO_ALLS[algorithm].move(x[0], EXPERT)[None]

    function = jax.shard_map(per_device, mesh=mesh, in_specs=jax.P(BATCH), out_specs=jax.P(BATCH))

    def loss(x):
        y = function(x)
        return 0.5 * (y * y).sum().astype(jnp.float32), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True) if rows.dtype == np.float32 else function)


def check(algorithm, factors, shape=(3, 5)):
    P, C = int(np.prod(factors)), shape[0]
    rows = np.random.default_rng(0).normal(size=(P, P * C, *shape[1:])).astype(np.float32)
    function = moved(algorithm, factors, rows)
    (_, y), dx = function(rows)
    expected = rows.reshape(P, P, *shape).swapaxes(0, 1).reshape(rows.shape)
    np.testing.assert_array_equal(y, expected)
    # The gradient is what was received, sent back.
    np.testing.assert_array_equal(dx, rows)


@pytest.mark.parametrize(
    "factors",
    [
        pytest.param(factors, marks=[] if number < 3 else [pytest.mark.slow], id=str(factors))
        for number, factors in enumerate(FACTORS)
    ],
)
@pytest.mark.parametrize("algorithm", ALL_TO_ALLS)
def test_blocks_are_transposed_and_gradients_go_back(algorithm, factors):
    check(algorithm, factors)


@pytest.mark.slow
def test_sixteen_devices():
    program = (
        "import sys; sys.path[:0] = ['.', 'tests/runtime']\n"
        "from test_all_to_all import ALL_TO_ALLS, FACTORS_OF_16, check\n"
        "[check(name, factors) for name in ALL_TO_ALLS for factors in FACTORS_OF_16]\n"
    )
    flags = "--xla_force_host_platform_device_count=16"
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("algorithm", ALL_TO_ALLS)
def test_counts_and_narrow_rows(algorithm):
    counts = np.arange(8 * 8 * 2, dtype=np.int32).reshape(8, 8 * 2)
    function = moved(algorithm, (1, 2, 4), counts)
    expected = counts.reshape(8, 8, 2).swapaxes(0, 1).reshape(8, 16)
    np.testing.assert_array_equal(function(counts), expected)


@pytest.mark.parametrize(
    ("algorithm", "collectives"),
    [
        ("flat", {"all-to-all": 1}),
        ("halo2", {"all-to-all": 2}),
        ("halo3", {"all-to-all": 2, "collective-permute": 1}),
    ],
)
def test_phases_and_no_scatter(algorithm, collectives):
    rows = np.ones((8, 24, 5), np.float32)
    function = moved(algorithm, (1, 2, 4), rows)
    text = function.lower(rows).compile().as_text()
    found = {
        name: len(re.findall(rf"\b{name}(?:-start)?\(", text))
        for name in ("all-to-all", "collective-permute")
    }
    assert {name: count for name, count in found.items() if count} == {
        name: 2 * count
        for name, count in collectives.items()  # and backward
    }
    assert not re.search(r"\bscatter\(", text)


@pytest.mark.parametrize(
    ("nodes", "local"), [(2, 2), (4, 8), (8, 4), (16, 4), (3, 2), (5, 2), (2, 5), (1, 4), (4, 1)]
)
def test_leaders_share_the_work(nodes, local):
    leaders = _Leaders(nodes, local)
    pairs = [pair for number in leaders.rounds for pair in number]
    # Every pair of nodes is served by as many leaders as there are shares, on the same local index on both sides.
    assert sorted((a // local, b // local) for a, b in pairs) == sorted(
        (n, m) for n in range(nodes) for m in range(nodes) for _ in range(leaders.shares)
    )
    assert all(a % local == b % local for a, b in pairs)
    for number in leaders.rounds:
        assert len({a for a, _ in number}) == len({b for _, b in number}) == len(number)
    parts = sum(part.size for part in leaders.sources) / nodes
    assert parts == pytest.approx(handed_fraction(nodes, local) * nodes * leaders.shares)
    # Nobody sends or receives more often than the number of rounds; with sizes that divide, all equally often.
    assert len(leaders.rounds) == -(-nodes // local)
    if nodes % local == 0 or local % nodes == 0:
        assert len({len(number) for number in leaders.rounds}) == 1
        assert len(leaders.rounds[0]) == nodes * local
