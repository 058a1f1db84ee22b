"""Values that are not there before others, said in a way that no compiler removes.

Compilers order operations as they like, run what a loop does not change before the loop, and on CPU drop barriers
before they do either. An operation that needs both values stays where it is.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.runtime.varying import vary_like

Tree = TypeVar("Tree")


def tied(tree: Tree, *, to: Sequence[jax.Array]) -> Tree:
    """Per device: the same values, none of which is known before an element of every floating-point array of `to` is.

    Costs a choice between each value and zero, which is part of what reads it. That the condition always holds is
    nothing that a compiler sees.
    """
    bits = jnp.int32(0)
    for other in to:
        bits ^= lax.bitcast_convert_type(corner(other), jnp.int32)
    holds = (bits | 1) != 0

    def one(leaf: jax.Array) -> jax.Array:
        leaf = vary_like(leaf, holds)
        return jnp.where(vary_like(holds, leaf), leaf, vary_like(jnp.zeros((), leaf.dtype), leaf))

    return jax.tree.map(one, tree)


def corner(array: jax.Array) -> jax.Array:
    """The first element, a float32 scalar."""
    return lax.slice(array, (0,) * array.ndim, (1,) * array.ndim).reshape(()).astype(jnp.float32)
