"""Tests of models/initial.py: the same bits everywhere, and statistics of independent normal numbers."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.initial import normal

BASE = {"name": "layers/attention/query", "shape": (500, 400), "seed": 7, "layer": 3, "expert": 0, "std": 1.0}


def draw(**changes) -> np.ndarray:
    return np.asarray(normal(**BASE | changes))


def mix(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def plain(index: int, name: str, seed: int, layer: int, expert: int) -> float:
    """One value of standard deviation 1 in Python integers."""
    keys = []
    for key in (0x9E3779B9, 0x85EBCA6B):
        for number in (zlib.crc32(name.encode()), seed, layer, expert):
            key = mix((key * 0x01000193 + number) % 2**32)
        keys.append(key)
    first = mix((mix(index ^ keys[0]) + keys[1]) % 2**32)
    second = mix((first + keys[0]) % 2**32)
    total = sum(part for word in (first, second) for part in (word >> 16, word & 0xFFFF))
    return (total - 2 * 0xFFFF) * (3 / (2**32 - 1)) ** 0.5


def test_against_python_integers():
    values = draw(shape=(3, 2, 5))
    expected = [plain(index, BASE["name"], 7, 3, 0) for index in range(30)]
    np.testing.assert_allclose(values.ravel(), expected, rtol=1e-6)


def test_a_seed_means_the_same_model_for_ever():
    """Pinned: a change here makes every published seed another model."""
    assert zlib.crc32(draw(std=0.02).astype("<f4").tobytes()) == 0xD98F2463


def test_the_same_bits_jitted_mapped_and_alone():
    rows = jax.jit(jax.vmap(lambda layer: normal(**BASE | {"layer": layer, "shape": (6, 4)})))
    np.testing.assert_array_equal(rows(jnp.arange(5))[3], draw(shape=(6, 4)))


def test_seeds_larger_than_a_word_and_traced_seeds():
    traced = jax.jit(lambda seed: normal(**BASE | {"seed": seed, "shape": (6,)}))(7)
    np.testing.assert_array_equal(traced, draw(shape=(6,)))
    np.testing.assert_array_equal(draw(seed=2**32 + 7, shape=(6,)), draw(shape=(6,)))
    assert not np.array_equal(draw(seed=-1, shape=(6,)), draw(shape=(6,)))


def test_moments_and_quantiles_of_a_normal():
    values = draw(std=2.0).ravel() / 2.0
    n = len(values)
    assert abs(values.mean()) < 4 / n**0.5
    assert abs(values.std() - 1) < 4 / n**0.5
    assert abs((values**3).mean()) < 0.03
    assert abs((values**4).mean() - 2.7) < 0.05
    assert np.abs(values).max() < 3.47
    # Irwin-Hall with four terms: at most 0.03 from the quantiles of a normal up to two standard deviations.
    np.testing.assert_allclose(
        np.quantile(values, [0.0228, 0.1587, 0.5, 0.8413, 0.9772]), [-2, -1, 0, 1, 2], atol=0.03
    )


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"layer": 4}, {"expert": 1}, {"name": "layers/attention/key"}], ids=str
)
def test_streams_are_uncorrelated(change):
    one, other = draw().ravel(), draw(**change).ravel()
    assert abs(np.mean(one * other)) < 4 / len(one) ** 0.5
    assert np.mean(one == other) < 1e-3


def test_neighbours_are_uncorrelated():
    values = draw()
    for lag in (1, 2, 4, 64, 128, 256):
        assert abs(np.mean(values[:, lag:] * values[:, :-lag])) < 4 / values[:, lag:].size ** 0.5
        assert abs(np.mean(values[lag:] * values[:-lag])) < 4 / values[lag:].size ** 0.5


def test_random_matrices_have_the_spectrum_of_random_matrices():
    """Largest and smallest singular value near sqrt(m) +- sqrt(n) (Marchenko and Pastur)."""
    singular = np.linalg.svd(draw(), compute_uv=False)
    np.testing.assert_allclose(
        [singular[0], singular[-1]], [500**0.5 + 400**0.5, 500**0.5 - 400**0.5], rtol=0.06
    )


def test_a_hundred_thousand_experts_start_different():
    first_two = jax.vmap(lambda expert: normal(**BASE | {"expert": expert, "shape": (2,)}))(
        jnp.arange(100_000)
    )
    assert len(np.unique(np.asarray(first_two), axis=0)) == 100_000
