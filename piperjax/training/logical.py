"""This file is the state as checkpoints hold it: logical arrays that know no mesh, each with a checksum."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from piperjax.runtime import placement as placements
from piperjax.training.optimizer import Moments
from piperjax.training.state import Executor, TrainState, replicated, router_bias_shape, state_shardings

# The table of physical experts, among the arrays of a state that has one.
PLACEMENT = "placement"

Arrays = dict[str, Any]
Contents = dict[str, dict[str, Any]]


def to_logical(executor: Executor, state: TrainState) -> tuple[Arrays, Contents]:
    """Returns the arrays of a state in logical layout, and what `contents` says of them.

    The arrays are copies, so the next step may donate the state while they are written.
    """
    trees = {
        "params": state.params,
        "first_moment": state.moments.first,
        "second_moment": state.moments.second,
    }
    arrays, sums = {}, {}
    for name, tree in trees.items():
        arrays[name], found = _converter(executor)(tree, state.placement)
        sums |= {f"{name}/{leaf}": value for leaf, value in found.items()}
    tables = {}
    if state.router_bias.size:  # arrays without elements cannot be stored
        tables["router_bias"] = jnp.copy(state.router_bias)
    if state.placement is not None:
        tables[PLACEMENT] = jnp.copy(state.placement)
    arrays |= tables
    sums |= jax.jit(_checksums)(tables)
    return arrays, _described(arrays, sums)


def from_logical(executor: Executor, arrays: Arrays, *, step: int) -> TrainState:
    """Returns the state after `step` steps on the executor's mesh, experts where the arrays say."""
    shardings, placement = state_shardings(executor), arrays.get(PLACEMENT)
    if placement is not None:
        placements.check(placement, executor.config)
        placement = jax.device_put(placement, replicated(executor))
    router_bias = arrays.get("router_bias", np.zeros(router_bias_shape(executor.config), np.float32))
    return TrainState(
        step=jax.device_put(np.int32(step), shardings.step),
        params=executor.from_logical(arrays["params"], placement),
        moments=Moments(
            *(executor.from_logical(arrays[name], placement) for name in ("first_moment", "second_moment"))
        ),
        router_bias=jax.device_put(router_bias, shardings.router_bias),
        placement=placement,
    )


def abstract_logical(executor: Executor, *, placed: bool = False) -> Arrays:
    """Returns shapes, dtypes and shardings of `to_logical`'s arrays, for a state with a placement or without."""
    logical, shape = executor.abstract_logical, router_bias_shape(executor.config)

    def moment(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    moments = jax.tree.map(moment, logical)
    arrays = {"params": logical, "first_moment": moments, "second_moment": moments}
    if all(shape):
        arrays["router_bias"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated(executor))
    if placed:
        arrays[PLACEMENT] = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(executor))
    return arrays


def contents(arrays: Arrays) -> Contents:
    """Returns {"shape": [...], "checksum": ...} of every array by its name, "params/layers/moe/ffn/router"."""
    return _described(arrays, jax.jit(_checksums)(arrays))


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of nested dicts by their joined keys."""
    return {
        "/".join(str(entry.key) for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@lru_cache(maxsize=4)
def _converter(executor: Executor) -> Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]:
    """Returns the compiled conversion of a params-like tree; compiled once, for it runs at every checkpoint."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, executor.abstract_logical)

    def convert(tree: Any, placement: Any) -> tuple[Any, dict[str, jax.Array]]:
        converted = executor.to_logical(tree, placement)
        return converted, _checksums(converted)

    return jax.jit(convert, out_shardings=(shardings, replicated(executor)))


def _checksums(arrays: Arrays) -> dict[str, jax.Array]:
    """Sum modulo 2^32 of bit pattern x odd number of the place: exact, and so the same for every sharding."""

    def total(leaf: jax.Array) -> jax.Array:
        unsigned = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        place, stride = jnp.uint32(0), 1
        for dimension in reversed(range(words.ndim)):
            index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
            place = place + index * np.uint32(stride % 2**32)
            stride *= words.shape[dimension]
        return (words * (2 * place + 1)).sum(dtype=jnp.uint32)

    return {name: total(leaf) for name, leaf in named_leaves(arrays).items()}


def _described(arrays: Arrays, sums: dict[str, jax.Array]) -> Contents:
    sums = jax.device_get(sums)
    return {
        name: {"shape": list(leaf.shape), "checksum": int(sums[name])}
        for name, leaf in named_leaves(arrays).items()
    }
