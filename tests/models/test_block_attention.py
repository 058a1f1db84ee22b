"""Tests of models/block_attention.py: the same function as attention at once, and no S^2 array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import attend, causal_mask
from models.block_attention import attend_in_blocks

B, S, N, K, H = 2, 48, 4, 2, 8


def operands(dtype=jnp.float32, seq_len=S):
    rng = np.random.default_rng(0)
    heads = tuple(jnp.asarray(rng.normal(size=(B, seq_len, n, H)), dtype) for n in (N, K, K))
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (B, seq_len)), axis=1), jnp.int32)
    return heads, segments, jnp.asarray(rng.normal(size=(B, seq_len, N, H)), dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("block", [8, 16, 48])
def test_output_and_gradients_are_those_of_attention_at_once(dtype, tolerance, block):
    heads, segments, y_grad = operands(dtype)
    expected, expected_pull = jax.vjp(lambda *qkv: attend(*qkv, causal_mask(segments)), *heads)
    y, pull = jax.vjp(lambda *qkv: attend_in_blocks(*qkv, segments, block), *heads)
    assert y.dtype == heads[0].dtype
    for got, want in zip((y, *pull(y_grad)), (expected, *expected_pull(y_grad)), strict=True):
        assert got.dtype == want.dtype
        got, want = (np.asarray(array, np.float32) for array in (got, want))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def test_float64_keeps_its_precision():
    with jax.enable_x64(True):
        heads, segments, y_grad = operands(jnp.float64)
        expected, expected_pull = jax.vjp(lambda *qkv: attend(*qkv, causal_mask(segments)), *heads)
        y, pull = jax.vjp(lambda *qkv: attend_in_blocks(*qkv, segments, 12), *heads)
        for got, want in zip((y, *pull(y_grad)), (expected, *expected_pull(y_grad)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_no_array_has_a_row_of_keys_for_every_query():
    seq_len, block = 256, 32
    heads, segments, _ = operands(seq_len=seq_len)

    def step(query, key, value):
        return jax.grad(lambda *qkv: attend_in_blocks(*qkv, segments, block).sum(), argnums=(0, 1, 2))(
            query, key, value
        )

    def temp_bytes(function):
        return jax.jit(function).lower(*heads).compile().memory_analysis().temp_size_in_bytes

    def whole(*qkv):
        return jax.grad(lambda *a: attend(*a, causal_mask(segments)).sum(), argnums=(0, 1, 2))(*qkv)

    weights = 4 * B * N * seq_len**2
    assert temp_bytes(whole) > 2 * weights
    assert temp_bytes(step) < weights
