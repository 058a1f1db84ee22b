"""Where rows go that say themselves what they are for: places by group, from the masks of the groups.

Every row names up to k groups. With ranks counted along a mask and members found by binary search in the counts, no
sort is needed, and what a device must know of others is no more than the names.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.runtime.permute import Places, count_below, take


class Grouped(NamedTuple):
    """Per device: M rows in groups.

    Attributes:
      where: the copies of rows in a buffer grouped by expert, then row; each has min(k, G) slots.
      sizes: rows of each group [G].
      gates: the gate of every slot [M, min(k, G)].
    """

    where: Places
    sizes: jax.Array
    gates: jax.Array


def group_by_expert(
    expert_ids: jax.Array, gates: jax.Array, *, first: jax.Array | int, num_groups: int, num_places: int
) -> Grouped:
    """Groups M rows by their experts `first` to `first + num_groups - 1`; others do not count.

    Args:
      expert_ids: [M, k], those of a row distinct.
      gates: [M, k].
      first, num_groups: which experts.
      num_places: rows of the buffer, as many as can come.
    """
    (M, k), G = expert_ids.shape, num_groups
    local = expert_ids.astype(jnp.int32) - first
    mask = has_group(local, G)
    count = jnp.cumsum(mask.reshape(-1), dtype=jnp.int32)
    sizes = jnp.diff(count[M - 1 :: M], prepend=0)

    number = lax.iota(jnp.int32, num_places)
    live = number < count[-1]
    # A dead place may ask for any row.
    position = jnp.where(live, count_below(count, number + 1), 0)
    row, group = position % M, position // M
    if k >= G:
        copies, places, kept = row * G + group, count.reshape(G, M).T - 1, mask.T
        chosen = local[:, :, None] == lax.iota(jnp.int32, G)
        gates = jnp.where(chosen, gates[:, :, None], 0).sum(1)
    else:
        slot = jnp.equal(take(local, row), group[:, None]).argmax(1).astype(jnp.int32)
        copies, kept = row * k + slot, (local >= 0) & (local < G)
        places = take(count, jnp.where(kept, local * M + lax.iota(jnp.int32, M)[:, None], 0)) - 1
        gates = jnp.where(kept, gates, 0)
    return Grouped(Places(copies, live, jnp.where(kept, places, 0), kept), sizes, gates)


def count_by_group(groups: jax.Array, num_groups: int) -> jax.Array:
    """How often every row [M, k] names each group: [G, M] int32."""
    return (groups.T[None, :, :] == lax.iota(groups.dtype, num_groups)[:, None, None]).sum(1, dtype=jnp.int32)


def has_group(groups: jax.Array, num_groups: int) -> jax.Array:
    """Whether a row [M, k] names each group: [G, M] bool."""
    return (groups.T[None, :, :] == lax.iota(groups.dtype, num_groups)[:, None, None]).any(1)


class Bins(NamedTuple):
    """Per device: G bins of C places each.

    Attributes:
      member: which row of its group is at every place [G, C]; at a dead place any.
      live: whether there is one [G, C] bool.
      place: the place, of all G C, of every row [G, M]; of one that is not in the bin, any.
    """

    member: jax.Array
    live: jax.Array
    place: jax.Array


def fill_bins(mask: jax.Array, capacity: int) -> Bins:
    """Puts the rows of each group [G, M] bool into its bin, in order; there are at most `capacity`."""
    G, M = mask.shape
    count = jnp.cumsum(mask.reshape(-1), dtype=jnp.int32)
    end = count[M - 1 :: M]
    first = jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]])[:, None]
    column = lax.iota(jnp.int32, capacity)[None, :]
    live = first + column < end[:, None]
    position = jnp.where(live, count_below(count, (first + column + 1).reshape(-1)).reshape(live.shape), 0)
    group = lax.iota(jnp.int32, G)[:, None]
    place = jnp.where(mask, count.reshape(G, M) - 1 - first + group * capacity, 0)
    return Bins(position % M, live, place)
