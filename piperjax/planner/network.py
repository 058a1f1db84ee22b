"""This file is the communication model of expert dispatch: what each way of bringing rows to their experts costs.

What the planner needs of the network is here: the collectives of `collectives` and their simulation, how far tokens
spread from `routing`, and the dispatchers that combine them.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf, prod
from typing import Any, Literal, NamedTuple, get_args

from meshes.platform import Platform
from piperjax.planner.collectives import (
    Transfer,
    all_gather,
    all_reduce,
    all_to_all,
    between_nodes,
    halo,
    inside_nodes,
    permute,
    reduce_scatter,
)
from piperjax.planner.dispatchers import DISPATCHERS, Dispatcher, Way, check_chunks, named, ways
from piperjax.planner.locality import Group, axis_group
from piperjax.planner.network_simulation import simulate_all_to_all
from piperjax.planner.routing import expected_nodes, reached_nodes

__all__ = [
    "DISPATCHERS",
    "Dispatcher",
    "Group",
    "Rows",
    "Stages",
    "Transfer",
    "Way",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "axis_group",
    "best_dispatcher",
    "dispatch_stages",
    "dispatch_transfer",
    "expected_nodes",
    "permute",
    "reached_nodes",
    "reduce_scatter",
    "simulate_all_to_all",
    "ways",
]

Rows = Literal["static", "exact"]


class Stages(NamedTuple):
    """One direction of expert dispatch, as our executor divides it.

    Attributes:
      beside: what may run beside the experts of another chunk: everything, or with de-duplication what is between
        nodes.
      inside: what comes right before the experts, or right after them.
    """

    beside: Transfer
    inside: Transfer


def dispatch_stages(
    platform: Platform,
    *,
    expert_factors: tuple[int, int, int],
    tokens: float,
    row_bytes: float,
    num_experts: int,
    experts_per_token: int,
    dispatcher: str = "flat",
    capacity_factor: float = 0.0,
) -> Stages:
    """Cost of one direction of the dispatch of `tokens` of a device, with the static buffers of our executor.

    Arguments are those of `dispatch_transfer`, which says what is sent.
    """
    way, load = named(dispatcher), _Load(expert_factors, tokens, num_experts, experts_per_token)
    nothing = Transfer(seconds=0.0)
    if way.deduplicates:
        nodes, devices = load.reached()
        per_node = load.static_rows(nodes, load.num_nodes, tokens, capacity_factor) * row_bytes
        per_device = load.static_rows(devices, load.num_devices, tokens, capacity_factor) * row_bytes
        striped = way.algorithm == "halo3"
        return Stages(
            between_nodes(platform, expert_factors, load.num_nodes * per_node, striped=striped),
            inside_nodes(platform, expert_factors, load.num_devices * per_device),
        )
    most = tokens * min(experts_per_token, num_experts // load.num_devices)
    rows = load.num_devices * load.static_rows(experts_per_token, load.num_devices, most, capacity_factor)
    num_bytes = rows * row_bytes
    if way.algorithm == "flat" or min(load.num_nodes, expert_factors[2]) == 1:
        whole = all_to_all(platform, expert_factors, num_bytes)
    elif way.algorithm == "halo3":
        whole = between_nodes(platform, expert_factors, num_bytes, striped=True)
    else:
        phases = (phase(platform, expert_factors, num_bytes) for phase in (inside_nodes, between_nodes))
        whole = one_after_other(*phases)
    return Stages(whole, nothing)


def dispatch_transfer(
    platform: Platform,
    *,
    expert_factors: tuple[int, int, int],
    tokens: float,
    row_bytes: float,
    num_experts: int,
    experts_per_token: int,
    dispatcher: str = "flat",
    chunks: int = 1,
    rows: Rows = "static",
    imbalance: float = 1.0,
    capacity_factor: float = 0.0,
    num_groups: int = 1,
    groups_per_token: int = 1,
) -> Transfer:
    """Cost of one direction of expert dispatch, the way there or the way back, in one layer.

    Per device and for P = prod(expert_factors) devices on N nodes, T tokens, k experts per token:

    | rows | flat, halo2, halo3 send | with de-duplication, off node | and spread inside a node |
    |---|---|---|---|
    | exact | T k imbalance | T nodes (N-1)/N imbalance | T devices (N-1)/N imbalance |
    | static, dropless | P C, C = T min(k, E/P) | (N-1) T | P T |
    | capacity factor c | P ceil(c T k/P) | (N-1) ceil(c T nodes/N) | P ceil(c T devices/P) |

    where `nodes` and `devices` are what a token reaches with even routing (`reached_nodes`). "static" buffers hold the
    worst case and are sent whole, as our own dispatchers do: they cost the same whatever the imbalance, and one phase
    follows the other. "exact" rows are those of implementations with ragged messages, that exchange inside a node what
    stays there while the rest is between nodes.

    Args:
      platform: the machine.
      expert_factors: the expert axis as (group, node, local).
      tokens: tokens of one microbatch on one device.
      row_bytes: bytes of one row, d_model times the size of an element.
      num_experts: routed experts of the layer.
      experts_per_token: experts that a token takes.
      dispatcher: a name in `DISPATCHERS`.
      chunks: parts in which tokens travel, so that one is between nodes while another is inside.
      rows: whether padding travels.
      imbalance: rows of the most loaded device over the mean.
      capacity_factor: rows per destination over the balanced number; 0 drops nothing.
      num_groups, groups_per_token: groups of experts, and how many of them a token chooses first (`models.Router`).

    Raises:
      ValueError: if there is no such dispatcher, or the experts do not divide over the devices.
    """
    check_chunks(dispatcher, chunks)
    if rows not in get_args(Rows):
        raise ValueError(f"rows must be one of {', '.join(get_args(Rows))}, got {rows!r}")
    if imbalance < 1:
        raise ValueError(f"imbalance is the largest load over the mean, so at least 1, got {imbalance}")
    if rows == "static":
        one = dispatch_stages(
            platform,
            expert_factors=expert_factors,
            tokens=tokens / chunks,
            row_bytes=row_bytes,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            dispatcher=dispatcher,
            capacity_factor=capacity_factor,
        )
        return _in_chunks(one, chunks)
    way, load = named(dispatcher), _Load(expert_factors, tokens, num_experts, experts_per_token)
    limit = min(imbalance, capacity_factor or inf)
    if not way.deduplicates:
        most = tokens * min(experts_per_token, num_experts // load.num_devices)
        num_bytes = (
            load.num_devices * min(most, tokens * experts_per_token / load.num_devices * limit) * row_bytes
        )
        options = dict(chunks=chunks) if way.algorithm == "halo2" else {}
        return all_to_all(platform, expert_factors, num_bytes, algorithm=way.algorithm, **options)
    nodes, devices = load.reached(num_groups, groups_per_token)
    per_node = min(tokens, tokens * nodes / load.num_nodes * limit) * row_bytes
    per_device = min(tokens, tokens * devices / load.num_devices * limit) * row_bytes
    return _once_per_node(platform, way, load, per_node, per_device, chunks=chunks)


class _Load(NamedTuple):
    """What devices have to exchange."""

    expert_factors: tuple[int, int, int]
    tokens: float
    num_experts: int
    experts_per_token: int

    @property
    def num_devices(self) -> int:
        """P."""
        return prod(self.expert_factors)

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.expert_factors[0] * self.expert_factors[1]

    def reached(self, num_groups: int = 1, groups_per_token: int = 1) -> tuple[float, float]:
        """Nodes and devices that a token reaches."""
        groups = dict(num_groups=num_groups, groups_per_token=groups_per_token)
        _check_experts(self.num_experts, self.num_devices)
        nodes, devices = (
            reached_nodes(self.num_experts, self.experts_per_token, number, **groups)
            for number in (self.num_nodes, self.num_devices)
        )
        return nodes, devices

    def static_rows(self, reached: float, destinations: int, most: float, capacity_factor: float) -> float:
        """Rows of the buffer for each of the destinations, of which a token reaches some."""
        _check_experts(self.num_experts, self.num_devices)
        return (
            min(most, ceil(capacity_factor * self.tokens * reached / destinations))
            if capacity_factor
            else most
        )


def _once_per_node(
    platform: Platform, way: Dispatcher, load: _Load, per_node: float, per_device: float, *, chunks: int = 1
) -> Transfer:
    """Every token to every node that it reaches, `per_node` bytes to each, `per_device` to each device there."""
    local = load.expert_factors[2]
    return halo(
        platform,
        load.expert_factors,
        near_bytes=local * per_device,
        far_bytes=(load.num_nodes - 1) * per_node,
        spread_bytes=(load.num_nodes - 1) * local * per_device,
        striped=way.algorithm == "halo3",
        chunks=chunks if way.algorithm == "halo2" else 1,
    )


def one_after_other(*transfers: Transfer, times: int = 1) -> Transfer:
    """Transfers that follow each other, all of them so many times."""
    sent: dict[str, Any] = {}
    for transfer in transfers:
        for level, num_bytes in transfer.bytes_by_level.items():
            sent[level] = sent.get(level, 0.0) + times * num_bytes
    return Transfer(
        seconds=times * sum(transfer.seconds for transfer in transfers),
        bytes_by_level=sent,
        notes=tuple(dict.fromkeys(note for transfer in transfers for note in transfer.notes)),
    )


def _in_chunks(one: Stages, chunks: int) -> Transfer:
    """All chunks of one direction, one inside the nodes while the next is between them."""
    total = one_after_other(one.beside, one.inside, times=chunks)
    hidden = (chunks - 1) * min(one.beside.seconds, one.inside.seconds)
    return replace(total, seconds=total.seconds - hidden)


def best_dispatcher(
    platform: Platform, *, candidates: Sequence[Way] = ways(DISPATCHERS), **parameters: Any
) -> tuple[Way, Transfer]:
    """The quickest of the candidates, and its cost; of equals the first.

    Args:
      platform: the machine.
      candidates: dispatchers with numbers of chunks.
      parameters: as `dispatch_transfer` takes them.
    """
    costs = {
        way: dispatch_transfer(platform, dispatcher=way.dispatch, chunks=way.chunks, **parameters)
        for way in candidates
    }
    best = min(costs, key=lambda way: costs[way].seconds)
    return best, costs[best]


def _check_experts(num_experts: int, num_devices: int) -> None:
    if num_experts % num_devices:
        raise ValueError(
            f"the experts must divide evenly over the devices of the expert axis, got {num_experts} experts on "
            f"{num_devices} devices"
        )
