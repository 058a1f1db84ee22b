"""This file is the cost of collectives: seconds and bytes per link level of everything that crosses the network.

A mesh axis puts the members of a group at a fixed stride; the levels of the platform say which members share a
package, a node, a switch, and so on. Costs are alpha-beta per level, in closed form: O(levels), no simulation
(`network_simulation` checks them). Every group of the mesh runs the same collective at the same time, and the
platform's rates are per device with all devices talking, so that groups that share a node or a network interface
need no further correction; a level with a taper leaves that fraction to each device. Simulated devices send nothing,
they share a memory: `shared_memory`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, log2
from typing import Any

import numpy as np

from meshes.platform import Link, Platform
from piperjax.planner.locality import Group, Layout, group_layout, layout_of
from piperjax.planner.shared_memory import (
    PASSES_OF_ALL_TO_ALL,
    PASSES_OF_GATHER,
    PASSES_OF_PERMUTE,
    meeting_seconds,
    passes_of_all_reduce,
    shared_link,
)

SELF = "self"
ALGORITHMS = ("flat", "halo2", "halo3")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What one collective costs.

    Attributes:
      seconds: from the start to the end of the slowest device; a number, or an array where bytes were one.
      bytes_by_level: bytes that a device sends over each link by its name, on average over devices; "self" is what
        stays on the device.
      notes: reservations, such as bytes outside the range that was measured on a link.
    """

    seconds: Any
    bytes_by_level: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sent_bytes(self) -> Any:
        """Bytes that leave the device."""
        return sum(sent for level, sent in self.bytes_by_level.items() if level != SELF)


# --- what levels cost ------------------------------------------------------------------------------------------


def _wire_seconds(platform: Platform, sent: Sequence[Any]) -> Any:
    """Seconds until the busiest resource has passed the bytes that every device sends over each level.

    Links inside a node are separate wires. Beyond the node, what crosses an outer level also passes the network
    interface and the levels within: the resource of a level carries the bytes of that level and of all outside it.
    """
    seconds, outward = 0.0, 0.0
    for link, level_bytes in zip(reversed(platform.links), reversed(sent), strict=True):
        outside = link.devices > platform.devices_per_node
        outward = outward + level_bytes
        carried = outward if outside else level_bytes
        seconds = _larger(seconds, carried / (link_rate(link) * link.taper_fraction))
    return seconds


def link_rate(link: Link) -> float:
    """Bytes per second, per device and direction, that collectives reach with large messages, not tapered."""
    return link.bytes_per_second * link.efficiency


def _larger(a: Any, b: Any) -> Any:
    return np.maximum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else max(a, b)


def _any(amount: Any) -> bool:
    return bool(amount.any() if isinstance(amount, np.ndarray) else amount)


def _transfer(platform: Platform, seconds: Any, sent: Sequence[Any], *, own_bytes: Any = None) -> Transfer:
    used = [
        (link, level_bytes)
        for link, level_bytes in zip(platform.links, sent, strict=True)
        if _any(level_bytes)
    ]
    by_level = {link.name: level_bytes for link, level_bytes in used}
    notes = tuple(
        f"link '{link.name}': sizes outside those that were measured, so its time is extrapolated"
        for link, level_bytes in used
        if (link.smallest_bytes or link.largest_bytes) and not np.all(link.covers(level_bytes))
    )
    if own_bytes is not None:
        by_level[SELF] = own_bytes
    return Transfer(seconds=seconds, bytes_by_level=by_level, notes=notes)


# --- reductions, gathers and neighbour exchange ------------------------------------------------------------------


def all_gather(platform: Platform, group: Group, num_bytes: Any) -> Transfer:
    """Every device ends with the full buffer of `num_bytes`, of which it holds 1 / size.

    A ring through the members in order, on as many channels as a node has members, as NCCL and RCCL run it: a device
    sends `num_bytes (n - 1) / n`, of which `num_bytes (1 / m' - 1 / m)` over a level that joins m members where the
    level within joins m'. It waits for n - 1 hops.
    """
    layout = group_layout(platform, group)
    sent = _ring_bytes(layout, num_bytes)
    if memory := shared_link(platform.links, _ring_bytes(layout, 1.0)):
        seconds = meeting_seconds(memory, layout.size, num_bytes, passes=PASSES_OF_GATHER)
    else:
        seconds = _ring_latency(platform, layout) + _wire_seconds(platform, sent)
    return _transfer(platform, seconds, sent)


def reduce_scatter(platform: Platform, group: Group, num_bytes: Any) -> Transfer:
    """Every device ends with its 1 / size of the sum of full buffers of `num_bytes`; costs what `all_gather` does."""
    return all_gather(platform, group, num_bytes)


def all_reduce(platform: Platform, group: Group, num_bytes: Any) -> Transfer:
    """Every device ends with the sum of full buffers of `num_bytes`.

    Moves twice the bytes of `all_gather`. Small buffers go through trees, whose depth is logarithmic in the members
    of each level, as NCCL's double binary trees are between nodes; large ones through the ring, if it is shorter.
    """
    layout = group_layout(platform, group)
    sent = [2 * part for part in _ring_bytes(layout, num_bytes)]
    if memory := shared_link(platform.links, _ring_bytes(layout, 1.0)):
        seconds = meeting_seconds(memory, layout.size, num_bytes, passes=passes_of_all_reduce(layout.size))
    else:
        latency = 2 * min(_ring_latency(platform, layout), _tree_latency(platform, layout))
        seconds = latency + _wire_seconds(platform, sent)
    return _transfer(platform, seconds, sent)


def _ring_bytes(layout: Layout, num_bytes: Any) -> list[Any]:
    return [num_bytes * (1 / inner - 1 / n) for inner, n in layout.steps]


def _ring_latency(platform: Platform, layout: Layout) -> float:
    hops = _ring_bytes(layout, layout.size)
    return sum(count * link.latency_seconds for count, link in zip(hops, platform.links, strict=True))


def _tree_latency(platform: Platform, layout: Layout) -> float:
    levels = zip(layout.steps, platform.links, strict=True)
    return sum(ceil(log2(n / inner)) * link.latency_seconds for (inner, n), link in levels)


def permute(platform: Platform, group: Group, num_bytes: Any) -> Transfer:
    """Every device sends `num_bytes` to the next member of its group; the pair that is furthest apart decides.

    Of the devices inside an instance of the level within, `stride` send over the furthest level, so that a tapered
    level is a limit only where these are enough to fill it. Bytes are those of that pair.
    """
    if group.size == 1:
        return Transfer(seconds=0.0 * num_bytes)
    layout = group_layout(platform, group)
    level = next(i for i, n in enumerate(layout.members) if n == group.size)
    link = platform.links[level]
    inner = platform.links[level - 1].devices if level else 1
    share = min(1.0, group.stride / inner)
    rates = [min(link_rate(link), link_rate(link) * link.taper_fraction / share)]
    rates += [link_rate(way) for way in platform.links[:level] if way.devices > platform.devices_per_node]
    seconds = link.latency_seconds + num_bytes / min(rates)
    if link.medium == "memory":
        everyone = max(group.num_devices, group.size * group.stride)
        seconds = meeting_seconds(link, everyone, num_bytes, passes=PASSES_OF_PERMUTE)
    sent = [num_bytes if i == level else 0.0 for i in range(len(platform.links))]
    return _transfer(platform, seconds, sent)


# --- all-to-all ------------------------------------------------------------------------------------------------


def all_to_all(
    platform: Platform,
    group_or_factors: Group | tuple[int, int, int],
    num_bytes: Any,
    *,
    algorithm: str = "flat",
    chunks: int = 1,
) -> Transfer:
    """Every device sends `num_bytes` in equal parts to all members, itself included.

    flat: one message to every other member. halo2 and halo3 are those of `halo`, with every row sent for itself;
    only halo2 can be cut into chunks.

    Raises:
      ValueError: if there is no such algorithm.
    """
    check_algorithm(algorithm)
    if chunks != 1 and algorithm != "halo2":
        raise ValueError(f"only halo2 is cut into chunks, got {chunks} for {algorithm}; leave chunks at 1")
    layout = layout_of(platform, group_or_factors)
    part = num_bytes / layout.size
    if algorithm == "flat":
        seconds, sent = _messages(platform, layout.peers, part)
        return _transfer(platform, seconds, sent, own_bytes=part)
    far = part * (layout.size - layout.local)
    return halo(
        platform, group_or_factors, near_bytes=part * layout.local, far_bytes=far, spread_bytes=far,
        striped=algorithm == "halo3", chunks=chunks,
    )  # fmt: skip


def check_algorithm(algorithm: str) -> None:
    """Raises ValueError if there is no such algorithm."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"an all-to-all is one of {', '.join(ALGORITHMS)}, got {algorithm!r}")


def halo(
    platform: Platform,
    group_or_factors: Group | tuple[int, int, int],
    *,
    near_bytes: Any,
    far_bytes: Any,
    spread_bytes: Any,
    striped: bool = False,
    chunks: int = 1,
) -> Transfer:
    """The hierarchical all-to-all, in phases (Piper, section on HALO).

    Phase I exchanges inside the node what stays there (`near_bytes`, own part included), beside phase II, which sends
    `far_bytes` to other nodes, one message to the device of the same local index in each; then phase III spreads
    inside the destination node the `spread_bytes` that a device received. Without de-duplication these are the bytes
    that arrived, else more.

    Striped, phase I also moves what leaves to a leader for each pair of nodes, local index (n + m) mod local; a device
    then sends 1 / local as many messages, local times as large. With fewer nodes than that, several leaders share a
    pair.

    In chunks, phase III of one runs beside phase II of the next: the longer of the two counts in full and the other
    for one chunk, with as many times the messages.

    Raises:
      ValueError: if what is striped should be cut into chunks, which keep the same wires busy in all phases.
    """
    if chunks < 1 or (striped and chunks > 1):
        raise ValueError(f"phases that are not striped can be cut into chunks, one or more, got {chunks}")
    layout = layout_of(platform, group_or_factors)
    local, num_nodes = layout.local, layout.size // layout.local
    within, beyond = _peers(layout)
    if num_nodes == 1:
        seconds, sent = _messages(platform, within, near_bytes / local)
        return _transfer(platform, seconds, sent, own_bytes=near_bytes / local)
    per_node = far_bytes / (num_nodes - 1)
    spread, sent_last = _messages(platform, within, spread_bytes / local, chunks=chunks)
    if striped and local > 1:
        gathered, sent_first = _messages(platform, within, (near_bytes + far_bytes) / local)
        crossed, sent_far = _between_leaders(platform, layout, per_node)
        seconds = gathered + crossed + spread
    else:
        beside, sent_first = _messages(platform, within, near_bytes / local, chunks=chunks)
        crossed, sent_far = _messages(platform, beyond, per_node, chunks=chunks)
        crossed = _larger(beside, crossed)
        seconds = _larger(crossed + spread / chunks, crossed / chunks + spread)
    sent = [sum(parts) for parts in zip(sent_first, sent_far, sent_last, strict=True)]
    return _transfer(platform, seconds, sent, own_bytes=near_bytes / local)


def leaders_of_a_pair(num_nodes: int, local: int) -> int:
    """Devices of a node that share what it sends to another, striped: one, or with few nodes as many as there are."""
    return local // min(num_nodes, local)


def handed_fraction(num_nodes: int, local: int) -> float:
    """Bytes that devices hand to leaders over those they have for all nodes: 1 where leaders share pairs evenly.

    Every device of a node is handed as much in every round, also one that leads no pair in it.
    """
    rounds = ceil(num_nodes / min(num_nodes, local))
    return local * rounds / (leaders_of_a_pair(num_nodes, local) * num_nodes)


def inside_nodes(
    platform: Platform, group_or_factors: Group | tuple[int, int, int], num_bytes: Any
) -> Transfer:
    """Every device sends `num_bytes` in equal parts to the members of its node, itself included."""
    layout = layout_of(platform, group_or_factors)
    part = num_bytes / layout.local
    within, _ = _peers(layout)
    return _transfer(platform, *_messages(platform, within, part), own_bytes=part)


def between_nodes(
    platform: Platform,
    group_or_factors: Group | tuple[int, int, int],
    num_bytes: Any,
    *,
    striped: bool = False,
) -> Transfer:
    """Every device sends `num_bytes` in equal parts to the devices of its local index in all nodes, itself included.

    Striped, it hands them to the leaders of the pairs of nodes, these send what they have of their node, and hand out
    what they receive: all bytes also move inside, twice, those for the own node as well. So it may be bytes for all
    devices of all nodes, not only for those of its index. (`halo` has what stays in the node move there once.)
    """
    layout = layout_of(platform, group_or_factors)
    local, num_nodes = layout.local, layout.size // layout.local
    part = num_bytes / num_nodes
    within, beyond = _peers(layout)
    if not striped or local == 1 or num_nodes == 1:
        return _transfer(platform, *_messages(platform, beyond, part), own_bytes=part)
    each = handed_fraction(num_nodes, local) * num_bytes / local
    handed, sent_inside = _messages(platform, within, each)
    crossed, sent_far = _between_leaders(platform, layout, part)
    sent = [2 * near + far for near, far in zip(sent_inside, sent_far, strict=True)]
    return _transfer(platform, 2 * handed + crossed, sent, own_bytes=part + 2 * each)


def _between_leaders(platform: Platform, layout: Layout, per_node: Any) -> tuple[Any, list[Any]]:
    """Seconds and bytes by level of leaders, who send for all devices of a node what each has for another."""
    local, num_nodes = layout.local, layout.size // layout.local
    _, beyond = _peers(layout)
    rounds = ceil((num_nodes - 1) / local)
    fewer = tuple(count * rounds / (num_nodes - 1) for count in beyond)
    seconds, _ = _messages(platform, fewer, per_node * local / leaders_of_a_pair(num_nodes, local))
    # Some leaders have nothing to send, those of a node and itself; bytes are counted on average.
    return seconds, [count * per_node for count in beyond]


def _peers(layout: Layout) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Other members of the node by level, and nodes beyond it by level."""
    within = tuple(max(0, min(n, layout.local) - min(inner, layout.local)) for inner, n in layout.steps)
    beyond = tuple(max(0, n - max(inner, layout.local)) // layout.local for inner, n in layout.steps)
    return within, beyond


def _messages(
    platform: Platform, peers: Sequence[float], part_bytes: Any, *, chunks: int = 1
) -> tuple[Any, list[Any]]:
    """Seconds and bytes by level of sending `part_bytes` to each of the peers at every level, in messages by chunk.

    A device posts one message after the other, while those already posted are on the wire; posting the first is in
    the latency. The last ends when the wire has passed all, or alone has to pass once all are posted.
    """
    sent = [count * part_bytes for count in peers]
    used = [(count, link) for count, link in zip(peers, platform.links, strict=True) if count]
    if not used:
        return 0.0 * part_bytes, sent
    furthest = used[-1][1]
    if furthest.medium == "memory":
        members = 1 + sum(count for count, _ in used)
        seconds = meeting_seconds(furthest, members, members * part_bytes, passes=PASSES_OF_ALL_TO_ALL)
        return seconds, sent
    posting = chunks * sum(count * link.message_seconds for count, link in used) - furthest.message_seconds
    wire = _wire_seconds(platform, sent)
    last = wire / (chunks * sum(count for count, _ in used))
    return furthest.latency_seconds + _larger(wire, posting + last), sent
