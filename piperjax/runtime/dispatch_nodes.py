"""One row for every token and node: a token crosses to a node at most once, however many of its experts are there.

    tokens [T, D] -to nodes-> [N T, D] -inside-> [P T, D] -spread-> grouped by expert -experts->
    -sum of a device-> [P T, D] -inside, sum of a node-> [N T, D] -to the token, sum-> [T, D]

Experts' ids and gates travel with the rows, in one message (`message`), as sums are formed where the experts are: in
float32, rounded once for each journey. Dropless buffers hold the worst case: all T tokens may go to any node, and
inside to any device. Nothing is packed for that: what moves those rows is an all_gather. (N - 1) T of them cross to
other nodes, and as many back, whatever the routing. With a capacity factor, rows are packed (`dispatch_nodes_limited`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from piperjax.runtime import dispatch_nodes_limited as limited
from piperjax.runtime.all_to_all import split_axes
from piperjax.runtime.dispatcher import DISPATCHED, Dispatcher, ExpertFFN, Sharing
from piperjax.runtime.fan import fan_in, fan_out
from piperjax.runtime.group_rows import group_by_expert
from piperjax.runtime.message import Rows
from piperjax.runtime.permute import combine_sparse_rows, spread_rows


class Hops(NamedTuple):
    """The two journeys of a row, and those of sums back.

    Attributes:
      to_nodes: (rows of tokens, sharing) -> (rows at a device of the node, way back).
      to_devices: (these, sharing) -> (rows at the devices of their experts, way back).
      from_devices, from_nodes: (sums, way back, sharing) -> sums one journey earlier.
      num_copies: sharing -> copies that may come to a device.
    """

    to_nodes: Callable[[Rows, Sharing], tuple[Rows, Any]]
    to_devices: Callable[[Rows, Sharing], tuple[Rows, Any]]
    from_devices: Callable[[jax.Array, Any, Sharing], jax.Array]
    from_nodes: Callable[[jax.Array, Any, Sharing], jax.Array]
    num_copies: Callable[[Sharing], int]


def _to_all_nodes(rows: Rows, sharing: Sharing) -> tuple[Rows, None]:
    nodes, _ = split_axes(sharing.axes)
    return fan_out(rows, nodes), None


def _to_all_devices(rows: Rows, sharing: Sharing) -> tuple[Rows, None]:
    _, local = split_axes(sharing.axes)
    return fan_out(rows, local), None


WHOLE = Hops(
    to_nodes=_to_all_nodes,
    to_devices=_to_all_devices,
    from_devices=lambda y, _, sharing: fan_in(y, split_axes(sharing.axes)[1]),
    from_nodes=lambda y, _, sharing: fan_in(y, split_axes(sharing.axes)[0]),
    num_copies=lambda sharing: (
        sharing.num_devices * sharing.num_tokens * min(sharing.experts_per_token, sharing.experts_per_device)
    ),
)
LIMITED = Hops(
    to_nodes=limited.to_nodes,
    to_devices=limited.to_devices,
    from_devices=limited.from_devices,
    from_nodes=limited.from_nodes,
    num_copies=limited.num_copies,
)


def _hops(sharing: Sharing) -> Hops:
    return LIMITED if sharing.capacity_factor else WHOLE


def _send(x: jax.Array, expert_ids: jax.Array, gates: jax.Array, sharing: Sharing):
    # Up to E, which is no expert.
    narrow = jnp.int16 if sharing.num_experts < 2**15 else jnp.int32
    return _hops(sharing).to_nodes(Rows(x, expert_ids.astype(narrow), gates), sharing)


def _work(expert_ffn: ExpertFFN, arrived: Rows, sharing: Sharing):
    hops, here = _hops(sharing), sharing.experts_per_device
    rows, way = hops.to_devices(arrived, sharing)
    rows = Rows(*(checkpoint_name(leaf, DISPATCHED) for leaf in rows))
    device = lax.axis_index(sharing.axes) if sharing.axes else 0
    grouped = group_by_expert(
        rows.expert_ids,
        rows.gates,
        first=device * here,
        num_groups=here,
        num_places=hops.num_copies(sharing),
    )
    results = expert_ffn(spread_rows(rows.x, grouped.where), grouped.sizes)
    return hops.from_devices(combine_sparse_rows(results, grouped.gates, grouped.where), way, sharing)


def _collect(results: jax.Array, way, sharing: Sharing):
    return _hops(sharing).from_nodes(results, way, sharing)


HALO2_DEDUP = Dispatcher(
    name="halo2_dedup",
    num_rows=lambda sharing: _hops(sharing).num_copies(sharing),
    admit=lambda expert_ids, sharing: limited.admit(expert_ids, sharing) if sharing.capacity_factor else None,
    send=_send,
    work=_work,
    collect=_collect,
)
