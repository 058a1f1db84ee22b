"""Tests of the logical state: there and back, copies, and checksums that know every bit and its place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from piperjax.training.logical import abstract_logical, contents, from_logical, to_logical
from piperjax.training.state import init_state


@pytest.mark.parametrize(("pipe", "num_devices"), [(1, 1), (2, 2), (4, 4)])
def test_there_and_back(bigram, pipe, num_devices):
    executor = bigram.executor(bigram.model(), pipe=pipe, num_devices=num_devices)
    state = init_state(executor, 3)
    arrays, described = to_logical(executor, state)
    back = from_logical(executor, arrays, step=0)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    abstract = abstract_logical(executor)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), arrays) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )
    assert described == contents(arrays)


def test_checksums_do_not_depend_on_the_layout(bigram):
    model = bigram.model()
    here, elsewhere = bigram.executor(model), bigram.executor(model, pipe=4, num_devices=8)
    arrays, first = to_logical(here, init_state(here, 0))
    _, second = to_logical(elsewhere, from_logical(elsewhere, jax.device_get(arrays), step=0))
    assert first == second and first["params/head"]["shape"] == [33, 8]


def test_the_arrays_outlive_the_state(executor):
    state = init_state(executor, 0)
    arrays, described = to_logical(executor, state)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    assert contents(arrays) == described


def checksum(array):
    return contents({"a": jnp.asarray(array)})["a"]["checksum"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_checksums_see_a_bit_and_an_exchange(dtype):
    array = jnp.arange(1, 25).reshape(2, 3, 4).astype(dtype)
    assert checksum(array) == checksum(array.copy())
    assert checksum(array) != checksum(array.at[1, 2, 3].add(1))
    assert checksum(array) != checksum(array[::-1])
    assert checksum(array) != checksum(array.at[0, 0].set(array[0, 1]).at[0, 1].set(array[0, 0]))


def test_checksums_are_those_of_numpy():
    array = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    words = array.view(np.uint32).ravel().astype(np.uint64)
    assert checksum(array) == int((words * (2 * np.arange(35, dtype=np.uint64) + 1)).sum() % 2**32)
    mesh = jax.make_mesh((7,), ("x",), devices=jax.devices()[:7])
    assert checksum(jax.device_put(array, NamedSharding(mesh, P(None, "x")))) == checksum(array)


def test_a_model_without_experts_has_no_bias_to_store(bigram, monkeypatch):
    executor = bigram.executor(bigram.model())
    monkeypatch.setattr("piperjax.training.logical.router_bias_shape", lambda model: (0, 0))
    assert "router_bias" not in abstract_logical(executor)
