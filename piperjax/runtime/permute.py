"""Permutations of rows as gathers, forward and backward: nothing here compiles to a scatter.

A gather's gradient is a scatter-add, slow on ROCm and different from run to run. But a permutation knows its
inverse, so its gradient can be a gather through the inverse.
"""

import jax
import jax.numpy as jnp
from jax import lax


def sort_by_group(groups: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Orders rows by group, earlier rows first.

    Args:
      groups: group of each row [R] int32; `num_groups` and above go last.
      num_groups: number of groups G.

    Returns:
      The row at each sorted place [R], the sorted place of each row [R], and the rows of each group [G].
    """
    order = _stable_order(jnp.minimum(groups, num_groups), num_groups + 1)
    place = _stable_order(order, groups.shape[0])
    sizes = (groups[:, None] == lax.iota(groups.dtype, num_groups)[None, :]).sum(0, dtype=jnp.int32)
    return order, place, sizes


def _stable_order(keys: jax.Array, num_keys: int) -> jax.Array:
    """Row numbers [R] in the order of their keys, which are below `num_keys`; of a permutation, its inverse."""
    rows = keys.shape[0]
    number = lax.iota(jnp.int32, rows)
    if num_keys * rows < 2**31:
        # Key and row number in one integer: a third of the time of a sort of pairs on CPU.
        return lax.sort(keys * rows + number) % rows
    return lax.sort((keys, number), num_keys=1, is_stable=True)[1]


@jax.custom_vjp
def permute_rows(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Returns `x[source]` [R, D] for a permutation and its inverse `target` [R]."""
    del target
    return x[source]


permute_rows.defvjp(
    lambda x, source, target: (x[source], (source, target)),
    lambda saved, dy: (dy[saved[1]], None, None),
)


@jax.custom_vjp
def spread_rows(x: jax.Array, source: jax.Array, places: jax.Array, kept: jax.Array) -> jax.Array:
    """Copies tokens to the places that want them: `x[source]`.

    Args:
      x: tokens [T, D].
      source: token of every place [R]; places that nobody wants may name any token.
      places: places of the k copies of every token [T, k].
      kept: whether a copy has a place [T, k] bool; its gradient counts only then.

    Returns:
      [R, D].
    """
    del places, kept
    return x[source]


def _spread_backward(saved, dy):
    places, kept, _ = saved
    copies = jnp.where(kept[..., None], dy[places], jnp.zeros((), dy.dtype))
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    return copies.sum(1, dtype=wide).astype(dy.dtype), None, None, None


spread_rows.defvjp(
    lambda x, source, places, kept: (x[source], (places, kept, None)),
    _spread_backward,
)


@jax.custom_vjp
def combine_rows(rows, gates, source, slot, places, kept, live):
    """Adds up the k results of every token, weighted by its gates: the counterpart of `spread_rows`.

    Args:
      rows: results [R, D].
      gates: weights [T, k], in at least float32.
      source: token of every place [R].
      slot: which of the token's k copies a place holds [R].
      places: places of the k copies of every token [T, k].
      kept: whether a copy has a place [T, k] bool; others count as zero.
      live: whether a place holds a copy [R] bool; the gradient of others is zero.

    Returns:
      [T, D] in the dtype of `rows`, accumulated in the dtype of `gates`.
    """
    del source, slot, live
    picked = jnp.where(kept[..., None], rows[places], jnp.zeros((), rows.dtype))
    return jnp.einsum("tk,tkd->td", gates, picked.astype(gates.dtype)).astype(rows.dtype)


def _combine_forward(rows, gates, source, slot, places, kept, live):
    y = combine_rows(rows, gates, source, slot, places, kept, live)
    return y, (rows, gates, source, slot, places, kept, live)


def _combine_backward(saved, dy):
    rows, gates, source, slot, places, kept, live = saved
    gate = gates.reshape(-1)[source * gates.shape[1] + slot]
    drows = jnp.where(live[:, None], gate[:, None] * dy[source].astype(gates.dtype), jnp.zeros((), gates.dtype))
    picked = jnp.where(kept[..., None], rows[places], jnp.zeros((), rows.dtype)).astype(gates.dtype)
    dgates = jnp.einsum("tkd,td->tk", picked, dy.astype(gates.dtype))
    return drows.astype(rows.dtype), dgates, None, None, None, None, None


combine_rows.defvjp(_combine_forward, _combine_backward)
