"""Fanning out repeats rows on every device, fanning in adds them up, and each is the gradient of the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshes.axes import BATCH
from meshes.mesh import build_mesh
from piperjax.runtime.fan import fan_in, fan_out
from piperjax.runtime.journey import Journey
from piperjax.runtime.message import Rows

M, D = 3, 2
NODES, LOCAL = ("expert_group", "expert_node"), ("expert_local",)


def per_device(function):
    mesh = build_mesh(pipe=1, data=1, expert_factors=(2, 2, 2), devices=jax.devices()[:8])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=jax.P(BATCH), out_specs=jax.P(BATCH)))


@pytest.mark.parametrize("journey", [Journey(NODES), Journey(LOCAL), Journey(NODES, leaders=LOCAL)])
def test_out_and_in_are_transposes(journey):
    n, k = 4 if journey.axes == NODES else 2, 3
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8 * M, D)).astype(np.float32), rng.normal(size=(8 * n * M, D)).astype(np.float32)
    gates, dgates = (rng.normal(size=(8 * m * M, k)).astype(np.float32) for m in (1, n))
    ids = rng.integers(0, 9, (8 * M, k)).astype(np.int16)

    def run(x, ids, gates, y, dgates):
        def out(x, gates):
            rows = fan_out(Rows(x, ids, gates), journey)
            return (rows.x, rows.gates), rows.expert_ids

        wide, out_gradient, wide_ids = jax.vjp(out, x, gates, has_aux=True)
        narrow, in_gradient = jax.vjp(lambda y: fan_in(y, journey), y)
        return *wide, wide_ids, narrow, *out_gradient((y, dgates)), *in_gradient(x)

    found = per_device(run)(x, ids, gates, y, dgates)
    wide, wide_gates, wide_ids, narrow, out_gradient, gates_gradient, in_gradient = map(np.asarray, found)
    # Devices along the journey come first in `members`: of all nodes with one local index, or of one node.
    members = np.arange(8).reshape(4, 2).T if journey.axes == NODES else np.arange(8).reshape(4, 2)
    sums = y.reshape(8, n, M, D)
    for group in members:
        for place, device in enumerate(group):
            for out, rows in ((wide, x), (wide_gates, gates), (wide_ids, ids)):
                width = rows.shape[1]
                np.testing.assert_array_equal(
                    out.reshape(8, n, M, width)[device], rows.reshape(8, M, width)[group]
                )
            np.testing.assert_allclose(narrow.reshape(8, M, D)[device], sums[group, place].sum(0), rtol=1e-6)
            np.testing.assert_allclose(
                gates_gradient.reshape(8, M, k)[device],
                dgates.reshape(8, n, M, k)[group, place].sum(0),
                rtol=1e-5,
                atol=1e-6,
            )
    np.testing.assert_array_equal(in_gradient, wide)
    np.testing.assert_array_equal(out_gradient, narrow)


def test_sums_are_formed_in_float32():
    y = np.random.default_rng(1).normal(size=(8 * 4 * M, D)).astype(jnp.bfloat16)
    found = per_device(lambda y: fan_in(y, Journey(NODES)))(y).reshape(8, M, D)
    terms = np.asarray(y, np.float32).reshape(4, 2, 4, M, D)  # [sender, local, receiver, ...]
    expected = sum(terms[sender] for sender in range(4)).swapaxes(0, 1).reshape(8, M, D)
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


def test_without_axes_nothing_happens():
    x = np.ones((M, D), np.float32)
    rows = Rows(x, np.ones((M, 1), np.int16), np.ones((M, 1), np.float32))
    jax.tree.map(np.testing.assert_array_equal, fan_out(rows, Journey(())), rows)
    np.testing.assert_array_equal(fan_in(x, Journey(())), x)
