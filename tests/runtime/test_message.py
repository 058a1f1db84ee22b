"""What is packed comes out of a message as it was, to the bit, and gradients of what travels are its transpose."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshes.axes import BATCH, EXPERT
from meshes.mesh import build_mesh
from piperjax.runtime.journey import Journey
from piperjax.runtime.message import Part, Rows, exchange, pack, unpack, words_of


def rows_of(rng, M, D, k, dtype, ids_dtype):
    """Rows whose bits are anything, among them NaNs that a cast would change, and numbers too small to be normal."""
    size = np.dtype(dtype).itemsize
    x = rng.integers(0, 256, (M, D * size), np.uint8).view(dtype)
    gates = rng.integers(0, 256, (M, k * 4), np.uint8).view(np.float32)
    return Rows(x, rng.integers(0, 99, (M, k)).astype(ids_dtype), gates)


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("ids_dtype", [np.int16, np.int32])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_a_message_keeps_every_bit(dtype, k, ids_dtype):
    rows = rows_of(np.random.default_rng(k), 5, 6, k, dtype, ids_dtype)
    parts = [Part(array.shape[1], array.dtype) for array in rows]
    message = jax.jit(pack)(rows)
    size = np.dtype(dtype).itemsize
    assert message.dtype.itemsize == size
    assert message.shape == (5, sum(words_of(part.width, part.dtype.itemsize, size) for part in parts))
    for found, expected in zip(jax.jit(lambda m: unpack(m, parts))(message), rows, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(bits(found), bits(expected))


def test_a_message_is_no_longer_than_what_is_in_it():
    # 12 elements of bfloat16, 3 ids of 2 bytes, 3 gates of 4 bytes, in words of 2 bytes.
    rows = rows_of(np.random.default_rng(0), 1, 12, 3, jnp.bfloat16, np.int16)
    assert pack(rows).nbytes == 12 * 2 + 3 * 2 + 3 * 4
    # In words of 4 bytes the ids end in the middle of one.
    rows = rows_of(np.random.default_rng(0), 1, 12, 3, np.float32, np.int16)
    assert pack(rows).nbytes == 12 * 4 + 8 + 3 * 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_an_exchange_is_its_own_transpose_in_one_collective(dtype):
    P, C, D, k = 4, 3, 6, 2
    mesh = build_mesh(pipe=1, data=1, expert_factors=(1, 2, 2), devices=jax.devices()[:P])
    rng = np.random.default_rng(1)
    x, dx = (rng.normal(size=(P * P * C, D)).astype(dtype) for _ in range(2))
    gates, dgates = (rng.normal(size=(P * P * C, k)).astype(np.float32) for _ in range(2))
    ids = rng.integers(0, 9, (P * P * C, k)).astype(np.int16)

    def per_device(x, ids, gates, dx, dgates):
        def both(x, gates):
            sent = exchange(Rows(x, ids, gates), Journey(EXPERT))
            return (sent.x, sent.gates), sent.expert_ids

        sent, pull, sent_ids = jax.vjp(both, x, gates, has_aux=True)
        return *sent, sent_ids, *pull((dx, dgates))

    spec = jax.P(BATCH)
    function = jax.jit(jax.shard_map(per_device, mesh=mesh, in_specs=(spec,) * 5, out_specs=(spec,) * 5))
    found = function(x, ids, gates, dx, dgates)

    def exchanged(array):
        return array.reshape(P, P, C, -1).swapaxes(0, 1).reshape(array.shape)

    for one, expected in zip(found, (x, gates, ids, dx, dgates), strict=True):
        np.testing.assert_array_equal(one, exchanged(expected))
    text = function.lower(x, ids, gates, dx, dgates).compile().as_text()
    assert len(re.findall(r"\ball-to-all(?:-start)?\(", text)) == 2  # there, and gradients back
