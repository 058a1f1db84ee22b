"""Grouped matrix multiplication on CUDA and ROCm GPUs: Pallas kernels, which Triton compiles on both."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Rows and columns of the accumulator of one program take up to 128 of 16-bit operands or 64 of float32 ones, which
# no matrix unit of H100 multiplies: larger tiles of those compile for twice as long. A step of the loop is 32 deep
# and holds 16 KiB of operands; a compute unit of MI250X has 64 KiB of shared memory.
LARGEST_TILE_BYTES, DEPTH, SMALLEST_TILE = 256, 32, 16


def supports(dtype: jax.typing.DTypeLike) -> bool:
    """Whether the kernels take rows of this dtype."""
    return dtype in (jnp.float32, jnp.bfloat16, jnp.float16)


def multiply(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, transposed: bool, interpret: bool = False
) -> jax.Array:
    """Rows of group g times w[g]: x [R, D], w [G, D, F] -> [R, F]; or x [R, F] -> [R, D] if `transposed`.

    One program per block of rows and tile of columns. A block lies in one group; blocks of rows past all
    groups store zeros and multiply nothing.
    """
    R, depth = x.shape
    G, columns = w.shape[0], w.shape[1 if transposed else 2]
    largest = LARGEST_TILE_BYTES // x.dtype.itemsize
    tiles = Tiles(rows=_tile(-(-R // G), largest), columns=_tile(columns, largest), depth=_tile(depth, DEPTH))
    group, first, end = block_table(group_sizes, num_rows=R, block=tiles.rows)
    kernel = functools.partial(_multiply_kernel, tiles=tiles, transposed=transposed)
    grid = (group.shape[0], pl.cdiv(columns, tiles.columns))
    return _call(kernel, x, w, group, first, end, shape=(R, columns), grid=grid, interpret=interpret)


def weight_gradient(
    x: jax.Array, dy: jax.Array, group_sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """For each group its rows of x [R, D] transposed times those of dy [R, F]: [G, D, F].

    One program per group and tile of [D, F], which walks through the rows of the group.
    """
    G, D, F = group_sizes.shape[0], x.shape[1], dy.shape[1]
    largest = LARGEST_TILE_BYTES // x.dtype.itemsize
    tiles = Tiles(rows=_tile(D, largest), columns=_tile(F, largest), depth=_tile(-(-x.shape[0] // G), DEPTH))
    end = jnp.cumsum(group_sizes, dtype=jnp.int32)
    kernel = functools.partial(_weight_gradient_kernel, tiles=tiles)
    grid = (G, pl.cdiv(D, tiles.rows), pl.cdiv(F, tiles.columns))
    return _call(kernel, x, dy, end - group_sizes, end, shape=(G, D, F), grid=grid, interpret=interpret)


class Tiles(NamedTuple):
    """Powers of two: rows and columns of an accumulator, and depth of one step of its sum."""

    rows: int
    columns: int
    depth: int


def block_table(
    group_sizes: jax.Array, *, num_rows: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts the rows of each of G groups, and those past all groups as group G, into blocks.

    Returns group, first row and end row of every block, each [N] int32 with N the most that can be needed.
    Blocks that are not needed are empty: they begin where they end.
    """
    G = group_sizes.shape[0]
    sizes = jnp.append(group_sizes, num_rows - jnp.sum(group_sizes, dtype=jnp.int32))
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    blocks = (sizes + (block - 1)) // block
    blocks_before = jnp.cumsum(blocks, dtype=jnp.int32)
    number = lax.iota(jnp.int32, num_rows // block + G + 1)
    past = (number[:, None] >= blocks_before[None, :]).sum(1, dtype=jnp.int32)
    group = jnp.minimum(past, G)
    first = (ends - sizes)[group] + (number - (blocks_before - blocks)[group]) * block
    return group, jnp.minimum(first, ends[group]), ends[group]


def _tile(size: int, largest: int) -> int:
    return min(max(pl.next_power_of_2(size), SMALLEST_TILE), largest)


def _call(kernel, *operands: jax.Array, shape, grid, interpret):
    """Runs a kernel over whole arrays; the result varies over mesh axes as the first operand does."""
    x = operands[0]
    out = jax.ShapeDtypeStruct(shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
    params = plgpu.CompilerParams(num_warps=8, num_stages=2)
    call = pl.pallas_call(kernel, out, grid=grid, interpret=interpret, compiler_params=params)
    return call(*operands)


def _multiply_kernel(x, w, group, first, end, out, *, tiles: Tiles, transposed: bool):
    num_groups, depth = w.shape[0], x.shape[1]
    g, first_row, end_row = group[pl.program_id(0)], first[pl.program_id(0)], end[pl.program_id(0)]
    rows = _Span(first_row, tiles.rows, end_row)
    columns = _Span(pl.program_id(1) * tiles.columns, tiles.columns, out.shape[1])

    @pl.when(first_row < end_row)
    def _():
        def step(number, total):
            inner = _Span(number * tiles.depth, tiles.depth, depth)
            x_tile = _load(x, rows, inner)
            w_tile = _load(w, columns, inner, g) if transposed else _load(w, inner, columns, g)
            return total + _dot(x_tile, w_tile, trans_b=transposed)

        total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        # Both bounds are arrays: Triton does not accept a loop from a Python number to an array.
        num_steps = jnp.where(g < num_groups, jnp.int32(pl.cdiv(depth, tiles.depth)), jnp.int32(0))
        _store(out, rows, columns, lax.fori_loop(jnp.int32(0), num_steps, step, total))


def _weight_gradient_kernel(x, dy, first, end, out, *, tiles: Tiles):
    g = pl.program_id(0)
    first_row, end_row = first[g], end[g]
    rows = _Span(pl.program_id(1) * tiles.rows, tiles.rows, out.shape[1])
    columns = _Span(pl.program_id(2) * tiles.columns, tiles.columns, out.shape[2])

    def step(number, total):
        inner = _Span(first_row + number * tiles.depth, tiles.depth, end_row)
        return total + _dot(_load(x, inner, rows), _load(dy, inner, columns), trans_a=True)

    total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    num_steps = (end_row - first_row + (tiles.depth - 1)) // tiles.depth
    _store(out, rows, columns, lax.fori_loop(jnp.int32(0), num_steps, step, total), g)


class _Span(NamedTuple):
    """`size` rows or columns from `start`, of which those before `end` count."""

    start: jax.Array
    size: int
    end: jax.Array | int

    @property
    def slice(self):
        return pl.ds(self.start, self.size)

    @property
    def mask(self):
        return self.start + lax.iota(jnp.int32, self.size) < self.end


def _load(ref, rows: _Span, columns: _Span, *before) -> jax.Array:
    mask = rows.mask[:, None] & columns.mask[None, :]
    return plgpu.load(ref.at[(*before, rows.slice, columns.slice)], mask=mask, other=0)


def _store(ref, rows: _Span, columns: _Span, value: jax.Array, *before) -> None:
    mask = rows.mask[:, None] & columns.mask[None, :]
    plgpu.store(ref.at[(*before, rows.slice, columns.slice)], value.astype(ref.dtype), mask=mask)


def _dot(a: jax.Array, b: jax.Array, *, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
    # Float32 means float32; TF32 would be the default, and gfx90a has none.
    return plgpu.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=lax.Precision.HIGHEST)
