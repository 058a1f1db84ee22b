"""This file measures what devices say to each other: every collective of training, over message sizes and mesh axes.

The devices of all processes form a mesh with one axis for each level of the platform, the inner one in two parts, so
that a collective over an axis uses the links of that level only.
"""

from collections.abc import Callable, Iterator, Sequence
from math import gcd, prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh

from meshes.platform import Platform
from piperjax.planner.calibration import ExchangeSample
from piperjax.planner.network import Group
from piperjax.runtime.microbenchmarks import Task
from piperjax.runtime.stopwatch import Stopwatch, looped, operand

ITEM_BYTES = 4
COLLECTIVES = ("permute", "all_gather", "reduce_scatter", "all_reduce", "all_to_all")


class Axis(NamedTuple):
    """One axis of the mesh: its name, its size, and how many devices apart its members are."""

    name: str
    size: int
    stride: int


def axes_of(platform: Platform, num_devices: int) -> list[Axis]:
    """Axes, innermost first, for the levels of a platform that so many devices have.

    The members of an axis share an instance of its level, and none of the levels within. The innermost axis is cut in
    two where it can be, so that groups of several sizes are measured on the same links.
    """
    sizes, inner = [], 1
    for link in platform.links:
        block = num_devices if num_devices <= link.devices else gcd(num_devices, link.devices)
        if block > inner:
            sizes.append(block // inner)
            inner = block
    if inner < num_devices:
        raise ValueError(
            f"platform '{platform.name}' joins at most {inner} of the {num_devices} devices; name a platform whose "
            "links reach all of them"
        )
    if sizes and sizes[0] > 2 and sizes[0] % 2 == 0:
        sizes[:1] = [2, sizes[0] // 2]
    axes, stride = [], 1
    for number, size in enumerate(sizes):
        axes.append(Axis(f"level{number}", size, stride))
        stride *= size
    return axes


def exchange_sizes(*, quick: bool, backend: str) -> tuple[int, ...]:
    """Bytes of the messages that are measured."""
    if backend == "cpu":
        # The largest are more than the caches of a host hold, as are the gradients of a step.
        return (2**12, 2**23) if quick else (2**8, 2**12, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24)
    return (2**14, 2**26) if quick else (2**10, 2**14, 2**18, 2**20, 2**22, 2**24, 2**26, 2**28)


def exchange_tasks(
    platform: Platform, sizes: Sequence[int], stopwatch: Stopwatch, devices: Sequence[jax.Device]
) -> Iterator[Task]:
    """The benchmarks of the devices of all processes, in the order of `build_mesh`."""
    axes = axes_of(platform, len(devices))
    if not axes:
        return
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    # A mesh is written outermost first.
    shape = tuple(axis.size for axis in reversed(axes))
    names = tuple(axis.name for axis in reversed(axes))
    mesh = Mesh(np.asarray(ordered).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))
    # Groups of consecutive devices of every size, and the members of the outermost level that are furthest apart.
    over = [axes[: number + 1] for number in range(len(axes))] + ([axes[-1:]] if len(axes) > 1 else [])
    for chosen in over:
        for name in COLLECTIVES:
            for size in sizes:
                yield _task(name, chosen, size, mesh, stopwatch)
    if len(axes) > 1:
        for size in sizes:
            yield _task("hierarchical", axes, size, mesh, stopwatch)


def _task(name: str, axes: Sequence[Axis], num_bytes: int, mesh: Mesh, stopwatch: Stopwatch) -> Task:
    size = prod(axis.size for axis in axes)
    rows = max(1, num_bytes // ITEM_BYTES // size)
    whole = ITEM_BYTES * rows * size
    if name == "hierarchical":
        groups = tuple(Group(axis.size, axis.stride, mesh.size) for axis in axes)
    else:
        groups = (Group(size, axes[0].stride, mesh.size),)

    def run() -> list[ExchangeSample]:
        body = _body(name, axes, size)
        shape = {"all_gather": (rows,), "permute": (rows * size,)}.get(name, (size, rows))
        seconds = stopwatch.seconds(looped(body, mesh), operand(mesh, shape))
        return [ExchangeSample(name, groups, float(whole), seconds)]

    return Task("exchanges", f"{name} of {whole:,} bytes over {size}", run)


def _body(name: str, axes: Sequence[Axis], size: int) -> Callable[[jax.Array], jax.Array]:
    names = tuple(axis.name for axis in reversed(axes))
    flat = names if len(names) > 1 else names[0]
    ring = [(source, (source + 1) % size) for source in range(size)]

    def hierarchical(x: jax.Array) -> jax.Array:
        # [outer, ..., inner, rows]: each phase exchanges one of the leading dimensions.
        x = jnp.reshape(x, (*(axis.size for axis in reversed(axes)), -1))
        for number, axis in enumerate(axes):
            dimension = len(axes) - 1 - number
            x = lax.all_to_all(x, axis.name, dimension, dimension, tiled=True)
        return x

    bodies = {
        "permute": lambda x: lax.ppermute(x, flat, ring),
        "all_gather": lambda x: lax.all_gather(x, flat, tiled=True),
        "reduce_scatter": lambda x: lax.psum_scatter(x, flat, scatter_dimension=0, tiled=True),
        "all_reduce": lambda x: lax.psum(x, flat),
        "all_to_all": lambda x: lax.all_to_all(x, flat, 0, 0, tiled=True),
        "hierarchical": hierarchical,
    }
    return bodies[name]
