"""One row for every token and node: a token crosses to a node at most once, however many of its experts are there.

    tokens [T, D] -to nodes-> [N T, D] -inside-> [P T, D] -spread-> grouped by expert -experts->
    -sum of a device-> [P T, D] -inside, sum of a node-> [N T, D] -to the token, sum-> [T, D]

Experts' ids and gates travel with the rows, in one message (`message`), as sums are formed where the experts are: in
float32, rounded once for each journey. Dropless buffers hold the worst case: all T tokens may go to any node, and
inside to any device. Nothing is packed for that: what moves those rows is an all_gather. (N - 1) T of them cross to
other nodes, and as many back, whatever the routing. With a capacity factor, rows are packed (`dispatch_nodes_limited`).

Between nodes every device sends to its own local index in each (`halo2_dedup`), or hands what it has for a node to the
leader of the pair, who sends what he has of all, and its leader there hands it out (`halo3_dedup`): L times fewer
messages and as many bytes between nodes, N T rows more inside before and after. Sums are those of `halo2_dedup`, in the
same order.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from piperjax.runtime import dispatch_nodes_limited as limited
from piperjax.runtime.all_to_all import HALO2, HALO3, AllToAll
from piperjax.runtime.dispatcher import DISPATCHED, Dispatcher, ExpertFFN, Sharing
from piperjax.runtime.fan import fan_in, fan_out
from piperjax.runtime.group_rows import group_by_expert
from piperjax.runtime.journey import Journey, journeys
from piperjax.runtime.message import Rows
from piperjax.runtime.permute import collect_rows, spread_gates, spread_rows


class Hops(NamedTuple):
    """How rows get on the two journeys, to nodes and on to devices, and sums back.

    Attributes:
      to_nodes: (rows of tokens, journey, sharing) -> (rows at a device of the node, way back).
      to_devices: (these, journey, sharing) -> (rows at the devices of their experts, way back).
      back: (sums, way back, journey) -> sums one journey earlier.
      num_copies: sharing -> copies that may come to a device.
    """

    to_nodes: Callable[[Rows, Journey, Sharing], tuple[Rows, Any]]
    to_devices: Callable[[Rows, Journey, Sharing], tuple[Rows, Any]]
    back: Callable[[jax.Array, Any, Journey], jax.Array]
    num_copies: Callable[[Sharing], int]


def _to_all(rows: Rows, journey: Journey, _: Sharing) -> tuple[Rows, None]:
    return fan_out(rows, journey), None


WHOLE = Hops(
    to_nodes=_to_all,
    to_devices=_to_all,
    back=lambda y, _, journey: fan_in(y, journey),
    num_copies=lambda sharing: (
        sharing.num_devices * sharing.num_tokens * min(sharing.experts_per_token, sharing.experts_per_device)
    ),
)
LIMITED = Hops(
    to_nodes=limited.to_nodes,
    to_devices=limited.to_devices,
    back=limited.back,
    num_copies=limited.num_copies,
)


def _hops(sharing: Sharing) -> Hops:
    return LIMITED if sharing.capacity_factor else WHOLE


def dispatcher(algorithm: AllToAll) -> Dispatcher:
    """The dispatcher that sends rows once to every node, between nodes as the algorithm does; it is called after it."""

    def to_nodes(sharing: Sharing) -> Journey:
        return journeys(sharing.axes, by_leaders=algorithm is HALO3)[0]

    return Dispatcher(
        name=f"{algorithm.name}_dedup",
        num_rows=lambda sharing: _hops(sharing).num_copies(sharing),
        admit=_admit,
        send=partial(_send, to_nodes),
        work=_work,
        collect=partial(_collect, to_nodes),
        waits_for_all=algorithm.waits_for_all,
    )


def _admit(expert_ids: jax.Array, sharing: Sharing) -> jax.Array | None:
    return limited.admit(expert_ids, sharing) if sharing.capacity_factor else None


def _send(to_nodes, x: jax.Array, expert_ids: jax.Array, gates: jax.Array, sharing: Sharing):
    # Up to E, which is no expert.
    narrow = jnp.int16 if sharing.num_experts < 2**15 else jnp.int32
    rows = Rows(x, expert_ids.astype(narrow), gates)
    return _hops(sharing).to_nodes(rows, to_nodes(sharing), sharing)


def _work(expert_ffn: ExpertFFN, arrived: Rows, sharing: Sharing):
    hops, here = _hops(sharing), sharing.experts_per_device
    _, inside = journeys(sharing.axes, by_leaders=False)
    rows, way = hops.to_devices(arrived, inside, sharing)
    rows = Rows(*(checkpoint_name(leaf, DISPATCHED) for leaf in rows))
    device = lax.axis_index(sharing.axes) if sharing.axes else 0
    grouped = group_by_expert(
        rows.expert_ids,
        rows.gates,
        first=device * here,
        num_groups=here,
        num_places=hops.num_copies(sharing),
    )
    gates = spread_gates(grouped.gates, grouped.where)
    results = expert_ffn(spread_rows(rows.x, grouped.where), grouped.sizes, gates)
    return hops.back(collect_rows(results, grouped.where), way, inside)


def _collect(to_nodes, results: jax.Array, way, sharing: Sharing):
    return _hops(sharing).back(results, way, to_nodes(sharing))


ONCE_PER_NODE = tuple(dispatcher(algorithm) for algorithm in (HALO2, HALO3))
