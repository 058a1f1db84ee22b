"""Permutations of rows as gathers, forward and backward: nothing here compiles to a scatter.

The gradient of a gather is a scatter-add, slow on ROCm and different from run to run. But who places rows knows
where each of them went, so the gradient can be a gather too.

A buffer of static size has dead places, which hold no row. What is in them is read and never used.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.runtime.varying import vary_like

# What dead places are filled with. None leaves whatever was convenient, and zeros in gradients; tests set NaN and
# see that nothing changes.
DEAD_FILL: float | None = None


class Order(NamedTuple):
    """N rows ordered by group, earlier rows first within a group. Index arrays are int32.

    Attributes:
      row: the row at every place [N].
      place: the place of every row [N].
      bounds: first place of every group, and the end of the last [G + 1].
    """

    row: jax.Array
    place: jax.Array
    bounds: jax.Array


def order_by_group(groups: jax.Array, num_groups: int) -> Order:
    """Orders rows by group [N] int32; rows of group `num_groups` come last and have no bounds.

    One sort of N keys; the rest is binary search in them. On CPU that beats a second sort, a cumulative sum of
    one-hot rows and a comparison of all with all at N = 1,024 with 8 groups as well as at 32,768 with 256.

    Raises:
      ValueError: if group and row do not fit into one int32 key.
    """
    N = groups.shape[0]
    bits = max(N - 1, 1).bit_length()
    if (num_groups + 1) << bits > 2**31:
        raise ValueError(
            f"rows x groups must stay below 2**31 to be sorted as int32, got {N} rows on one device for "
            f"{num_groups} groups; use more microbatches"
        )
    keys = (groups << bits) | lax.iota(jnp.int32, N)
    ordered = lax.sort(keys)
    bounds = count_below(ordered, lax.iota(jnp.int32, num_groups + 1) << bits)
    return Order(ordered & ((1 << bits) - 1), count_below(ordered, keys), bounds)


def count_below(ordered: jax.Array, queries: jax.Array) -> jax.Array:
    """How many of the ordered numbers [N] are less than each query [M]: [M] int32, by binary search."""
    # A GPU launches every step of a loop by itself; unrolled, all steps are one kernel.
    return lax.platform_dependent(ordered, queries, cpu=_search_in_a_loop, default=_search_unrolled)


def _search_in_a_loop(ordered, queries):
    steps = ordered.shape[0].bit_length()

    def step(number, position):
        return _advance(ordered, queries, position, jnp.int32(1) << (steps - 1 - number))

    position = vary_like(jnp.zeros_like(queries), ordered, queries)
    return lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, position)


def _search_unrolled(ordered, queries):
    position = jnp.zeros_like(queries)
    for step in reversed(range(ordered.shape[0].bit_length())):
        position = _advance(ordered, queries, position, 1 << step)
    return position


def _advance(ordered, queries, position, stride):
    """Moves each position on by `stride` where all numbers up to there are below its query."""
    N = ordered.shape[0]
    ahead = position + stride
    last = take(ordered, jnp.minimum(ahead, N) - 1)
    return jnp.where((ahead <= N) & (last < queries), ahead, position)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[index]` along the first dimension, for indices known to be inside."""
    return x.at[index].get(mode="promise_in_bounds")


class Places(NamedTuple):
    """Where the k copies of T tokens are in a buffer of R places, said from both ends.

    Attributes:
      copies: the copy t k + j at every place [R]; at a dead place any.
      live: whether a place holds a copy [R] bool; None if all do.
      places: the place of every copy [T, k]; of one that has none, any.
      kept: whether a copy has a place [T, k] bool; None if all have.
    """

    copies: jax.Array
    live: jax.Array | None
    places: jax.Array
    kept: jax.Array | None


@jax.custom_vjp
def spread_rows(x: jax.Array, where: Places) -> jax.Array:
    """Copies tokens [T, D] to their places: [R, D]. The gradient of a token is the sum over its copies."""
    return _spread(x, where)


def _spread(x, where):
    return _fill(take(x, where.copies // where.places.shape[1]), where.live)


def _collect(rows, where):
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    # One gather per slot, added up while gathering: three times faster on CPU than a sum over [T, k, D].
    return sum(slot.astype(wide) for slot in _take_slots(rows, where)).astype(rows.dtype)


spread_rows.defvjp(lambda x, where: (_spread(x, where), where), lambda where, dy: (_collect(dy, where), None))


@jax.custom_vjp
def collect_rows(rows: jax.Array, where: Places) -> jax.Array:
    """Adds up the rows [R, D] of each token's copies in at least float32: [T, D], the transpose of `spread_rows`."""
    return _collect(rows, where)


collect_rows.defvjp(
    lambda rows, where: (_collect(rows, where), where),
    lambda where, dy: (_clear(_spread(dy, where), where.live), None),
)


@jax.custom_vjp
def spread_gates(gates: jax.Array, where: Places) -> jax.Array:
    """The gate of the copy at every place, from those of all copies [T, k]: [R]."""
    return _spread_gates(gates, where)


def _spread_gates(gates, where):
    return _fill(take(gates.reshape(-1), where.copies)[:, None], where.live)[:, 0]


def _spread_gates_backward(where, dgates):
    of_copies = take(dgates, where.places)
    if where.kept is not None:
        of_copies = jnp.where(where.kept, of_copies, jnp.zeros((), of_copies.dtype))
    return of_copies, None


spread_gates.defvjp(lambda gates, where: (_spread_gates(gates, where), where), _spread_gates_backward)


class Exchange(NamedTuple):
    """A one-to-one relation between the live places of two buffers of R places.

    Attributes:
      source: for each place of the second buffer, its place in the first [R]; of a dead one, any.
      target: for each place of the first buffer, its place in the second [R]; of a dead one, any.
      live_source: whether a place of the first buffer holds a row [R] bool.
      live_target: whether a place of the second buffer holds a row [R] bool.
    """

    source: jax.Array
    target: jax.Array
    live_source: jax.Array
    live_target: jax.Array

    def reversed(self) -> "Exchange":
        """The same relation, from the second buffer to the first."""
        return Exchange(self.target, self.source, self.live_target, self.live_source)


@jax.custom_vjp
def move_rows(x: jax.Array, exchange: Exchange) -> jax.Array:
    """Moves the live rows of the first buffer [R, D] to their places in the second; dead rows get no gradient."""
    return _fill(take(x, exchange.source), exchange.live_target)


def _move_backward(exchange, dy):
    return _clear(take(dy, exchange.target), exchange.live_source), None


move_rows.defvjp(lambda x, exchange: (move_rows(x, exchange), exchange), _move_backward)


def _take_slots(rows: jax.Array, where: Places) -> list[jax.Array]:
    """The row of each token's j-th copy [T, D], for every j; zero without a place."""
    slots = [take(rows, where.places[:, j]) for j in range(where.places.shape[1])]
    if where.kept is None:
        return slots
    return [
        jnp.where(where.kept[:, j, None], slot, jnp.zeros((), slot.dtype)) for j, slot in enumerate(slots)
    ]


def _fill(rows: jax.Array, live: jax.Array | None) -> jax.Array:
    return rows if DEAD_FILL is None else _clear(rows, live)


def _clear(rows: jax.Array, live: jax.Array | None) -> jax.Array:
    """Zeros in dead places: the exact gradient of a row that nobody reads."""
    if live is None:
        return rows
    return jnp.where(live[:, None], rows, jnp.asarray(DEAD_FILL or 0, rows.dtype))
