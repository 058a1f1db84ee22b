"""Expert dispatch: rows travel to the devices that hold their experts, and results travel back.

Shapes are static and every permutation is a gather in both directions. Dropless buffers hold the worst case, so
no row is ever lost; with a capacity factor they hold that many times the balanced number of rows, and what does
not fit is dropped and counted.

    tokens [T, D] -spread-> [P C, D] -all_to_all-> [P C, D] -move-> grouped by expert -experts-> and all the way back
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from piperjax.runtime.permute import (
    Exchange,
    Places,
    combine_rows,
    count_below,
    move_rows,
    order_by_group,
    spread_rows,
    take,
)
from piperjax.runtime.varying import vary, vary_like

# What the memory mode "named" keeps: rows as they reach their experts, and as they come back.
DISPATCHED, COMBINED = "dispatched", "combined"

ExpertFFN = Callable[[jax.Array, jax.Array], jax.Array]
Experts = Callable[[ExpertFFN, jax.Array, jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True, kw_only=True)
class Dispatcher:
    """A way to bring rows to their experts and results back.

    Attributes:
      name: what a plan calls it.
      apply: per device: (expert_ffn, x [T, D], expert_ids [T, k] of physical experts, gates [T, k], num_experts,
        *, axes, capacity_factor) -> (y [T, D], rows dropped here).
    """

    name: str
    apply: Callable[..., tuple[jax.Array, jax.Array]]


def make_experts(
    dispatch: str,
    axes: tuple[str, ...],
    capacity_factor: float,
    physical_of_logical: Sequence[int] | None = None,
) -> Experts:
    """Returns the `experts` function of a layer context, which runs per device.

    It takes (expert_ffn, x [T, D], expert_ids [T, k] int32, gates [T, k], num_experts), where the k experts of a
    token are distinct, and returns (y [T, D], number of rows dropped here as a float32 scalar).

    Args:
      dispatch: name of a dispatcher.
      axes: mesh axes whose devices share the experts, outermost first. Device p of P along them holds physical
        experts p E/P to (p + 1) E/P - 1.
      capacity_factor: rows that a device accepts from another, over the balanced T k / P; 0 drops nothing.
      physical_of_logical: the physical expert of every logical one [E]; None if they are the same.

    Raises:
      ValueError: if there is no such dispatcher, or an argument makes no sense.
    """
    if dispatch not in DISPATCHERS:
        near = difflib.get_close_matches(dispatch, DISPATCHERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"no dispatcher named {dispatch!r}; there are {', '.join(DISPATCHERS)}; did you mean {near!r}?"
        )
    if not 0 <= capacity_factor < math.inf:
        raise ValueError(
            f"capacity_factor must be 0 (drop nothing) or a positive number, got {capacity_factor}"
        )
    table = None
    if physical_of_logical is not None:
        table = np.asarray(physical_of_logical, np.int32)
        if table.ndim != 1 or not np.array_equal(np.sort(table), np.arange(table.size)):
            raise ValueError(
                "physical_of_logical must hold every physical expert 0 to E-1 once, got "
                f"{np.array2string(table, threshold=16)}"
            )

    def experts(expert_ffn, x, expert_ids, gates, num_experts):
        expert_ids = expert_ids.astype(jnp.int32)
        if table is not None:
            if table.size != num_experts:
                raise ValueError(
                    f"physical_of_logical must place the {num_experts} experts of the model, got {table.size}"
                )
            expert_ids = take(jnp.asarray(table), expert_ids)
        return DISPATCHERS[dispatch].apply(
            expert_ffn, x, expert_ids, gates, num_experts, axes=axes, capacity_factor=capacity_factor
        )

    return experts


def _flat(expert_ffn, x, expert_ids, gates, num_experts, *, axes, capacity_factor):
    """Per device: one all_to_all of rows over all expert axes at once, and one back.

    Sends P C rows each way, with C = T min(k, E / P), the most that can meet at a device, or
    C = ceil(capacity_factor T k / P).
    """
    axes = tuple(axis for axis in axes if lax.axis_size(axis) > 1)
    num_devices = math.prod(lax.axis_size(axis) for axis in axes)
    if num_experts % num_devices:
        raise ValueError(
            f"the experts must divide evenly over the devices of the expert axes, got {num_experts} experts on "
            f"{num_devices} devices"
        )
    # Alike in their types, as the hand-written gradients of the permutations expect.
    x, expert_ids, gates = (vary(vary_like(a, x, expert_ids, gates), axes) for a in (x, expert_ids, gates))
    where, sizes = place_rows(
        expert_ids, num_experts=num_experts, num_devices=num_devices, capacity_factor=capacity_factor
    )
    sent = spread_rows(x, where)
    if num_devices == 1:
        results = expert_ffn(checkpoint_name(sent, DISPATCHED), sizes)
    else:
        sizes = lax.all_to_all(sizes, axes, 0, 0, tiled=True).reshape(num_devices, -1)
        sizes = checkpoint_name(sizes, DISPATCHED)
        received = checkpoint_name(lax.all_to_all(sent, axes, 0, 0, tiled=True), DISPATCHED)
        exchange = group_received(sizes, num_rows=received.shape[0])
        grouped = move_rows(received, exchange)
        results = expert_ffn(grouped, sizes.sum(0, dtype=jnp.int32))
        results = lax.all_to_all(move_rows(results, exchange.reversed()), axes, 0, 0, tiled=True)
    results = checkpoint_name(results, COMBINED)
    dropped = jnp.zeros((), jnp.float32) if where.kept is None else (~where.kept).sum(dtype=jnp.float32)
    return combine_rows(results, gates, where), vary_like(dropped, x)


FLAT = Dispatcher(name="flat", apply=_flat)
DISPATCHERS = {dispatcher.name: dispatcher for dispatcher in (FLAT,)}


def row_capacity(
    num_tokens: int, k: int, *, num_experts: int, num_devices: int, capacity_factor: float
) -> int:
    """Rows C that one device may send to another in one layer: no more than it can need, if dropless all of it."""
    most = num_tokens * min(k, num_experts // num_devices)
    return min(most, math.ceil(capacity_factor * num_tokens * k / num_devices)) if capacity_factor else most


def place_rows(
    expert_ids: jax.Array, *, num_experts: int, num_devices: int, capacity_factor: float
) -> tuple[Places, jax.Array]:
    """Per device: places the copies of T tokens in a send buffer [P C], by device, then expert, then token.

    What a device has no room for is left out, later tokens first. Returns the places, and how many rows go to each
    expert [E].
    """
    T, k = expert_ids.shape
    N, P, here = T * k, num_devices, num_experts // num_devices
    C = row_capacity(T, k, num_experts=num_experts, num_devices=P, capacity_factor=capacity_factor)
    experts = expert_ids.reshape(N)
    kept = None
    if T * min(k, here) > C:
        kept = _first_arrivals(experts // here, num_devices=P, capacity=C)
        experts = jnp.where(kept, experts, num_experts)
    order = order_by_group(experts, num_experts)
    sizes = jnp.diff(order.bounds)
    if P == 1:
        # Every place is taken: either nothing was dropped, or the first C copies fill the buffer.
        places = order.place if kept is None else jnp.minimum(order.place, C - 1)
        return Places(order.row[:C], None, places.reshape(T, k), _slots(kept, T, k)), sizes
    # Device p has C places, and its copies are next to each other in the order, from `first[p]`.
    first = order.bounds[:-1:here]
    count = order.bounds[here::here] - first
    column = lax.iota(jnp.int32, C)
    live = column[None, :] < count[:, None]
    rank = jnp.where(live, first[:, None] + column[None, :], 0)
    shift = lax.iota(jnp.int32, P) * C - first
    places = order.place + take(shift, jnp.minimum(experts // here, P - 1))
    if kept is not None:
        places = jnp.where(kept, places, 0)
    copies = take(order.row, rank.reshape(-1))
    return Places(copies, live.reshape(-1), places.reshape(T, k), _slots(kept, T, k)), sizes


def _first_arrivals(devices: jax.Array, *, num_devices: int, capacity: int) -> jax.Array:
    """Whether each of N rows is among the first `capacity` for its device: [N] bool."""
    N = devices.shape[0]
    if num_devices == 1:
        return lax.iota(jnp.int32, N) < capacity
    order = order_by_group(devices, num_devices)
    return order.place - take(order.bounds, devices) < capacity


def _slots(kept: jax.Array | None, T: int, k: int) -> jax.Array | None:
    return None if kept is None else kept.reshape(T, k)


def group_received(sizes: jax.Array, *, num_rows: int) -> Exchange:
    """Per device: relates the receive buffer, by sender and then expert, to rows grouped by expert, then sender.

    `sizes` [P, E/P] says how many rows each sender has for each expert. Both orders consist of the same segments,
    so a place moves by as much as its segment does.
    """
    P, here = sizes.shape
    capacity = num_rows // P
    total = sizes.sum(dtype=jnp.int32)
    number = lax.iota(jnp.int32, num_rows)

    received_end = jnp.cumsum(sizes, axis=1, dtype=jnp.int32) + lax.iota(jnp.int32, P)[:, None] * capacity
    grouped_end = jnp.cumsum(sizes.T.reshape(-1), dtype=jnp.int32).reshape(here, P).T
    move = grouped_end - received_end  # [P, E/P]

    segment = count_below(received_end.reshape(-1), number + 1)
    live_source = number % capacity < take(sizes.sum(1, dtype=jnp.int32), number // capacity)
    target = number + take(move.reshape(-1), jnp.minimum(segment, P * here - 1))

    segment = count_below(grouped_end.T.reshape(-1), number + 1)
    live_target = number < total
    source = number - take(move.T.reshape(-1), jnp.minimum(segment, P * here - 1))
    return Exchange(
        jnp.where(live_target, source, 0), jnp.where(live_source, target, 0), live_source, live_target
    )
