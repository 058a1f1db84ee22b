"""Expert dispatch: rows travel to the devices that hold their experts, and results travel back.

Every permutation is a gather in both directions: no scatter, so it is fast on ROCm and gives the same bits from
run to run. Shapes are static. Dropless buffers hold the worst case, so no row is ever lost; with a capacity
factor they hold that much more than the balanced number of rows per expert, and what overflows is counted.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from piperjax.runtime.permute import combine_rows, permute_rows, sort_by_group, spread_rows

ExpertFFN = Callable[[jax.Array, jax.Array], jax.Array]
Experts = Callable[[ExpertFFN, jax.Array, jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


class Routes(NamedTuple):
    """Per device: where every copy of every token goes. R send places in all.

    Attributes:
      source: token of every send place [R].
      slot: which of the token's k copies a send place holds [R].
      live: whether a send place holds a copy [R].
      places: send place of every copy [T, k].
      kept: whether a copy got a place [T, k].
      sizes: copies with a place, per physical expert [E].
      dropped: copies without.
    """

    source: jax.Array
    slot: jax.Array
    live: jax.Array
    places: jax.Array
    kept: jax.Array
    sizes: jax.Array
    dropped: jax.Array


@dataclass(frozen=True, kw_only=True)
class Dispatcher:
    """A way to exchange rows between the devices of the expert axes.

    Attributes:
      name: what the plan calls it.
      exchange: `(rows [P, C, D], axes) -> rows [P, C, D]`: block p goes to device p; its own inverse.
    """

    name: str
    exchange: Callable[[jax.Array, tuple[str, ...]], jax.Array]


def _flat_exchange(rows: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.all_to_all(rows, axes, split_axis=0, concat_axis=0, tiled=True)


FLAT = Dispatcher(name="flat", exchange=_flat_exchange)
DISPATCHERS = {dispatcher.name: dispatcher for dispatcher in (FLAT,)}


def make_experts(
    dispatch: str,
    axes: tuple[str, ...],
    capacity_factor: float,
    *,
    physical_of_logical: tuple[int, ...] | None = None,
) -> Experts:
    """Returns the `experts` function of a layer context.

    Args:
      dispatch: name of the dispatcher.
      axes: mesh axes that share the experts, outermost first.
      capacity_factor: rows per (device, expert) over the balanced T k / E; 0 means dropless.
      physical_of_logical: place of every expert; device p holds physical experts p E/P to (p + 1) E/P - 1.

    Raises:
      ValueError: if there is no such dispatcher.
    """
    if dispatch not in DISPATCHERS:
        near = difflib.get_close_matches(dispatch, DISPATCHERS, n=1, cutoff=0.0)
        raise ValueError(
            f"no dispatcher named {dispatch!r}; there are {', '.join(DISPATCHERS)}; did you mean {near[0]!r}?"
        )
    exchange = DISPATCHERS[dispatch].exchange

    def experts(expert_ffn, x, expert_ids, gates, num_experts):
        if physical_of_logical is not None:
            expert_ids = jnp.asarray(np.array(physical_of_logical, np.int32))[expert_ids]
        num_devices = math.prod(lax.axis_size(axis) for axis in axes)
        if num_devices == 1 and not capacity_factor:
            return _local(expert_ffn, x, expert_ids, gates, num_experts)
        routes, capacity = _routes(expert_ids, num_experts, num_devices, capacity_factor)
        sent = spread_rows(x, routes.source, routes.places, routes.kept).reshape(num_devices, capacity, -1)
        sizes = routes.sizes.reshape(num_devices, -1)
        if num_devices > 1:
            sent, sizes = exchange(sent, axes), exchange(sizes, axes)
        results = _apply(expert_ffn, sent, sizes, _starts(sizes, num_experts, capacity, capacity_factor))
        if num_devices > 1:
            results = exchange(results, axes)
        y = combine_rows(
            results.reshape(num_devices * capacity, -1),
            gates,
            routes.source,
            routes.slot,
            routes.places,
            routes.kept,
            routes.live,
        )
        return y, routes.dropped

    return experts


def _local(expert_ffn, x, expert_ids, gates, num_experts):
    """All experts are here: T k rows, no padding, nothing dropped."""
    T, k = expert_ids.shape
    order, place, sizes = sort_by_group(expert_ids.reshape(T * k), num_experts)
    source, slot, places = order // k, order % k, place.reshape(T, k)
    everything = jnp.ones((T, k), bool)
    rows = expert_ffn(spread_rows(x, source, places, everything), sizes)
    y = combine_rows(rows, gates, source, slot, places, everything, jnp.ones(T * k, bool))
    return y, jnp.zeros((), jnp.float32)


def _routes(
    expert_ids: jax.Array, num_experts: int, num_devices: int, capacity_factor: float
) -> tuple[Routes, int]:
    """Places every copy in the send buffer `[num_devices, capacity]`, and says what the capacity is."""
    T, k = expert_ids.shape
    here = num_experts // num_devices
    flat = expert_ids.reshape(T * k)
    order, place, counts = sort_by_group(flat, num_experts)
    if capacity_factor:
        per_expert = math.ceil(capacity_factor * T * k / num_experts)
        capacity = per_expert * here
        sizes = jnp.minimum(counts, per_expert)
    else:
        # A token's k experts are distinct, so at most min(k, here) of its copies go to one device.
        per_expert, capacity, sizes = 0, T * min(k, here), counts
    starts = _starts(sizes.reshape(num_devices, here), num_experts, capacity, capacity_factor).reshape(-1)
    firsts = jnp.cumsum(counts) - counts
    rank = place - firsts[flat]
    kept = rank < sizes[flat]
    places = jnp.where(kept, flat // here * capacity + starts[flat] + rank, 0)
    # The inverse: which copy a send place holds.
    column = lax.iota(jnp.int32, capacity)
    table = starts.reshape(num_devices, here)
    expert = (column[None, :, None] >= table[:, None, :]).sum(2, dtype=jnp.int32) - 1
    expert = expert + here * lax.iota(jnp.int32, num_devices)[:, None]
    within = column[None, :] - starts[expert]
    live = within < sizes[expert]
    copy = order[jnp.where(live, firsts[expert] + within, 0)].reshape(-1)
    dropped = (counts - sizes).sum().astype(jnp.float32)
    routes = Routes(copy // k, copy % k, live.reshape(-1), places.reshape(T, k), kept.reshape(T, k), sizes, dropped)
    return routes, capacity


def _starts(sizes: jax.Array, num_experts: int, capacity: int, capacity_factor: float) -> jax.Array:
    """First column of each expert's rows in a buffer [devices, capacity]: [devices, experts of one device].

    Dropless, experts follow each other without gaps; with a capacity factor each has its own equal share.
    """
    if not capacity_factor:
        return jnp.cumsum(sizes, axis=1) - sizes
    here = sizes.shape[1]
    return jnp.broadcast_to(lax.iota(jnp.int32, here) * (capacity // here), sizes.shape)


def _apply(expert_ffn: ExpertFFN, received: jax.Array, sizes: jax.Array, starts: jax.Array) -> jax.Array:
    """Groups the received rows [P, C, D] by expert, applies the experts, and undoes the grouping."""
    P, C, D = received.shape
    column = lax.iota(jnp.int32, C)[None, :]
    expert = (column[..., None] >= starts[:, None, :]).sum(2, dtype=jnp.int32) - 1
    within = column - jnp.take_along_axis(starts, expert, axis=1)
    live = within < jnp.take_along_axis(sizes, expert, axis=1)
    group = jnp.where(live, expert, sizes.shape[1]).reshape(-1)
    order, place, _ = sort_by_group(group, sizes.shape[1])
    grouped = permute_rows(received.reshape(P * C, D), order, place)
    results = expert_ffn(grouped, sizes.sum(0, dtype=jnp.int32))
    return permute_rows(results, place, order).reshape(P, C, -1)
