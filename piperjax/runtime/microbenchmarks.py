"""This file measures what devices compute: products, attention, elementwise work, operations, calls and copies.

All devices of a process work at once, as they do in training; some shapes are also run on one device alone, which
tells whether devices share their cores. Each benchmark is a `Task`, so that a command can show its progress.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from meshes.device import ProductPart
from models.attention import causal_attention
from piperjax.planner.calibration import AttentionSample, BytesSample, ElementwiseSample, ProductSample
from piperjax.runtime.elementwise_benchmarks import BODIES, elementwise_operands
from piperjax.runtime.grouped_matmul import grouped_matmul
from piperjax.runtime.stopwatch import Body, Stopwatch, line_of, looped, looped_over_stack, operand

# Operations of a round when the cost of a single one is measured.
CHAIN = 16
# Sets of operands that products and elementwise work go through, at most: each is a part of the program.
MOST_SETS = 8
# Features of a row that elementwise work goes through.
STREAM_WIDTH = 256


class Task(NamedTuple):
    """One benchmark: the field of `Measurements` that its result belongs to, what it is, and how to run it."""

    field: str
    label: str
    run: Callable[[], Any]


class Layer(NamedTuple):
    """Rows times a weight [d_in, d_out]; of each of `groups` experts, or of a dense layer if that is 0."""

    rows: int
    d_in: int
    d_out: int
    groups: int = 0


class Heads(NamedTuple):
    """Sequences of a length, their heads and the width of a head; a quarter as many keys and values."""

    batch: int
    seq_len: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What is measured.

    Attributes:
      layers: forward, input gradient and weight gradient are three products each.
      heads: attention, forward and backward.
      stream_bytes: of the arrays that elementwise work reads.
      working_bytes: of all arrays that a benchmark goes through in turn, of all devices where these are simulated and
        share caches, else of one; more than caches hold, as all that a step goes through is.
      copy_bytes: of the arrays that are copied to a device and back.
      fresh_bytes: of the arrays for which a program takes memory.
      elementwise_bytes: of one array of the kinds of elementwise work that have rates of their own.
      dtypes: of products and attention; the first one gets all shapes, others every third.
    """

    layers: tuple[Layer, ...]
    heads: tuple[Heads, ...]
    stream_bytes: tuple[int, ...]
    working_bytes: int
    copy_bytes: tuple[int, ...]
    dtypes: tuple[str, ...]
    fresh_bytes: tuple[int, ...] = ()
    elementwise_bytes: tuple[int, ...] = ()


def shapes_for(backend: str, *, quick: bool) -> Shapes:
    """Shapes for a kind of device: those of a small model on a CPU, those of large ones elsewhere."""
    shapes = _CPU if backend == "cpu" else _GPU
    if not quick:
        return shapes
    # Every list begins with those that say most.
    dense = [layer for layer in shapes.layers if not layer.groups][:4]
    experts = [layer for layer in shapes.layers if layer.groups][:3]
    return replace(
        shapes,
        layers=(*dense, *experts),
        heads=shapes.heads[:3],
        stream_bytes=shapes.stream_bytes[:3],
        copy_bytes=shapes.copy_bytes[:2],
    )


def _listed(kind: type, sizes: str) -> tuple:
    """A shape for each word of `sizes`: its fields, joined by an "x"."""
    return tuple(kind(*map(int, word.split("x"))) for word in sizes.split())


_CPU = Shapes(
    layers=_listed(
        Layer,
        "64x64x128 256x128x512 512x256x256 128x512x1024 16x64x64 32x256x1024 1024x128x128 "
        "1024x512x512 256x64x4096 "
        "32x64x128x4 128x128x256x2 256x256x512x2 16x128x512x4 64x256x256x8 64x256x1024x8 512x128x128x2 "
        "128x512x256x8 512x512x512x1",
    ),
    heads=_listed(Heads, "2x64x4x32 2x256x4x32 1x256x4x64 8x32x4x16 4x128x8x32 1x1024x4x32 1x512x4x128"),
    stream_bytes=(2**15, 2**19, 2**22, 2**17, 2**21, 2**24),
    working_bytes=2**30,
    copy_bytes=(2**20, 2**23, 2**16, 2**26),
    dtypes=("float32", "bfloat16"),
    fresh_bytes=(2**26,),
    elementwise_bytes=(2**18, 2**21, 2**24),
)

_GPU = Shapes(
    layers=_listed(
        Layer,
        "512x2048x2048 4096x4096x4096 8192x4096x14336 4096x7168x2048 128x4096x4096 16384x2048x2048 "
        "8192x8192x8192 2048x1024x1024 4096x4096x65536 "
        "128x2048x1408x8 1024x4096x2048x8 2048x4096x14336x2 64x7168x2048x8 512x7168x2048x8 "
        "2048x2048x768x16 256x5120x1536x4",
    ),
    heads=_listed(
        Heads, "4x1024x16x128 1x4096x16x128 2x2048x16x64 8x512x16x128 1x8192x8x128 1x4096x16x64 1x4096x8x256"
    ),
    stream_bytes=(2**16, 2**22, 2**28, 2**14, 2**18, 2**20, 2**24, 2**26, 2**29),
    working_bytes=2**29,
    copy_bytes=(2**22, 2**28, 2**16, 2**20, 2**24, 2**30),
    dtypes=("bfloat16", "float32"),
)


def compute_tasks(shapes: Shapes, stopwatch: Stopwatch, devices: Sequence[jax.Device]) -> Iterator[Task]:
    """The benchmarks of the devices of one process."""
    sharing = len(devices) if devices[0].platform == "cpu" else 1
    bench = _Bench(stopwatch, tuple(devices), shapes.working_bytes // sharing)
    yield Task("call_seconds", "call", bench.call)
    yield Task("launch_seconds", "operations", bench.launch)
    for at, dtype in enumerate(shapes.dtypes):
        for layer in shapes.layers[:: 1 if at == 0 else 3]:
            for part in get_args(ProductPart):
                kind, shape = "experts" if layer.groups else "dense", "x".join(map(str, layer[:3]))
                label = f"{dtype} {kind} {shape} {part.replace('_', ' ')}"
                yield Task("products", label, lambda a=(layer, part, dtype): bench.product(*a))
        for heads in shapes.heads[:: 1 if at == 0 else 3]:
            label = f"{dtype} attention of {heads.seq_len} x {heads.head_dim}"
            yield Task("attention", label, lambda a=(heads, dtype): bench.attention(*a))
    if len(devices) > 1:
        dense = [layer for layer in shapes.layers if not layer.groups]
        for layer in dense[1:4]:
            yield Task(
                "alone", f"one device alone, {'x'.join(map(str, layer[:3]))}", lambda a=layer: bench.alone(a)
            )
    yield from _tasks_of_bytes(shapes, bench)


def _tasks_of_bytes(shapes: Shapes, bench: "_Bench") -> Iterator[Task]:
    """The benchmarks of what costs by the byte."""
    for size in shapes.stream_bytes:
        yield Task("streams", f"elementwise, {size:,} bytes", lambda a=size: bench.stream(a))
    for kind in BODIES:
        for size in shapes.elementwise_bytes:
            yield Task(
                "elementwise",
                f"{kind.replace('_', ' ')}, {size:,} bytes",
                lambda a=(kind, size): bench.elementwise(*a),
            )
    for size in shapes.fresh_bytes:
        yield Task("fresh", f"memory taken, {size:,} bytes", lambda a=size: bench.fresh(a))
    for size in shapes.copy_bytes:
        yield Task("copies", f"copies, {size:,} bytes", lambda a=size: bench.copy(a))


@dataclass(frozen=True)
class _Bench:
    stopwatch: Stopwatch
    devices: tuple[jax.Device, ...]
    working_bytes: int

    def call(self) -> float:
        mesh = line_of(self.devices)
        return self.stopwatch.call_seconds(looped(lambda x: x + 1, mesh), operand(mesh, (8,)))

    def launch(self) -> float:
        """Small operations in a row, none of which the compiler can put together with another."""
        mesh = line_of(self.devices)

        def body(x: jax.Array) -> jax.Array:
            for _ in range(CHAIN):
                x = lax.optimization_barrier(jnp.roll(x, 1) * 0.5)
            return x

        return self.stopwatch.seconds(looped(body, mesh), operand(mesh, (256,)), operations=CHAIN)

    def product(self, layer: Layer, part: ProductPart, dtype: str) -> list[ProductSample]:
        """One product, in the shape that rates are stated for: rows, columns, depth.

        Each has its own operands, as every layer has its own weights; those of one alone would stay in a cache.
        """
        body, operands, (m, n, k) = _product(layer, part, dtype)
        seconds = self._seconds(body, operands, self.devices, sets=self._sets(body, operands))
        return [ProductSample(m, n, k, layer.groups, dtype, part, seconds)]

    def alone(self, layer: Layer) -> list[tuple[float, float]]:
        body, operands, _ = _product(layer, "forward", "float32")
        return [
            (self._seconds(body, operands, self.devices[:1]), self._seconds(body, operands, self.devices))
        ]

    def attention(self, heads: Heads, dtype: str) -> list[AttentionSample]:
        B, S, N, H = heads
        K = max(1, N // 4)
        segment_ids = jnp.zeros((B, S), jnp.int32)

        def forward(query, key, value):
            return causal_attention(query, key, value, segment_ids)

        def both(query, key, value, dy):
            return jax.vjp(forward, query, key, value)[1](dy)

        operands = [((B, S, N, H), dtype), ((B, S, K, H), dtype), ((B, S, K, H), dtype)]
        ahead = self._seconds(forward, operands, self.devices)
        total = self._seconds(both, [*operands, ((B, S, N, H), dtype)], self.devices)
        # The causal half of the two products, of queries with keys and of weights with values.
        flop = 2.0 * B * N * S * S * H
        return [
            AttentionSample(flop, S, H, dtype, False, ahead),
            AttentionSample(flop, S, H, dtype, True, total),
        ]

    def stream(self, num_bytes: int) -> list[BytesSample]:
        """Normalises one array after the other, as many as a step goes through before it comes back to the first.

        One array alone would stay in a cache, and be several times as fast.
        """
        rows = max(1, num_bytes // (4 * STREAM_WIDTH))
        arrays = max(2, self.working_bytes // num_bytes)

        def normalise(x: jax.Array) -> jax.Array:
            return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)

        mesh = line_of(self.devices)
        stack = operand(mesh, (arrays, rows, STREAM_WIDTH))
        seconds = self.stopwatch.seconds(looped_over_stack(normalise, mesh, sets=arrays), stack)
        return [BytesSample(2.0 * 4 * rows * STREAM_WIDTH, seconds)]

    def elementwise(self, kind: str, num_bytes: int) -> list[ElementwiseSample]:
        """One of the kinds of work that have a rate of their own, on arrays that a cache has forgotten.

        Cut out of a stack, as those of `stream` are, they would be so by the kernel itself, which then computes several
        times as slowly.
        """
        body = BODIES[kind]
        operands = elementwise_operands(body, num_bytes)
        seconds = self._seconds(body.run, operands, self.devices, sets=self._sets(body.run, operands))
        return [ElementwiseSample(kind, float(body.num_arrays * num_bytes), seconds)]

    def fresh(self, num_bytes: int) -> list[BytesSample]:
        """Writes a result for which every call takes memory, on all devices at once."""
        x = operand(line_of(self.devices), (1,))
        shape = (len(self.devices), max(1, num_bytes // 4))
        fill = jax.jit(lambda x: jnp.broadcast_to(x, shape), out_shardings=x.sharding)
        taken = []
        for _ in range(2 * self.stopwatch.repeats + 1):
            start = time.perf_counter()
            jax.block_until_ready(fill(x))  # and given back
            taken.append(time.perf_counter() - start)
        return [BytesSample(4.0 * shape[1], statistics.median(taken[1:]))]

    def copy(self, num_bytes: int) -> list[BytesSample]:
        """To a device and back, half of the time each."""
        there, device = np.ones(num_bytes // 4, np.float32), self.devices[0]
        taken = []
        for _ in range(self.stopwatch.repeats + 1):
            start = time.perf_counter()
            array = jax.block_until_ready(jax.device_put(there, device))
            np.array(array, copy=True)
            taken.append((time.perf_counter() - start) / 2)
        return [BytesSample(float(num_bytes), statistics.median(taken[1:]))]

    def _sets(self, body: Body, operands: Sequence[tuple]) -> int:
        """Sets of operands with their results that are more than caches hold."""
        given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in operands]
        arrays = jax.tree.leaves((given, jax.eval_shape(body, *given)))
        size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
        return min(MOST_SETS, max(2, self.working_bytes // size))

    def _seconds(
        self, body: Body, operands: Sequence[tuple], devices: Sequence[jax.Device], *, sets: int = 1
    ) -> float:
        mesh = line_of(devices)
        arrays = (operand(mesh, shape, dtype) for shape, dtype in sets * list(operands))
        return self.stopwatch.seconds(looped(body, mesh, sets=sets), *arrays, operations=sets)


def _product(layer: Layer, part: ProductPart, dtype: str) -> tuple[Body, list[tuple], tuple[int, int, int]]:
    """The body, its operands, and (m, n, k) of one of the three products of a layer."""
    rows, d_in, d_out, groups = layer
    total, weight = rows * max(groups, 1), (groups, d_in, d_out) if groups else (d_in, d_out)
    x, w, dy = ((total, d_in), dtype), (weight, dtype), ((total, d_out), dtype)

    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        sizes = jnp.full((groups,), rows, jnp.int32)
        return grouped_matmul(x, w, sizes) if groups else x @ w

    def input_gradient(w: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: multiply(x, w), jnp.zeros(*x))[1](dy)[0]

    def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda w: multiply(x, w), jnp.zeros(*w))[1](dy)[0]

    return {
        "forward": (multiply, [x, w], (rows, d_out, d_in)),
        "input_gradient": (input_gradient, [w, dy], (rows, d_in, d_out)),
        "weight_gradient": (weight_gradient, [x, dy], (d_in, d_out, rows)),
    }[part]
