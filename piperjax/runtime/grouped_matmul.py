"""Grouped matrix multiplication: contiguous groups of rows, each times its own matrix, at the cost of live rows.

`lax.ragged_dot` densifies on CPU, on H100 and on MI250X (work and memory grow with the number of groups), so
it serves as an oracle in tests only.
"""

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.runtime.varying import vary_like

BLOCK_ROWS = 128


@jax.custom_vjp
def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Multiplies the g-th contiguous group of rows by w[g].

    Work follows the rows in groups, whatever the length of `x`. Rows past `sum(group_sizes)` come out zero,
    and their content, even NaN, reaches neither results nor gradients.

    Args:
      x: rows [R, D], grouped.
      w: one matrix per group [G, D, F].
      group_sizes: rows of each group [G] int32; their sum is at most R.

    Returns:
      [R, F] in the dtype of x, accumulated in at least float32.
    """
    return _blocks(x, w, group_sizes)


def _forward(x, w, group_sizes):
    return _blocks(x, w, group_sizes), (x, w, group_sizes)


def _backward(saved, dy):
    x, w, group_sizes = saved
    dx = _blocks(dy, jnp.swapaxes(w, 1, 2), group_sizes)
    return dx.astype(x.dtype), _weight_gradient(x, dy, group_sizes, w.shape[0]).astype(w.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _block_table(group_sizes: jax.Array, num_rows: int, block: int):
    """(number of live blocks, group, first row, end row of each block); a block never spans two groups."""
    num_groups = group_sizes.shape[0]
    most = num_rows // block + num_groups
    ends = jnp.cumsum(group_sizes)
    blocks = (group_sizes + block - 1) // block
    block_ends = jnp.cumsum(blocks)
    number = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum((number[:, None] >= block_ends[None, :]).sum(1), num_groups - 1).astype(jnp.int32)
    first = (ends - group_sizes)[group] + (number - (block_ends - blocks)[group]) * block
    return block_ends[-1].astype(jnp.int32), group, first.astype(jnp.int32), ends[group].astype(jnp.int32)


def _blocks(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    rows = x.shape[0]
    block = min(BLOCK_ROWS, rows)
    live, group, first, end = _block_table(group_sizes, rows, block)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def body(number, out):
        # The last block may start early and overlap its neighbour; the mask keeps to its own rows.
        start = jnp.minimum(first[number], rows - block)
        row = start + jnp.arange(block, dtype=jnp.int32)
        mine = (row >= first[number]) & (row < end[number])
        x_block = lax.dynamic_slice_in_dim(x, start, block)
        product = jnp.matmul(x_block, w[group[number]], preferred_element_type=wide).astype(out.dtype)
        kept = lax.dynamic_slice_in_dim(out, start, block)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None], product, kept), start, 0)

    out = vary_like(jnp.zeros((rows, w.shape[2]), x.dtype), x, w, group_sizes)
    return lax.fori_loop(jnp.int32(0), live, body, out)


def _weight_gradient(x: jax.Array, dy: jax.Array, group_sizes: jax.Array, num_groups: int) -> jax.Array:
    rows = x.shape[0]
    block = min(BLOCK_ROWS, rows)
    live, group, first, end = _block_table(group_sizes, rows, block)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def body(number, total):
        start = jnp.minimum(first[number], rows - block)
        row = start + jnp.arange(block, dtype=jnp.int32)
        mine = ((row >= first[number]) & (row < end[number]))[:, None]
        x_block = jnp.where(mine, lax.dynamic_slice_in_dim(x, start, block), 0)
        dy_block = jnp.where(mine, lax.dynamic_slice_in_dim(dy, start, block), 0)
        product = jnp.matmul(x_block.T, dy_block, preferred_element_type=wide)
        return total.at[group[number]].add(product)

    total = vary_like(jnp.zeros((num_groups, x.shape[1], dy.shape[1]), wide), x, dy, group_sizes)
    return lax.fori_loop(jnp.int32(0), live, body, total)
