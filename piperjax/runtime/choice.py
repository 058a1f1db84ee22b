"""One of two ways by a number known at run time, such that what passes is not copied.

What ticks hand on, stash and gradients, passes choices that change a part of it or nothing. XLA removes the copies
that it puts around a choice one after the other, in the order of its branches, and where the branch that hands on
what it is given does not come first, it keeps those: as compiled for H100, everything was then copied in every idle
tick, and with jax 0.10 once more beside the loop over ticks, up to two thirds more memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax


def choose(number: jax.Array, idle: Callable, run: Callable, *operands: Any, turn: int = 0) -> Any:
    """Returns `idle(*operands)` if the number is 0, `run(*operands)` if it is 1.

    `lax.cond` says the same. But XLA turns a choice by a boolean round for GPUs, so that `run` would come first there;
    one by an integer keeps its order.

    Args:
      number: an integer, 0 or 1, that is no converted boolean.
      turn: another one for every choice that hands on the same. XLA makes equal branches one, and then copies of it,
        which come last; these return their results in another order, and are not equal.
    """
    trees = []

    def turned(way: Callable) -> Callable:
        def leaves(*given: Any) -> tuple[jax.Array, ...]:
            values, tree = jax.tree.flatten(way(*given))
            trees.append(tree)
            return _turned(values, turn)

        return leaves

    values = lax.switch(number, (turned(idle), turned(run)), *operands)
    return jax.tree.unflatten(trees[0], _turned(values, -turn))


def _turned(values: Sequence[jax.Array], count: int) -> tuple[jax.Array, ...]:
    """The first `count` at the end, or the last at the front if it is negative."""
    count = count % len(values) if values else 0
    return (*values[count:], *values[:count])
