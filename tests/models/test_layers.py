"""Tests of models/layers.py against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import DenseFFN
from models.layers import FeedForward, activate, at_least_float32, rms_norm, rotary, rotation

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_at_least_float32(dtype, wide):
    assert at_least_float32(dtype) == wide


def test_rms_norm_by_hand():
    x = jnp.array([[3.0, -4.0]])
    np.testing.assert_allclose(
        rms_norm(x, jnp.array([1.0, 2.0]), 0.0), [[3 / 12.5**0.5, -8 / 12.5**0.5]], 1e-6
    )


def test_rms_norm_of_bfloat16_is_the_rounded_float32_norm():
    x, scale = RNG.normal(size=(7, 64)), jnp.asarray(RNG.normal(size=64), jnp.float32)
    low = jnp.asarray(x, jnp.bfloat16)
    y = rms_norm(low, scale, 1e-5)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, rms_norm(low.astype(jnp.float32), scale, 1e-5).astype(jnp.bfloat16))


def test_rotary_is_a_complex_rotation():
    x = RNG.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = RNG.integers(0, 1000, (2, 5)).astype(np.int32)
    angles = positions[:, :, None, None] * 100.0 ** (-np.arange(4) / 4)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    y = rotary(jnp.asarray(x), rotation(jnp.asarray(positions), 8, 100.0))
    np.testing.assert_allclose(y, np.concatenate([expected.real, expected.imag], axis=-1), atol=2e-4)


def test_rotary_scores_depend_on_distance_only():
    q, k = (jnp.asarray(RNG.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(query_position, key_position):
        at = [jnp.full((1, 1), position, jnp.int32) for position in (query_position, key_position)]
        turned = (rotary(x, rotation(where, 16, 1e4)) for x, where in zip((q, k), at, strict=True))
        return jnp.sum(next(turned) * next(turned))

    np.testing.assert_allclose(score(5, 2), score(105, 102), rtol=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_activations_by_hand():
    gate, up = np.array([-1.0, 2.0]), np.array([3.0, 5.0])
    y = activate(jnp.asarray(np.concatenate([gate, up]), jnp.float32), 3)
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=1e-6)
    tanh = np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    np.testing.assert_allclose(
        activate(jnp.asarray(gate, jnp.float32), 2), 0.5 * gate * (1 + tanh), rtol=1e-5
    )


@pytest.mark.parametrize(("num_matrices", "first"), [(3, ("gate_up", (6, 20))), (2, ("up", (6, 10)))])
def test_feed_forward_weights(num_matrices, first):
    ffn = FeedForward(6, DenseFFN(d_ff=10, num_matrices=num_matrices))
    name, shape = first
    weight, down = RNG.normal(size=shape), RNG.normal(size=(10, 6))
    getattr(ffn, name)[...] = jnp.asarray(weight, jnp.float32)
    ffn.down[...] = jnp.asarray(down, jnp.float32)
    x = jnp.asarray(RNG.normal(size=(2, 3, 6)), jnp.float32)
    np.testing.assert_allclose(ffn(x), activate(x @ weight, num_matrices) @ down, rtol=1e-4, atol=1e-5)


def test_nothing_becomes_float32_in_bfloat16():
    ffn = FeedForward(6, DenseFFN(d_ff=10))
    ffn.gate_up, ffn.down = (nnx.Param(jnp.ones(shape, jnp.bfloat16)) for shape in ((6, 20), (10, 6)))
    x = jnp.ones((2, 3, 6), jnp.bfloat16)
    assert ffn(x).dtype == jnp.bfloat16
    turn = rotation(jnp.zeros((2, 3), jnp.int32), 6, 1e4, x.dtype)
    assert turn.cos.dtype == jnp.float32
    assert rotary(x.reshape(2, 3, 1, 6), turn).dtype == jnp.bfloat16
    assert jax.eval_shape(lambda x: rms_norm(x, jnp.ones(6), 1e-5), x).dtype == jnp.bfloat16
