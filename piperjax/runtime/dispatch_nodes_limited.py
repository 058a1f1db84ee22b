"""The journeys of rows to nodes and on to devices where both accept only so many at a time.

Of the T tokens of a device, a node accepts C2 = ceil(c T n / N) and each of its devices C3 = ceil(c T d / P), with n
the nodes and d the devices that the experts of a token are expected on when routing is even; these, at a device, may
have ceil(c T k / P) copies for its experts, or those of one token if that is more. A token that finds no room on a
device has no copies travel there, later tokens first. That is decided at the source, each limit counted for itself, so
that nothing that travels is lost.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.planner.routing import expected_nodes
from piperjax.runtime.all_to_all import split_axes
from piperjax.runtime.dispatcher import Sharing
from piperjax.runtime.group_rows import count_by_group, fill_bins, has_group
from piperjax.runtime.journey import Journey, travel
from piperjax.runtime.message import Rows, exchange
from piperjax.runtime.permute import Places, collect_rows, spread_rows, take


class Limits(NamedTuple):
    """Rows of one device that a node, a device, and the experts of a device accept."""

    node: int
    device: int
    copies: int


def limits(sharing: Sharing) -> Limits:
    """Limits of even routing times the capacity factor, no more than can come."""
    T, k, P, E = sharing.num_tokens, sharing.experts_per_token, sharing.num_devices, sharing.num_experts

    def share(balanced: float, most: int) -> int:
        return min(most, math.ceil(sharing.capacity_factor * balanced))

    node = share(T * expected_nodes(E, k, sharing.num_nodes) / sharing.num_nodes, T)
    device = share(T * expected_nodes(E, k, P) / P, T)
    of_token = min(k, sharing.experts_per_device)
    return Limits(node, device, max(of_token, share(T * k / P, device * of_token)))


def num_copies(sharing: Sharing) -> int:
    """Copies that may come to a device from all others."""
    return sharing.num_devices * limits(sharing).copies


def to_nodes(rows: Rows, journey: Journey, sharing: Sharing) -> tuple[Rows, Places]:
    """Rows [N C2, ...] for this node from the devices of its local index in all nodes, and where they were."""
    N = sharing.num_nodes
    mask = has_group(rows.expert_ids // (sharing.num_experts // N), N)
    bins = fill_bins(mask, limits(sharing).node)
    group = lax.iota(jnp.int32, N)[:, None]
    where = Places((bins.member * N + group).reshape(-1), bins.live.reshape(-1), bins.place.T, mask.T)
    return _sent(rows, where, journey, sharing), where


def to_devices(rows: Rows, journey: Journey, sharing: Sharing) -> tuple[Rows, Places]:
    """Rows [P C3, ...] for this device, and where they were among those of its node."""
    nodes, _ = split_axes(sharing.axes)
    N, L, limit = sharing.num_nodes, sharing.num_devices // sharing.num_nodes, limits(sharing)
    node = lax.axis_index(nodes) if nodes else 0
    local_of = rows.expert_ids.astype(jnp.int32) // sharing.experts_per_device - node * L
    mask = has_group(local_of, L)
    # A bin for every device and source: what each may send is limited.
    bins = fill_bins(mask.reshape(L * N, limit.node), limit.device)
    group = lax.iota(jnp.int32, L * N)[:, None]
    row = group % N * limit.node + bins.member
    where = Places(
        (row * L + group // N).reshape(-1), bins.live.reshape(-1), bins.place.reshape(L, -1).T, mask.T
    )
    return _sent(rows, where, journey, sharing), where


def back(sums: jax.Array, where: Places, journey: Journey) -> jax.Array:
    """Sums [P C3, D] of devices to sums [N C2, D] of the node, or these to sums [T, D] of tokens."""
    return collect_rows(travel(sums, journey), where)


def _sent(rows: Rows, where: Places, journey: Journey, sharing: Sharing) -> Rows:
    row = where.copies // where.places.shape[1]
    ids = jnp.where(where.live[:, None], take(rows.expert_ids, row), sharing.num_experts)
    rows = Rows(spread_rows(rows.x, where), ids.astype(rows.expert_ids.dtype), spread_rows(rows.gates, where))
    return exchange(rows, journey)


def admit(expert_ids: jax.Array, sharing: Sharing) -> jax.Array | None:
    """Which copies [T, k] find room; None if there is always room."""
    P, N, limit, most = sharing.num_devices, sharing.num_nodes, limits(sharing), sharing.num_tokens
    if limit == (most, most, most * min(sharing.experts_per_token, sharing.experts_per_device)):
        return None
    device_of = expert_ids // sharing.experts_per_device
    counts = count_by_group(device_of, P)  # [P, T]
    wanted = (counts > 0).astype(jnp.int32)
    wanted_of_node = wanted.reshape(N, P // N, -1).max(1)
    fits = (
        (jnp.cumsum(wanted, axis=1, dtype=jnp.int32) <= limit.device)
        & (jnp.cumsum(counts, axis=1, dtype=jnp.int32) <= limit.copies)
        & jnp.repeat(jnp.cumsum(wanted_of_node, axis=1, dtype=jnp.int32) <= limit.node, P // N, axis=0)
    )
    T = len(expert_ids)
    found = take(fits.reshape(-1), jnp.minimum(device_of, P - 1) * T + lax.iota(jnp.int32, T)[:, None])
    return found & (device_of < P)
