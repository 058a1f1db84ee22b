"""This file takes times: seconds of one operation among many in a loop on the devices, without the cost of the call."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from piperjax.runtime.varying import vary

DEVICE = "device"
MOST_ROUNDS = 32_768
Body = Callable[..., jax.Array]
Program = Callable[..., jax.Array]


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """How times are taken.

    Attributes:
      repeats: times that are taken of everything; the median counts.
      target_seconds: about the length of one of them; a loop runs as often as that allows, and twice at least.
      agree: makes all processes use one number, as loops with collectives in them must.
    """

    repeats: int = 5
    target_seconds: float = 0.02
    agree: Callable[[int], int] = int

    def seconds(self, program: Program, *operands: Any, operations: int = 1) -> float:
        """Seconds of one operation of a program.

        The program takes the number of rounds and the operands, and every round has `operations`. What a call costs
        beside its rounds is the time of a single round, and is taken off.
        """
        self._once(program, 1, operands)
        rounds = self._rounds(program, operands)
        taken = []
        for _ in range(self.repeats):
            short = self._once(program, 1, operands)
            long = self._once(program, 1 + rounds, operands)
            # Where the difference is lost in the scatter of calls, it is no more than all of it.
            taken.append((long - short) / rounds if long > short else long / (1 + rounds))
        return statistics.median(taken) / operations

    def call_seconds(self, program: Program, *operands: Any) -> float:
        """Seconds of a call of a program with a single round."""
        self._once(program, 1, operands)
        return statistics.median(self._once(program, 1, operands) for _ in range(4 * self.repeats))

    def _rounds(self, program: Program, operands: Sequence[Any]) -> int:
        """Rounds that take about as long as wanted: more and more of them until the call is no longer what counts."""
        single = min(self._once(program, 1, operands) for _ in range(2))
        rounds, taken = 2, 0.0
        while rounds < MOST_ROUNDS:
            taken = self._once(program, 1 + rounds, operands) - single
            if self.agree(int(taken > self.target_seconds / 4)):
                break
            rounds *= 4
        scale = self.target_seconds / taken if taken > 0 else 1.0
        return self.agree(int(np.clip(rounds * scale, 2, MOST_ROUNDS)))

    @staticmethod
    def _once(program: Program, rounds: int, operands: Sequence[Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(np.int32(rounds), *operands))
        return time.perf_counter() - start


def line_of(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of one axis, `DEVICE`."""
    return Mesh(np.asarray(devices), (DEVICE,), axis_types=(AxisType.Auto,))


def looped(body: Body, mesh: Mesh, *, sets: int | None = None) -> Program:
    """Returns the program that runs `body` again and again on every device of a mesh.

    `body` is per device: it takes the operands and returns an array. Every round waits for the one before: an element
    of its result is added, times nothing, to the first operand. The program takes the number of rounds and operands
    [devices, ...] as `operand` makes them.

    Args:
      body: what is timed.
      mesh: devices that run it at once.
      sets: rounds take turns between so many sets of operands, two or more, which are [devices, sets, ...] then; None
        for a single set without that dimension, which stays in a cache if it fits there.
    """
    axes = mesh.axis_names

    def per_device(rounds: jax.Array, *operands: jax.Array) -> jax.Array:
        own = tuple(operand[(0,) * len(axes)] for operand in operands)

        def again(_, first):
            return _touch(first, lax.optimization_barrier(body(first, *own[1:])), axes)

        def again_in_turns(number, wait):
            # `wait` is 0, which is known when the round before is done. The operands are not carried, so not copied.
            turn = ((number + wait) % sets).astype(jnp.int32)
            picked = (lax.dynamic_index_in_dim(stack, turn, keepdims=False) for stack in own)
            return _touch(wait, lax.optimization_barrier(body(*picked)), axes)

        if sets is None:
            last = lax.fori_loop(jnp.int32(0), rounds, again, own[0])
        else:
            last = lax.fori_loop(jnp.int32(0), rounds, again_in_turns, vary(jnp.zeros((), jnp.int32), axes))
        return jnp.reshape(jnp.ravel(last)[0], (1,) * len(axes))

    spec = P(*axes)

    def program(rounds: jax.Array, *operands: jax.Array) -> jax.Array:
        specs = (P(), *(spec for _ in operands))
        return jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=spec)(rounds, *operands)

    return jax.jit(program)


def _touch(x: jax.Array, result: jax.Array, axes: Sequence[str]) -> jax.Array:
    """`x`, but not before `result` is there."""
    element = vary((0 * jnp.ravel(result)[0]).astype(x.dtype), axes)
    origin = (0,) * x.ndim
    return lax.dynamic_update_slice(x, jnp.reshape(x[origin] + element, (1,) * x.ndim), origin)


def operand(mesh: Mesh, shape: Sequence[int], dtype: str = "float32") -> jax.Array:
    """An array of `shape` on every device of the mesh: small numbers of both signs, made where they are needed."""
    axes = mesh.axis_names
    sharding = NamedSharding(mesh, P(*axes))

    def fill() -> jax.Array:
        size = int(np.prod(shape))
        values = jnp.reshape((jnp.arange(size) % 31 - 15) / 64, shape).astype(dtype)
        return jnp.broadcast_to(values, (*mesh.devices.shape, *shape))

    return jax.jit(fill, out_shardings=sharding)()
