"""Tests of models/attention.py: against numpy, and who may look at whom, by gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import attend, causal_mask

RNG = np.random.default_rng(0)
B, S, N, K, H = 2, 6, 4, 2, 8


def heads(dtype=jnp.float32):
    return tuple(jnp.asarray(RNG.normal(size=(B, S, n, H)), dtype) for n in (N, K, K))


def test_mask_drawn_out():
    mask = causal_mask(jnp.array([[0, 0, 1, 1]]))
    assert ["".join(".X"[allowed] for allowed in row) for row in mask[0].astype(int).tolist()] == [
        "X...",
        "XX..",
        "..X.",
        "..XX",
    ]


def test_attend_against_numpy():
    query, key, value = heads()
    mask = causal_mask(jnp.array([[0, 0, 0, 1, 1, 1], [3, 3, 3, 3, 3, 3]]))
    expected = np.zeros((B, S, N, H))
    for b, s, n in np.ndindex(B, S, N):
        seen = np.flatnonzero(mask[b, s])
        logits = np.asarray(key[b, seen, n // (N // K)]) @ np.asarray(query[b, s, n]) / H**0.5
        weights = np.exp(logits - logits.max())
        expected[b, s, n] = weights / weights.sum() @ np.asarray(value[b, seen, n // (N // K)])
    np.testing.assert_allclose(attend(query, key, value, mask), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attend_against_jax(dtype):
    query, key, value = heads(dtype)
    mask = causal_mask(jnp.zeros((B, S), jnp.int32))

    def ours(query, key, value):
        return attend(query, key, value, mask)

    def theirs(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])

    tolerance = 1e-5 if dtype == "float32" else 2e-2
    y, pull = jax.vjp(jax.jit(ours), query, key, value)
    expected, expected_pull = jax.vjp(jax.jit(theirs), query, key, value)
    assert y.dtype == dtype
    for got, want in zip((y, *pull(y)), (expected, *expected_pull(expected)), strict=True):
        got, want = (np.asarray(array, np.float32) for array in (got, want))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_gradient_of_what_may_not_be_seen_is_strictly_zero():
    query, key, value = heads()
    segments = jnp.array([[0, 0, 0, 1, 1, 1]] * B)
    position = 4  # sees positions 3 and 4: later ones are in the future, earlier ones in another document

    def read(key, value):
        return jnp.sum(attend(query, key, value, causal_mask(segments))[:, position] ** 2)

    for gradient in jax.grad(read, argnums=(0, 1))(key, value):
        assert np.all(gradient[:, [0, 1, 2, 5]] == 0)
        assert np.all(np.abs(gradient[:, [3, 4]]).max(axis=(0, 2, 3)) > 0)
