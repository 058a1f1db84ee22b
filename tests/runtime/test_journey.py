"""A journey transposes blocks among its devices, by whichever messages; so does its gradient, without a scatter."""

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
from piperjax.runtime.journey import Journey, journeys, travel

FACTORS = [(2, 2, 2), (1, 2, 4), (1, 4, 2), (1, 1, 8), (4, 2, 1), (1, 3, 2), (1, 2, 3)]
FACTORS_OF_16 = [(2, 2, 4), (1, 8, 2), (1, 2, 8), (1, 3, 5), (1, 5, 3)]


def per_device(factors, function):
    """The function of rows of every device [P, ...], and how many nodes and devices of one there are."""
    P = int(np.prod(factors))
    mesh = build_mesh(pipe=1, data=1, expert_factors=factors, devices=jax.devices()[:P])
    spec = jax.P(BATCH)
    mapped = jax.shard_map(lambda x: function(x[0])[None], mesh=mesh, in_specs=spec, out_specs=spec)
    return mapped, P // factors[2], factors[2]


def striped():
    """To the devices of the same local index in all nodes, through leaders."""
    return journeys(EXPERT, by_leaders=True)[0]


def exchanged(x):
    return striped().exchanged(x)


def gathered(x):
    return striped().gathered(x)


def check(factors, shape=(3, 5)):
    """What is sent, sent back, and gathered, through leaders."""
    function, N, L = per_device(factors, lambda x: travel(x, striped()))
    rows = np.random.default_rng(0).normal(size=(N, L, N, *shape)).astype(np.float32)
    x = rows.reshape(N * L, N * shape[0], *shape[1:])
    loss = jax.jit(jax.value_and_grad(lambda x: (0.5 * (function(x) ** 2).sum(), function(x)), has_aux=True))
    (_, y), dx = loss(x)
    np.testing.assert_array_equal(y, rows.transpose(2, 1, 0, 3, 4).reshape(x.shape))
    np.testing.assert_array_equal(dx, x)  # What was received, sent back.
    assert not re.search(r"\bscatter\(", loss.lower(x).compile().as_text())
    gather, _, _ = per_device(factors, gathered)
    found = np.asarray(jax.jit(gather)(rows[:, :, 0].reshape(N * L, *shape)))
    for node in range(N):
        for local in range(L):
            expected = rows[:, local, 0].reshape(N * shape[0], *shape[1:])
            np.testing.assert_array_equal(found.reshape(N, L, *expected.shape)[node, local], expected)


@pytest.mark.parametrize(
    "factors",
    [
        pytest.param(factors, marks=[] if number < 5 else [pytest.mark.slow], id=str(factors))
        for number, factors in enumerate(FACTORS)
    ],
)
def test_leaders_bring_rows_to_their_own_index_in_all_nodes(factors):
    check(factors)


@pytest.mark.slow
def test_sixteen_devices():
    program = (
        "import sys; sys.path[:0] = ['.', 'tests/runtime']\n"
        "from test_journey import FACTORS_OF_16, check\n"
        "[check(factors) for factors in FACTORS_OF_16]\n"
    )
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=16"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_leaders_send_fewer_messages_of_words_of_any_kind():
    rows = np.arange(8 * 4 * 3, dtype=np.uint16).reshape(8, 4 * 3)
    factors = (1, 4, 2)
    function, N, L = per_device(factors, exchanged)
    found = np.asarray(jax.jit(function)(rows)).reshape(N, L, N, 3)
    np.testing.assert_array_equal(found, rows.reshape(N, L, N, 3).transpose(2, 1, 0, 3))
    text = jax.jit(function).lower(rows).compile().as_text()
    # Inside, to leaders and from them; between nodes two rounds, as a leader has two of the four pairs.
    assert len(re.findall(r"\ball-to-all(?:-start)?\(", text)) == 2
    assert len(re.findall(r"\bcollective-permute(?:-start)?\(", text)) == 2


def test_alone_nothing_moves():
    x = jnp.ones((3, 2))
    assert Journey(()).exchanged(x) is Journey(()).gathered(x) is x
