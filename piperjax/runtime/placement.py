"""Where experts are: the router chooses logical ones, and a table says which physical one each of them is.

A placement [num_moe_layers, E] holds the physical expert of every logical one, another permutation in every layer.
Physical experts are those of the device layout: device p of P holds experts p E/P to (p + 1) E/P - 1. Loads, losses,
biases and everything that is saved are of logical experts; only rows on their way, and weights at rest on devices,
with their gradients and moments, are of physical ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from meshes.axes import EXPERT, PIPE
from models.config import ModelConfig
from piperjax.runtime.layout import LayerLayout, LeafSharding
from piperjax.runtime.permute import take


def check(placement: np.ndarray, config: ModelConfig) -> None:
    """Checks a placement of the experts of a model.

    Raises:
      ValueError: if it is not one permutation of the experts for every layer that has any.
    """
    shape = (len(config.moe_layers), config.num_experts)
    found = np.asarray(placement)
    if found.shape != shape or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            f"a placement of {config.name} must be whole numbers [{shape[0]} layers with experts, {shape[1]} experts], "
            f"got {found.dtype} {list(found.shape)}"
        )
    wrong = np.nonzero((np.sort(found, axis=1) != np.arange(shape[1])).any(axis=1))[0]
    if wrong.size:
        raise ValueError(
            f"a placement must hold every physical expert 0 to {shape[1] - 1} once in every layer, got "
            f"{np.array2string(found[wrong[0]], threshold=16)} in layer {config.moe_layers[wrong[0]]}"
        )


def inverse(placement: jax.Array) -> jax.Array:
    """The logical expert of every physical one, layer by layer: [num_moe_layers, E]."""
    return jnp.argsort(placement, axis=1).astype(jnp.int32)


def moved_experts(
    config: ModelConfig, layout: LayerLayout, leaf_shardings: dict, mesh: Mesh, tree: dict, source: jax.Array
) -> dict:
    """Experts of a params-like tree in device layout, expert e of a layer from where `source` [layer, e] says.

    Weights go around the devices of the expert axes, and each keeps what it wants (traceable): P - 1 neighbours'
    messages of all that a device holds, room for two copies of one leaf, and nothing is rounded.
    """
    position = {number: at for at, number in enumerate(config.moe_layers)}

    def moved(kind: str, leaf: jax.Array, sharding: LeafSharding) -> jax.Array:
        if sharding.expert_dimension < 0:
            return leaf
        # Of padding any row will do.
        rows = np.vectorize(lambda number: position.get(number, 0), otypes=[np.int32])(layout.layer_ids[kind])
        spec = sharding.spec
        return jax.shard_map(_around, mesh=mesh, in_specs=(spec, P(PIPE)), out_specs=spec)(
            leaf, take(source, rows)
        )

    layers = {
        kind: jax.tree.map(
            lambda leaf, sharding, kind=kind: moved(kind, leaf, sharding),
            stack,
            leaf_shardings["layers"][kind],
        )
        for kind, stack in tree["layers"].items()
    }
    return {**tree, "layers": layers}


def _around(leaf: jax.Array, source: jax.Array) -> jax.Array:
    """Per device: [1, chunk, layer, E/P, ...] of experts from [1, chunk, layer, E], those of all devices."""
    here, num_devices = leaf.shape[3], source.shape[3] // leaf.shape[3]
    device = lax.axis_index(EXPERT)
    wanted = lax.dynamic_slice_in_dim(source, device * here, here, axis=3).reshape(-1, here)
    holder, place = wanted // here, wanted % here
    rows = leaf.reshape(*wanted.shape, -1)
    ring = [(number, (number - 1) % num_devices) for number in range(num_devices)]
    found = jnp.zeros_like(rows)
    for turn in range(num_devices):
        if turn:
            rows = lax.ppermute(rows, EXPERT, ring)
        is_here = (holder == (device + turn) % num_devices)[:, :, None]
        found = jnp.where(is_here, jax.vmap(take)(rows, place), found)
    return found.reshape(leaf.shape)
