"""This file is the communication model of expert dispatch: what each way of bringing rows to their experts costs.

What the planner needs of the network is here: the collectives of `collectives` and their simulation, how far tokens
spread from `routing`, and the dispatchers that combine them.
"""

from collections.abc import Sequence
from math import ceil, inf, prod
from typing import Any, Literal, get_args

from meshes.platform import Platform
from piperjax.planner.collectives import (
    Transfer,
    all_gather,
    all_reduce,
    all_to_all,
    halo,
    permute,
    reduce_scatter,
)
from piperjax.planner.dispatchers import DISPATCHERS, EXECUTABLE, Dispatcher, Way, check_chunks, named, ways
from piperjax.planner.locality import Group, axis_group
from piperjax.planner.network_simulation import simulate_all_to_all
from piperjax.planner.routing import expected_nodes

__all__ = [
    "DISPATCHERS",
    "EXECUTABLE",
    "Dispatcher",
    "Group",
    "Rows",
    "Transfer",
    "Way",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "axis_group",
    "best_dispatcher",
    "dispatch_transfer",
    "expected_nodes",
    "permute",
    "reduce_scatter",
    "simulate_all_to_all",
    "ways",
]

Rows = Literal["static", "exact"]


def dispatch_transfer(
    platform: Platform,
    *,
    expert_factors: tuple[int, int, int],
    tokens: int,
    row_bytes: float,
    num_experts: int,
    experts_per_token: int,
    dispatcher: str = "flat",
    chunks: int = 1,
    rows: Rows = "static",
    imbalance: float = 1.0,
    capacity_factor: float = 0.0,
    node_limit: int | None = None,
) -> Transfer:
    """Cost of one direction of expert dispatch, the way there or the way back, in one layer.

    Per device and for P = prod(expert_factors) devices on N nodes, T tokens, k experts per token:

    | rows | flat, halo2, halo3 send | with de-duplication, off node | and spread inside a node |
    |---|---|---|---|
    | exact | T k imbalance | T nodes (N-1)/N imbalance | T devices (N-1)/N imbalance |
    | static, dropless | P C, C = T min(k, E/P) | (N-1) T | (N-1) L T |
    | capacity factor c | P ceil(c T k/P) | (N-1) ceil(c T nodes/N) | (N-1) L ceil(c T devices/P) |

    where `nodes` and `devices` are what `expected_nodes` says a token reaches, and L devices are in a node. "static"
    buffers hold the worst case and are sent whole, as our own flat dispatcher does: they cost the same whatever the
    imbalance. "exact" rows are those of implementations with ragged messages.

    Args:
      platform: the machine.
      expert_factors: the expert axis as (group, node, local).
      tokens: tokens of one microbatch on one device.
      row_bytes: bytes of one row, d_model times the size of an element.
      num_experts: routed experts of the layer.
      experts_per_token: experts that a token takes.
      dispatcher: a name in `DISPATCHERS`.
      chunks: parts in which tokens travel, so that one is between nodes while another is spread inside.
      rows: whether padding travels.
      imbalance: rows of the most loaded device over the mean.
      capacity_factor: rows per destination over the balanced number; 0 drops nothing.
      node_limit: nodes that routing allows a token; None for all.

    Raises:
      ValueError: if there is no such dispatcher, or the experts do not divide over the devices.
    """
    check_chunks(dispatcher, chunks)
    way = named(dispatcher)
    if rows not in get_args(Rows):
        raise ValueError(f"rows must be one of {', '.join(get_args(Rows))}, got {rows!r}")
    if imbalance < 1:
        raise ValueError(f"imbalance is the largest load over the mean, so at least 1, got {imbalance}")
    num_devices, local = prod(expert_factors), expert_factors[2]
    _check_experts(num_experts, num_devices)

    def count(mean: float, most: int) -> float:
        """Rows for one destination, of which the mean is expected and no more than the most can come."""
        if rows == "static":
            return min(most, ceil(capacity_factor * mean)) if capacity_factor else most
        return min(most, mean * min(imbalance, capacity_factor or inf))

    if way.deduplicates:
        num_nodes = num_devices // local
        nodes = expected_nodes(num_experts, experts_per_token, num_nodes, limit=node_limit)
        devices = _expected_devices(num_experts, experts_per_token, num_nodes, local, node_limit)
        per_node = count(tokens * nodes / num_nodes, tokens) * row_bytes
        per_device = count(tokens * devices / num_devices, tokens) * row_bytes
        return halo(
            platform,
            expert_factors,
            near_bytes=local * per_device,
            far_bytes=(num_nodes - 1) * per_node,
            spread_bytes=(num_nodes - 1) * local * per_device,
            striped=way.algorithm == "halo3",
            chunks=chunks,
        )
    most = tokens * min(experts_per_token, num_experts // num_devices)
    per_device = count(tokens * experts_per_token / num_devices, most) * row_bytes
    return all_to_all(
        platform, expert_factors, num_devices * per_device, algorithm=way.algorithm, chunks=chunks
    )


def best_dispatcher(
    platform: Platform, *, candidates: Sequence[Way] = ways(DISPATCHERS), **parameters: Any
) -> tuple[Way, Transfer]:
    """The quickest of the candidates, and its cost; of equals the first.

    Args:
      platform: the machine.
      candidates: dispatchers with numbers of chunks; those of `EXECUTABLE` can be run.
      parameters: as `dispatch_transfer` takes them.
    """
    costs = {
        way: dispatch_transfer(platform, dispatcher=way.dispatch, chunks=way.chunks, **parameters)
        for way in candidates
    }
    best = min(costs, key=lambda way: costs[way].seconds)
    return best, costs[best]


def _expected_devices(
    num_experts: int, experts_per_token: int, num_nodes: int, local: int, node_limit: int | None
) -> float:
    """Devices that hold the experts of one token; with a limit, k experts drawn from those of the chosen nodes."""
    allowed = min(node_limit or num_nodes, num_nodes)
    return expected_nodes(num_experts * allowed // num_nodes, experts_per_token, allowed * local)


def _check_experts(num_experts: int, num_devices: int) -> None:
    if num_experts % num_devices:
        raise ValueError(
            f"the experts must divide evenly over the devices of the expert axis, got {num_experts} experts on "
            f"{num_devices} devices"
        )
