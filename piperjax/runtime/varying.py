"""Device-varying types: what `check_vma=True` asks of values inside `shard_map`.

Every parameter is made varying over all mesh axes before it is differentiated. Otherwise the gradient of a
replicated parameter contains an all-reduce, and inside a branch that only some pipe ranks take, that
all-reduce never meets its partners.
"""

from typing import TypeVar

import jax
from jax import lax

from meshes.axes import AXES

Tree = TypeVar("Tree")


def vary(tree: Tree, axes: tuple[str, ...] = AXES) -> Tree:
    """Per device: marks every leaf as different on each device of `axes`. Moves no data."""
    return jax.tree.map(lambda leaf: _vary_leaf(leaf, axes), tree)


def _vary_leaf(leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    already = jax.typeof(leaf).manual_axis_type.varying
    missing = tuple(axis for axis in axes if axis not in already)
    return lax.pcast(leaf, missing, to="varying") if missing else leaf


def vary_like(leaf: jax.Array, *others: jax.Array) -> jax.Array:
    """Per device: marks `leaf` as varying over every axis over which one of `others` varies."""
    axes = frozenset().union(*(jax.typeof(other).manual_axis_type.varying for other in others))
    return _vary_leaf(leaf, tuple(sorted(axes)))
