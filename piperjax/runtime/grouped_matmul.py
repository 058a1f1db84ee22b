"""Grouped matrix multiplication: contiguous groups of rows, each times its own matrix, at the cost of live rows.

A loop over blocks of rows anywhere, the Pallas kernels of `grouped_matmul_triton` on CUDA and ROCm. Which of
them is decided when a program is lowered, so a step that was traced once lowers for every platform.
`lax.ragged_dot` multiplies every row by every matrix on CPU, H100 and MI250X (work and memory grow with the
number of groups), so it serves as an oracle in tests only.
"""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from piperjax.planner.row_blocks import block_rows
from piperjax.runtime.varying import vary_like

# What to lower kernels for where there is no GPU: they do not depend on which, but Pallas must be told one.
AHEAD_OF_TIME_GPUS = {"cuda": "NVIDIA H100", "rocm": "gfx90a"}
# The scope of the loop over the blocks of a group but for its first.
MORE_BLOCKS = "more_blocks"


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Multiplies the g-th contiguous group of rows by w[g].

    Work follows the rows in groups, whatever the length of `x`. Rows past `sum(group_sizes)` come out zero,
    and their content, even NaN, reaches neither results nor gradients. Reverse-mode differentiation only.

    Args:
      x: rows [R, D], grouped.
      w: one matrix per group [G, D, F], of the dtype of x.
      group_sizes: rows of each group [G] int32; their sum is at most R.

    Returns:
      [R, F] in the dtype of x, accumulated in at least float32.

    Raises:
      ValueError: if the shapes or dtypes do not fit.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            "grouped_matmul takes x [R, D], w [G, D, F] and group_sizes [G], got "
            f"{list(x.shape)}, {list(w.shape)} and {list(group_sizes.shape)}"
        )
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating) or group_sizes.dtype != jnp.int32:
        raise ValueError(
            "grouped_matmul takes x and w of one floating dtype and group_sizes of int32, got "
            f"{x.dtype}, {w.dtype} and {group_sizes.dtype}; cast them first"
        )
    # Once all are alike in type, nothing below needs a reduction over devices: its place is the gradient of this.
    x, w, group_sizes = (vary_like(array, x, w, group_sizes) for array in (x, w, group_sizes))
    return _grouped_matmul(x, w, group_sizes)


@jax.custom_vjp
def _grouped_matmul(x, w, group_sizes):
    return _multiply.bind(x, w, group_sizes, transposed=False)


def _forward(x, w, group_sizes):
    return _multiply.bind(x, w, group_sizes, transposed=False), (x, w, group_sizes)


def _backward(saved, dy):
    x, w, group_sizes = saved
    dx = _multiply.bind(dy, w, group_sizes, transposed=True)
    return dx, _weight_gradient.bind(x, dy, group_sizes), None


_grouped_matmul.defvjp(_forward, _backward)


def multiply_blocks(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, transposed: bool) -> jax.Array:
    """Rows of group g times w[g]: x [R, D], w [G, D, F] -> [R, F]; or x [R, F] -> [R, D] if `transposed`."""
    (R, _), (G, D, F) = x.shape, w.shape
    block = block_rows(R, G)
    starts, ends, counts = _blocks(group_sizes, block)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def add_group(group, out):
        matrix = lax.dynamic_index_in_dim(w, group, keepdims=False)

        def add_block(number, out):
            first = starts[group] + number * block
            start = jnp.minimum(first, R - block)  # a slice ends inside the array
            row = start + lax.iota(jnp.int32, block)
            product = _dot(lax.dynamic_slice_in_dim(x, start, block), matrix, contract).astype(x.dtype)
            # Later groups overwrite what is written past this one; past the last group there must be zeros.
            product = jnp.where((row < ends[-1])[:, None], product, jnp.zeros((), x.dtype))
            before = lax.dynamic_slice_in_dim(out, start, block)
            merged = jnp.where((row >= first)[:, None], product, before)
            return lax.dynamic_update_slice_in_dim(out, merged, start, 0)

        return lax.fori_loop(jnp.int32(0), counts[group], add_block, out)

    return lax.fori_loop(0, G, add_group, jnp.zeros((R, D if transposed else F), x.dtype))


def weight_gradient_blocks(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """For each group its rows of x [R, D] transposed times those of dy [R, F]: [G, D, F]."""
    (R, D), (_, F), G = x.shape, dy.shape, group_sizes.shape[0]
    block = block_rows(R, G)
    starts, ends, counts = _blocks(group_sizes, block)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def set_group(group, total):
        def of_block(number):
            first = starts[group] + number * block
            start = jnp.minimum(first, R - block)
            row = start + lax.iota(jnp.int32, block)
            mine = ((row >= first) & (row < ends[group]))[:, None]
            x_rows, dy_rows = (
                jnp.where(mine, lax.dynamic_slice_in_dim(rows, start, block), jnp.zeros((), rows.dtype))
                for rows in (x, dy)
            )
            return _dot(x_rows, dy_rows, (((0,), (0,)), ((), ())))

        # Few rows make large gradients: a sum that begins with zeros would cost as much as a product. In a group
        # without rows none of the first block is its own.
        with jax.named_scope(MORE_BLOCKS):
            so_far = lax.fori_loop(
                jnp.int32(1), counts[group], lambda at, so_far: so_far + of_block(at), of_block(0)
            )
        return lax.dynamic_update_index_in_dim(total, so_far, group, 0)

    return lax.fori_loop(0, G, set_group, jnp.zeros((G, D, F), wide)).astype(x.dtype)


def _blocks(group_sizes: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First row, end row and number of blocks of each group."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return ends - group_sizes, ends, lax.div(group_sizes + (block - 1), jnp.full_like(ends, block))


def _dot(a: jax.Array, b: jax.Array, contract) -> jax.Array:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, contract, preferred_element_type=wide)


# Each operation is a primitive for two reasons. `lax.platform_dependent` would trace the kernels, and import
# Pallas, on every platform. And the kernels would be traced within the mesh of the program, of which Pallas
# demands GPUs on jax 0.12 even when it only lowers, for a cluster, on a machine without one.


def _primitive(name: str, shape: Callable, loop: Callable) -> Primitive:
    """An operation whose result has the dtype of its first operand.

    Args:
      name: the name of the kernel in `grouped_matmul_triton`.
      shape: from operands and parameters to the shape of the result.
      loop: what to run where there is no kernel.
    """
    primitive = Primitive(name)

    def abstract(x, *others, **params):
        result = shape(x, *others, **params)
        return x.update(shape=result, sharding=NamedSharding(x.sharding.mesh, P(*(None for _ in result))))

    @functools.cache
    def compiled(**params):
        return jax.jit(functools.partial(primitive.bind, **params))

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(lambda *operands, **params: compiled(**params)(*operands))
    mlir.register_lowering(primitive, functools.partial(_lower, body=loop, device=None))
    for platform, kind in AHEAD_OF_TIME_GPUS.items():
        device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
        lower = functools.partial(_lower_kernel, kernel=name, loop=loop, device=device)
        mlir.register_lowering(primitive, lower, platform=platform)
    return primitive


def _lower(ctx, *operands, body: Callable, device: AbstractDevice | None, **params):
    """Traces and lowers `body` as if outside of any mesh: nothing in it concerns other devices."""

    def plain(avals):
        return [ShapedArray(aval.shape, aval.dtype) for aval in avals]

    ctx = ctx.replace(avals_in=plain(ctx.avals_in), avals_out=plain(ctx.avals_out))
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return mlir.lower_fun(functools.partial(body, **params), multiple_results=False)(ctx, *operands)


def _lower_kernel(ctx, *operands, kernel: str, loop: Callable, device: AbstractDevice, **params):
    from piperjax.runtime import grouped_matmul_triton as triton

    if not triton.supports(ctx.avals_in[0].dtype):
        return _lower(ctx, *operands, body=loop, device=None, **params)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The Pallas Triton backend", category=DeprecationWarning)
        device = None if jax.default_backend() == "gpu" else device
        return _lower(ctx, *operands, body=getattr(triton, kernel), device=device, **params)


_multiply = _primitive(
    "multiply",
    lambda x, w, _, transposed: (x.shape[0], w.shape[1 if transposed else 2]),
    multiply_blocks,
)
_weight_gradient = _primitive(
    "weight_gradient",
    lambda x, dy, group_sizes: (group_sizes.shape[0], x.shape[1], dy.shape[1]),
    weight_gradient_blocks,
)
