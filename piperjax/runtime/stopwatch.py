"""This file takes times: seconds of one operation among many in a loop on the devices, without the cost of the call."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
Body = Callable[..., Any]
Program = Callable[..., jax.Array]


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """How times are taken.

    Attributes:
      repeats: times that are taken of everything; the median counts.
      target_seconds: about the length of one of them; a loop runs as often as that allows.
      agree: makes all processes use one number, as loops with collectives in them must.
    """

    repeats: int = 5
    target_seconds: float = 0.02
    agree: Callable[[int], int] = int

    def seconds(self, program: Program, *operands: Any, operations: int = 1) -> float:
        """Seconds of one operation of a program.

        The program takes the number of rounds and the operands, and every round has `operations`. What a call costs
        beside its rounds is the time of a single round, or of none where a round is many operations, and is taken off.
        """
        least = 0 if operations > 1 else 1
        self._once(program, 1, operands)
        rounds = self._rounds(program, operands, least)
        taken = []
        for _ in range(self.repeats):
            short = self._once(program, least, operands)
            long = self._once(program, least + rounds, operands)
            # Where the difference is lost in the scatter of calls, it is no more than all of it.
            taken.append((long - short) / rounds if long > short else long / (least + rounds))
        return statistics.median(taken) / operations

    def call_seconds(self, program: Program, *operands: Any) -> float:
        """Seconds of a call of a program with a single round."""
        self._once(program, 1, operands)
        return statistics.median(self._once(program, 1, operands) for _ in range(4 * self.repeats))

    def _rounds(self, program: Program, operands: Sequence[Any], least: int) -> int:
        """Rounds that take about as long as wanted: more and more of them until the call is no longer what counts."""
        short = min(self._once(program, least, operands) for _ in range(2))
        fewest = rounds = 1 + least
        taken = 0.0
        while rounds < MOST_ROUNDS:
            taken = self._once(program, least + rounds, operands) - short
            if self.agree(int(taken > self.target_seconds / 4)):
                break
            rounds *= 4
        scale = self.target_seconds / taken if taken > 0 else 1.0
        return self.agree(int(np.clip(rounds * scale, fewest, MOST_ROUNDS)))

    @staticmethod
    def _once(program: Program, rounds: int, operands: Sequence[Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(np.int32(rounds), *operands))
        return time.perf_counter() - start


def line_of(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of one axis, `DEVICE`."""
    return Mesh(np.asarray(devices), (DEVICE,), axis_types=(AxisType.Auto,))


def looped(body: Body, mesh: Mesh, *, sets: int = 1) -> Program:
    """Returns the program that runs `body` again and again on every device of a mesh.

    `body` is per device: it takes the operands and returns arrays. A compiler leaves out what nobody reads, and may
    compute twice, or copy, what a round reads of the one before: results are carried on whole, and read after the last
    round only. What a round works on depends on its number, so that nothing is computed once for all of them. The
    program takes the number of rounds and operands [devices, ...] as `operand` makes them.

    Args:
      body: what is timed.
      mesh: devices that run it at once.
      sets: sets of operands that a round goes through one after the other; the program takes those of the first, then
        those of the second, and so on. A single set stays in a cache if it fits there.
    """

    def run(number, carry, own):
        firsts, results, corner = [], [], number.astype(jnp.float32)
        for first, operands in zip(carry[0], _groups(own, sets), strict=True):
            firsts.append(_touch(first, corner))
            results.append(body(firsts[-1], *operands[1:]))
            corner = _corner(results[-1])  # The next set waits for it.
        return firsts, results

    def begin(own):
        groups = _groups(own, sets)
        return [first for first, *_ in groups], [jax.eval_shape(body, *group) for group in groups]

    return _program(mesh, run, begin)


def looped_over_stack(body: Body, mesh: Mesh, *, sets: int) -> Program:
    """The same where rounds take turns between many sets of operands, [devices, sets, ...] each.

    They are cut out of the stack, by a copy or within the kernel that reads them.
    """

    def run(number, carry, own):
        # The operands are not carried, so not copied.
        picked = (lax.dynamic_index_in_dim(stack, number % sets, keepdims=False) for stack in own)
        return carry[0], body(*picked)

    def begin(own):
        return jnp.zeros((), jnp.int32), jax.eval_shape(body, *(stack[0] for stack in own))

    return _program(mesh, run, begin)


def _program(mesh: Mesh, run: Callable, begin: Callable) -> Program:
    """The loop: `run` makes (what changes, results) from the round, those before and the operands of a device.

    `begin` says what changes at first, and what results look like.
    """
    axes = mesh.axis_names

    def per_device(rounds: jax.Array, *operands: jax.Array) -> jax.Array:
        own = tuple(operand[(0,) * len(axes)] for operand in operands)
        first, shapes = begin(own)
        nothing = jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), shapes)
        first, results = lax.fori_loop(
            jnp.int32(0),
            rounds,
            lambda number, carry: vary(run(number, carry, own), axes),
            vary((first, nothing), axes),
        )
        last = sum(jnp.ravel(x)[0] for x in jax.tree.leaves(first))
        last = last + sum(0 * jnp.sum(result) for result in jax.tree.leaves(results))
        return jnp.reshape(last, (1,) * len(axes))

    spec = P(*axes)

    def program(rounds: jax.Array, *operands: jax.Array) -> jax.Array:
        specs = (P(), *(spec for _ in operands))
        return jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=spec)(rounds, *operands)

    return jax.jit(program)


def _groups(own: Sequence[jax.Array], sets: int) -> list[Sequence[jax.Array]]:
    each = len(own) // sets
    return [own[at : at + each] for at in range(0, len(own), each)]


def _corner(results: Any) -> jax.Array:
    first = jax.tree.leaves(results)[0]
    return first[(0,) * first.ndim].astype(jnp.float32)


def _touch(x: jax.Array, number: jax.Array) -> jax.Array:
    """`x`, with an element to which a number, float32, is added, times nothing."""
    origin = (0,) * x.ndim
    nothing = (0 * number).astype(x.dtype)
    return lax.dynamic_update_slice(x, jnp.reshape(x[origin] + nothing, (1,) * x.ndim), origin)


def operand(mesh: Mesh, shape: Sequence[int], dtype: str = "float32") -> jax.Array:
    """An array of `shape` on every device of the mesh: small numbers of both signs, made where they are needed."""
    return _filling(mesh, tuple(shape), dtype)()


@lru_cache(maxsize=64)
def _filling(mesh: Mesh, shape: tuple[int, ...], dtype: str) -> Callable[[], jax.Array]:
    """The program that makes an operand; every set has one of that shape."""
    sharding = NamedSharding(mesh, P(*mesh.axis_names))

    def fill() -> jax.Array:
        size = int(np.prod(shape))
        values = jnp.reshape((jnp.arange(size) % 31 - 15) / 64, shape).astype(dtype)
        return jnp.broadcast_to(values, (*mesh.devices.shape, *shape))

    return jax.jit(fill, out_shardings=sharding)
