"""The shaped network as a platform: what the planner would choose on it, and how well the simulation knows it.

One number is fitted, the CPU seconds of a message, to one point: the flat all-to-all of the smallest size, which is
nothing but messages. The rates inside of nodes and between them and what a collective costs that moves nothing are
measured alone, as `piperjax measure` does. (Of the rate that was set, headers of frames take 4 %, and queues that are
empty at one receiver while they fill at another a fifth to a third.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median
from typing import NamedTuple

from benchmarks.alltoall_cells import (
    ALGORITHMS,
    Cell,
    Exchange,
    Layer,
    NodeExchange,
    Variant,
    paired_ratio,
)
from meshes.platform import Device, Link, Platform
from models.config import MoEFFN
from piperjax.planner.kept import Share
from piperjax.planner.later_passes import later_passes
from piperjax.planner.network import all_to_all, dispatch_transfer, simulate_all_to_all

Seconds = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A shaped run.

    Attributes:
      nodes: namespaces.
      local: devices of each.
      bytes_per_second: of the link of a node, per direction, headers included.
      cores: of the machine; they do the work of all devices, sockets included.
    """

    nodes: int
    local: int
    bytes_per_second: float
    cores: int

    @property
    def num_devices(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.local


class Point(NamedTuple):
    """A simulated and a measured time of one algorithm at one size."""

    pair_bytes: int
    algorithm: str
    simulated_seconds: float
    measured_seconds: float

    @property
    def error_factor(self) -> float:
        """The larger over the smaller."""
        ratio = self.simulated_seconds / self.measured_seconds
        return max(ratio, 1 / ratio)


class Choice(NamedTuple):
    """What the planner takes for a cell, and what was the quickest.

    Attributes:
      cell: label.
      chosen: variant.
      best: variant.
      fraction: seconds of the best over those of the chosen, the median over pairs taken one after the other.
    """

    cell: str
    chosen: str
    best: str
    fraction: float


def platform_of(shape: Shape, cells: Sequence[Cell], seconds: Seconds) -> Platform:
    """The shaped network after its measurements, its one number fitted."""
    smallest = min((cell for cell in cells if isinstance(cell, Exchange)), key=lambda cell: cell.pair_bytes)
    alone = sorted(
        (cell for cell in cells if isinstance(cell, NodeExchange)), key=lambda cell: cell.pair_bytes
    )
    nothing = median(seconds[alone[0].label]["node"])

    def rate(cell: NodeExchange) -> float:
        peers = (shape.local if cell.where == "inside" else shape.nodes) - 1
        return cell.pair_bytes * peers / (median(seconds[cell.label]["node"]) - nothing)

    full = {cell.where: rate(cell) for cell in alone[1:]}
    # A device posts messages to all others but the first, which is in the latency. The cores post those of all devices,
    # so that each waits for its turn.
    message_seconds = (median(seconds[smallest.label]["flat"]) - nothing) / (shape.num_devices - shape.local)
    latency_seconds = max(message_seconds, nothing - (shape.local - 2) * message_seconds)
    return shaped_platform(
        shape,
        inside_bytes_per_second=full["inside"],
        between_bytes_per_second=full["between"],
        message_seconds=message_seconds,
        latency_seconds=latency_seconds,
    )


def shaped_platform(
    shape: Shape,
    *,
    inside_bytes_per_second: float,
    between_bytes_per_second: float,
    message_seconds: float,
    latency_seconds: float,
) -> Platform:
    """The shaped network, with rates per device inside of nodes and between them, and what messages cost a device."""
    alike = dict(latency_seconds=latency_seconds, message_seconds=message_seconds)
    return Platform(
        name="namespaces",
        description="network namespaces of one machine on shaped links",
        device=Device(),
        devices_per_node=shape.local,
        devices_per_nic=shape.local,
        links=(
            Link(name="node", devices=shape.local, bytes_per_second=inside_bytes_per_second, **alike),
            Link(name="wire", devices=shape.num_devices, bytes_per_second=between_bytes_per_second, **alike),
        ),
    )


def message_cpu_seconds(platform: Platform, shape: Shape) -> float:
    """The fitted number: what a message costs a core."""
    return platform.links[-1].message_seconds * shape.cores / shape.num_devices


def simulated(platform: Platform, shape: Shape, cells: Sequence[Cell], seconds: Seconds) -> list[Point]:
    """Every raw all-to-all over all devices, simulated and measured."""
    return [
        Point(
            cell.pair_bytes,
            name,
            # The phases of ours follow one another.
            simulate_all_to_all(
                platform, shape.nodes, cell.pair_bytes * shape.num_devices, name, near_beside=False
            ),
            median(seconds[cell.label][name]),
        )
        for cell in cells
        if isinstance(cell, Exchange)
        for name in ALGORITHMS
    ]


def geometric_mean_error(points: Sequence[Point]) -> float:
    """Geometric mean of the error factors."""
    return exp(sum(log(point.error_factor) for point in points) / len(points))


def choices(platform: Platform, shape: Shape, cells: Sequence[Cell], seconds: Seconds) -> list[Choice]:
    """What the planner chooses in every cell among what was measured and drops nothing, beside the quickest."""
    found = []
    for cell in cells:
        if isinstance(cell, NodeExchange):
            continue
        taken = seconds[cell.label]
        if isinstance(cell, Layer):
            taken = {name: taken[name] for name in cell.lossless}
        chosen = _choice(platform, shape, cell)
        best = min(taken, key=lambda name: median(taken[name]))
        found.append(Choice(cell.label, chosen, best, paired_ratio(taken[best], taken[chosen])))
    return found


def _choice(platform: Platform, shape: Shape, cell: Exchange | Layer) -> str:
    factors = (1, shape.nodes, shape.local)
    if isinstance(cell, Exchange):
        num_bytes = float(cell.pair_bytes * shape.num_devices)
        cost = {name: all_to_all(platform, factors, num_bytes, algorithm=name).seconds for name in ALGORITHMS}
    else:
        cost = {name: _there_and_back(platform, shape, cell, way) for name, way in cell.lossless.items()}
    return min(cost, key=lambda name: cost[name])


def _there_and_back(platform: Platform, shape: Shape, cell: Layer, way: Variant) -> float:
    """Seconds of dispatch and combine, later passes included."""
    one_way = dispatch_transfer(
        platform,
        expert_factors=(1, shape.nodes, shape.local),
        tokens=cell.tokens,
        row_bytes=cell.row_bytes,
        num_experts=cell.num_experts,
        experts_per_token=cell.experts_per_token,
        dispatcher=way.dispatch,
        chunks=way.chunks,
        capacity_factor=way.capacity_factor,
    ).seconds
    share = Share(
        sequences=1,
        seq_len=cell.tokens,
        expert=shape.num_devices,
        nodes=shape.nodes,
        dispatch=way.dispatch,
        dispatch_chunks=way.chunks,
        capacity_factor=way.capacity_factor,
        overflow=way.overflow,
    )
    ffn = MoEFFN(num_experts=cell.num_experts, experts_per_token=cell.experts_per_token, d_ff=cell.d_model)
    later = later_passes(platform, share, ffn, imbalance=1.0)
    seconds, _ = later.beside(2 * one_way, 0.0, there=0.0, again=0.0, chunks=way.chunks)
    return seconds
