"""This file is what a device does once per step, before and after the ticks: parameters are gathered, gradients summed.

Gradients are added up over the microbatches of a step and then over the devices that hold copies, in the dtype that a
plan says. Wider than that stay those that cost next to nothing (norms, biases, routers), and the embedding's, to whose
rows tokens are added one by one: a frequent one would no longer change a sum of 8 bits.
"""

import jax
import jax.numpy as jnp
from jax import lax

from meshes.axes import PIPE
from models import transformer
from piperjax.planner.plan import Plan
from piperjax.runtime.varying import vary

OUTER = frozenset({"embedding", "head"})


def compute_copy(params: dict, shardings: dict, plan: Plan, dtype: str) -> dict:
    """Per device: parameters cast to the compute dtype, gathered from their split at rest."""
    # Layers keep their pipe dimension of one: where another is one, too, XLA would copy them all to drop it.

    def gather(leaf, sharding):
        if sharding.gather_axes:
            leaf = lax.all_gather(leaf, sharding.gather_axes, axis=sharding.gather_dimension, tiled=True)
        return vary(leaf)

    gathered = jax.tree.map(gather, transformer.cast_params(params, dtype), shardings)
    if plan.vocabulary == "whole":
        for name in OUTER & set(gathered):
            gathered[name] = vary(lax.all_gather(gathered[name], PIPE, axis=0, tiled=True))
    return gathered


def accumulators(params: dict, *, master_dtype: str, gradient_dtype: str) -> dict:
    """Per device: zeros like the compute copy of the parameters, to which gradients are added.

    Args:
      params: the compute copy.
      master_dtype: of parameters at rest; no gradient is wider than this and float32.
      gradient_dtype: as in a plan.
    """
    wide = jnp.promote_types(master_dtype, jnp.float32)
    narrow = wide if gradient_dtype == "float32" else jnp.dtype(gradient_dtype)

    def zeros(path, leaf):
        is_wide = transformer.is_small_parameter(path) or str(path[-1].key) == "embedding"
        return jnp.zeros(leaf.shape, wide if is_wide else narrow)

    return jax.tree_util.tree_map_with_path(zeros, params)


def added(total: jax.Array, gradient: jax.Array) -> jax.Array:
    """The sum in the dtype of `total`, rounded once."""
    wide = jnp.promote_types(total.dtype, gradient.dtype)
    return (total.astype(wide) + gradient.astype(wide)).astype(total.dtype)


def reduced(grads: dict, shardings: dict, plan: Plan) -> dict:
    """Per device: gradients summed over the devices that hold copies, split as the parameters are at rest."""

    def reduce(leaf, sharding):
        axes, dimension = sharding.gather_axes, sharding.gather_dimension
        if axes:
            return lax.psum_scatter(leaf, axes, scatter_dimension=dimension, tiled=True)
        return lax.psum(leaf, sharding.reduce_axes) if sharding.reduce_axes else leaf

    grads = dict(grads)
    if plan.vocabulary == "whole":
        for name in OUTER & set(grads):
            grads[name] = vary(lax.psum_scatter(grads[name], PIPE, scatter_dimension=0, tiled=True))
    return jax.tree.map(reduce, grads, shardings)
