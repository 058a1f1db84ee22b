"""The programs of the cells of `benchmarks.alltoall`: all-to-alls, and experts between dispatch and combine."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from benchmarks.alltoall_cells import ITEM_BYTES, Cell, Layer, NodeExchange, Overlap, Variant
from meshes.axes import EXPERT
from models.moe import weigh
from piperjax.runtime.all_to_all import ALL_TO_ALLS
from piperjax.runtime.backend import compiler_options
from piperjax.runtime.dispatch import make_experts
from piperjax.runtime.grouped_matmul import grouped_matmul
from piperjax.runtime.stopwatch import operand

SPEC = jax.P(EXPERT)
# Experts of layers in which the wire is what counts.
SMALL_D_FF = 16


class Program(NamedTuple):
    """A function of global arrays, these, and what XLA is told for it."""

    function: Callable
    arguments: tuple[jax.Array, ...]
    options: Mapping[str, str] = {}


def programs_of(cell: Cell, mesh: Mesh) -> dict[str, Program]:
    """The program of every variant of a cell."""
    if isinstance(cell, Layer):
        arguments = layer_arguments(cell, mesh, d_ff=SMALL_D_FF)
        return {str(way): Program(dispatching(cell, way, mesh, ffn), arguments) for way in cell.ways}
    if isinstance(cell, Overlap):
        return _overlapping(cell, mesh)
    if isinstance(cell, NodeExchange):
        axis = EXPERT[-1] if cell.where == "inside" else EXPERT[-2]
        moves, devices = {"node": partial(_along, axis)}, mesh.shape[axis]
    else:
        moves, devices = {name: ALL_TO_ALLS[name].move for name in cell.variants}, mesh.size
    rows = (operand(mesh, (devices, cell.pair_bytes // ITEM_BYTES)),)
    return {name: Program(_repeated(move, cell.rounds, mesh), rows) for name, move in moves.items()}


def _along(axis: str, x: jax.Array, _: tuple[str, ...]) -> jax.Array:
    return lax.all_to_all(x, axis, 0, 0, tiled=True)


def _repeated(move: Callable, rounds: int, mesh: Mesh) -> Callable:
    """Applies an all-to-all to rows [*mesh, P, W] again and again."""
    axes = mesh.axis_names

    def per_device(x):
        rows = x[(0,) * len(axes)]
        for _ in range(rounds):
            rows = lax.optimization_barrier(move(rows, EXPERT))
        return rows[(None,) * len(axes)]

    return jax.shard_map(per_device, mesh=mesh, in_specs=jax.P(*axes), out_specs=jax.P(*axes))


# --- layers of experts -----------------------------------------------------------------------------------------


def ffn(rows, sizes, gates, w_in, w_out):
    """Per device: two products around a nonlinearity, rows [R, D] grouped by expert, weighed by gates [R]."""
    return grouped_matmul(weigh(jnp.tanh(grouped_matmul(rows, w_in, sizes)), gates), w_out, sizes)


def untouched(rows, *_, **__):
    """Per device: experts that return what they get, and need no time."""
    return rows


def layer_arguments(cell: Layer | Overlap, mesh: Mesh, *, d_ff: int) -> tuple[jax.Array, ...]:
    """Tokens [P T, D], experts [P T, k], gates [P T, k] and weights [E, D, F], [E, F, D], the same on every mesh."""
    E, k, T, D = cell.num_experts, cell.experts_per_token, cell.tokens * mesh.size, cell.d_model
    rng, ids = np.random.default_rng(0), _routing(cell, mesh)
    shapes = (T, D), (T, k), (E, D, d_ff), (E, d_ff, D)
    x, gates, w_in, w_out = (rng.standard_normal(shape, np.float32) for shape in shapes)
    w_in, w_out = w_in / np.sqrt(np.float32(D)), w_out / np.sqrt(np.float32(d_ff))
    return tuple(globally(array, mesh) for array in (x, ids, gates, w_in, w_out))


def _routing(cell: Layer | Overlap, mesh: Mesh) -> np.ndarray:
    """Experts of every token [P T, k], distinct and at random."""
    shape = cell.tokens * mesh.size, cell.num_experts
    order = np.argsort(np.random.default_rng(1).random(shape), axis=1)
    return order[:, : cell.experts_per_token].astype(np.int32)


def globally(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array split over all devices by its first dimension, every process giving its part."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, SPEC), lambda at: array[at])


def dispatching(cell: Layer | Overlap, way: Variant, mesh: Mesh, products: Callable) -> Callable:
    """(x, ids, gates, w_in, w_out) -> (y [P T, D], rows dropped on each device [P])."""
    experts = make_experts(
        way.dispatch, EXPERT, way.capacity_factor, chunks=way.chunks, overflow=way.overflow
    )

    def per_device(x, ids, gates, w_in, w_out):
        own = partial(products, w_in=w_in, w_out=w_out)
        y, dropped = experts(own, x, ids, gates, cell.num_experts)
        return y, dropped[None]

    return jax.shard_map(per_device, mesh=mesh, in_specs=(SPEC,) * 5, out_specs=(SPEC, SPEC))


def _overlapping(cell: Overlap, mesh: Mesh) -> dict[str, Program]:
    arguments = layer_arguments(cell, mesh, d_ff=cell.d_ff)
    both = "backward" in cell.passes

    def program(chunks: int, products: Callable) -> Program:
        layer = dispatching(cell, Variant(cell.dispatch, 0.0, chunks), mesh, products)
        function = _summed(_with_gradients(layer) if both else layer)
        return Program(function, arguments, compiler_options(mesh, chunks=chunks))

    programs = {"wire": program(1, untouched), "products": _products(cell, mesh, arguments)}
    return programs | {f"x{chunks}": program(chunks, ffn) for chunks in cell.chunks}


def _summed(function: Callable) -> Callable:
    """Returns sums over all dimensions but the first.

    What a step makes is read by what comes next. The memory of a program's results XLA uses for other things before.
    """

    def summed(*arguments):
        return jax.tree.map(lambda leaf: leaf.sum(axis=tuple(range(1, leaf.ndim))), function(*arguments))

    return summed


def _with_gradients(layer: Callable) -> Callable:
    """Result and gradients of half the sum of squares."""

    def loss(x, gates, w_in, w_out, ids):
        y, _ = layer(x, ids, gates, w_in, w_out)
        return 0.5 * jnp.sum(y * y), y

    def both(x, ids, gates, w_in, w_out):
        return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(x, gates, w_in, w_out, ids)

    return both


def _products(cell: Overlap, mesh: Mesh, arguments: tuple[jax.Array, ...]) -> Program:
    """The experts alone, on buffers as long and rows as many for each as in the layer."""
    num_rows = []

    def seen(rows, *_, **__):
        num_rows.append(len(rows))
        return rows

    jax.eval_shape(dispatching(cell, Variant(cell.dispatch), mesh, seen), *arguments)
    copies = -(-num_rows[0] // cell.tokens)
    sizes = np.bincount(_routing(cell, mesh).reshape(-1), minlength=cell.num_experts).astype(np.int32)

    def per_device(rows, sizes, w_in, w_out):
        gates = rows[:, 0]  # Any will do.
        if "backward" not in cell.passes:
            return ffn(rows, sizes, gates, w_in, w_out)
        y, pull = jax.vjp(lambda rows, *others: ffn(rows, sizes, *others), rows, gates, w_in, w_out)
        return pull(y)

    x, _, _, w_in, w_out = arguments
    tile = jax.shard_map(
        lambda x: jnp.concatenate([x] * copies)[: num_rows[0]], mesh=mesh, in_specs=SPEC, out_specs=SPEC
    )
    function = jax.shard_map(per_device, mesh=mesh, in_specs=(SPEC,) * 4, out_specs=SPEC)
    return Program(_summed(function), (jax.jit(tile)(x), globally(sizes, mesh), w_in, w_out))
