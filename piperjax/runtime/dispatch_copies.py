"""One row for every copy of a token: each travels to the device of its expert by itself, by any all-to-all.

    tokens [T, D] -spread-> [P C, D] -all-to-all-> [P C, D] -move-> grouped by expert -experts-> and all the way back

Dropless buffers hold the worst case, so no row is ever lost; with a capacity factor they hold that many times the
balanced number of rows, and what does not fit is dropped and counted.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from piperjax.runtime.all_to_all import ALL_TO_ALLS, AllToAll
from piperjax.runtime.dispatcher import COMBINED, Dispatcher, ExpertFFN, Sharing
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
from piperjax.runtime.varying import vary_like


class Arrived(NamedTuple):
    """Per device: rows [P C, D] by sender, then expert, and how many each sender has for each expert [P, E/P]."""

    rows: jax.Array
    sizes: jax.Array


class Sent(NamedTuple):
    """Per device: gates [T, k], and where the copies of tokens are among what was sent."""

    gates: jax.Array
    where: Places


def dispatcher(algorithm: AllToAll) -> Dispatcher:
    """The dispatcher that sends copies by an all-to-all; it is called as that is.

    Sends P C rows each way, with C = T min(k, E / P), the most that can meet at a device, or
    C = ceil(capacity_factor T k / P).
    """
    return Dispatcher(
        name=algorithm.name, send=partial(_send, algorithm), work=_work, collect=partial(_collect, algorithm)
    )


def _send(algorithm: AllToAll, x: jax.Array, expert_ids: jax.Array, gates: jax.Array, sharing: Sharing):
    where, sizes = place_rows(
        expert_ids,
        num_experts=sharing.num_experts,
        num_devices=sharing.num_devices,
        capacity_factor=sharing.capacity_factor,
    )
    rows = algorithm.move(spread_rows(x, where), sharing.axes)
    sizes = algorithm.move(sizes, sharing.axes).reshape(sharing.num_devices, -1)
    return Arrived(rows, sizes), Sent(gates, where)


def _work(expert_ffn: ExpertFFN, arrived: Arrived, sharing: Sharing) -> jax.Array:
    sizes = arrived.sizes.sum(0, dtype=jnp.int32)
    if sharing.num_devices == 1:
        return expert_ffn(arrived.rows, sizes)
    exchange = group_received(arrived.sizes, num_rows=arrived.rows.shape[0])
    results = expert_ffn(move_rows(arrived.rows, exchange), sizes)
    return move_rows(results, exchange.reversed())


def _collect(algorithm: AllToAll, results: jax.Array, sent: Sent, sharing: Sharing):
    results = checkpoint_name(algorithm.move(results, sharing.axes), COMBINED)
    kept = sent.where.kept
    dropped = jnp.zeros((), jnp.float32) if kept is None else (~kept).sum(dtype=jnp.float32)
    return combine_rows(results, sent.gates, sent.where), vary_like(dropped, results)


COPIES = tuple(dispatcher(algorithm) for algorithm in ALL_TO_ALLS.values())


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
