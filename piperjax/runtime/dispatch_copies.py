"""One row for every copy of a token: each travels to the device of its expert by itself, by any all-to-all.

    tokens [T, D] -spread-> [P C, D] -all-to-all-> [P C, D] -move-> grouped by expert -experts-> and all the way back

Gates travel beside the rows, in the message that says how many there are, and experts weigh: what returns is only added
up, so that backward needs none of it, and no recomputation sends it again.

Dropless buffers hold the worst case, so that there is always room; with a capacity factor they hold that many times
the balanced number of rows.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.runtime.all_to_all import ALL_TO_ALLS, AllToAll
from piperjax.runtime.dispatcher import Dispatcher, ExpertFFN, Sharing
from piperjax.runtime.permute import (
    Exchange,
    Places,
    collect_rows,
    count_below,
    move_rows,
    order_by_group,
    spread_gates,
    spread_rows,
    take,
)


class Arrived(NamedTuple):
    """Per device: rows by sender, then expert.

    Attributes:
      rows: [P C, D].
      gates: theirs [P C].
      sizes: how many each sender has for each expert [P, E/P].
    """

    rows: jax.Array
    gates: jax.Array
    sizes: jax.Array


def dispatcher(algorithm: AllToAll) -> Dispatcher:
    """The dispatcher that sends copies by an all-to-all; it is called as that is.

    Sends P C rows each way, with C = T min(k, E / P), the most that can meet at a device, or
    C = ceil(capacity_factor T k / P).
    """
    return Dispatcher(
        name=algorithm.name,
        num_rows=lambda sharing: sharing.num_devices * row_capacity(sharing),
        admit=admit,
        send=partial(_send, algorithm),
        work=_work,
        collect=partial(_collect, algorithm),
        waits_for_all=algorithm.waits_for_all,
    )


def _send(algorithm: AllToAll, x: jax.Array, expert_ids: jax.Array, gates: jax.Array, sharing: Sharing):
    where, sizes = place_rows(expert_ids, sharing)
    rows = algorithm.move(spread_rows(x, where), sharing.axes)
    # In one message: in float32 numbers are exact up to 2**24 rows, which is more than a device has room for.
    wide = jnp.promote_types(gates.dtype, jnp.float32)
    beside = (spread_gates(gates.astype(wide), where), sizes.astype(wide))
    beside = jnp.concatenate([array.reshape(sharing.num_devices, -1) for array in beside], axis=1)
    gates, sizes = jnp.split(algorithm.move(beside, sharing.axes), [row_capacity(sharing)], axis=1)
    return Arrived(rows, gates.reshape(-1), sizes.astype(jnp.int32)), where


def _work(expert_ffn: ExpertFFN, arrived: Arrived, sharing: Sharing) -> jax.Array:
    sizes = arrived.sizes.sum(0, dtype=jnp.int32)
    if sharing.num_devices == 1:
        return expert_ffn(arrived.rows, sizes, arrived.gates)
    exchange = group_received(arrived.sizes, num_rows=arrived.rows.shape[0])
    gates = move_rows(arrived.gates[:, None], exchange)[:, 0]
    results = expert_ffn(move_rows(arrived.rows, exchange), sizes, gates)
    return move_rows(results, exchange.reversed())


def _collect(algorithm: AllToAll, results: jax.Array, where: Places, sharing: Sharing):
    return collect_rows(algorithm.move(results, sharing.axes), where)


def most_rows(sharing: Sharing) -> int:
    """Rows of one device that can meet at another."""
    return sharing.num_tokens * min(sharing.experts_per_token, sharing.experts_per_device)


def row_capacity(sharing: Sharing) -> int:
    """Rows C that one device may send to another at a time: no more than it can need, if dropless all of it."""
    balanced = sharing.num_tokens * sharing.experts_per_token / sharing.num_devices
    most = most_rows(sharing)
    return min(most, math.ceil(sharing.capacity_factor * balanced)) if sharing.capacity_factor else most


def may_overflow(sharing: Sharing) -> bool:
    """Whether there can be more rows for a device than it has room for."""
    return row_capacity(sharing) < most_rows(sharing)


def admit(expert_ids: jax.Array, sharing: Sharing) -> jax.Array | None:
    """Which copies [T, k] are among the first C for their device, in the order of tokens; None if there are no more."""
    if not may_overflow(sharing):
        return None
    C = row_capacity(sharing)
    experts = expert_ids.reshape(-1)
    travels = experts < sharing.num_experts
    if sharing.num_devices == 1:
        fits = jnp.cumsum(travels, dtype=jnp.int32) <= C
    else:
        devices = experts // sharing.experts_per_device
        order = order_by_group(devices, sharing.num_devices)
        fits = order.place - take(order.bounds, devices) < C
    return (travels & fits).reshape(expert_ids.shape)


def place_rows(expert_ids: jax.Array, sharing: Sharing) -> tuple[Places, jax.Array]:
    """Per device: places the copies of T tokens in a send buffer [P C], by device, then expert, then token.

    Returns the places, and how many rows go to each expert [E].
    """
    T, k = expert_ids.shape
    N, P, here, num_experts = T * k, sharing.num_devices, sharing.experts_per_device, sharing.num_experts
    C = row_capacity(sharing)
    experts = expert_ids.reshape(N)
    kept = experts < num_experts if may_overflow(sharing) else None
    order = order_by_group(experts, num_experts)
    sizes = jnp.diff(order.bounds)
    if P == 1:
        live = None if kept is None else lax.iota(jnp.int32, C) < order.bounds[-1]
        places = order.place if kept is None else jnp.minimum(order.place, C - 1)
        return Places(order.row[:C], live, places.reshape(T, k), _slots(kept, T, k)), sizes
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


COPIES = tuple(dispatcher(algorithm) for algorithm in ALL_TO_ALLS.values())
