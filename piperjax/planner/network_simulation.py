"""This file is the discrete-event simulation of all-to-alls: every message, through every queue on its way.

A message is posted by its device, one after the other, and passes the network interface of its source, the uplinks of
the tapered levels that it leaves and enters, and the interface of its destination; inside a node it passes the port of
its source and that of its destination. Each of these is a first-in, first-out queue with the platform's rate. The head
of a message moves on as soon as it is served (virtual cut-through). As queues feed forward only, each is solved exactly
for all messages at once: the end of message i is `max(arrival_i, end_(i-1)) + service_i`, which over a queue in order
of arrival is a running maximum.

What it leaves out: adaptive routing and detours, back-pressure, channels and chunks of communication libraries, and
global links by pair of groups. It is a simulation, not a measurement.
"""

from typing import NamedTuple

import numpy as np

from meshes.platform import Platform
from piperjax.planner.collectives import check_algorithm, leaders_of_a_pair, link_rate


def simulate_all_to_all(
    platform: Platform,
    num_nodes: int,
    bytes_per_device: float,
    algorithm: str = "flat",
    *,
    chunks: int = 1,
    far_fraction: float = 1.0,
    near_beside: bool = True,
) -> float:
    """Seconds of an all-to-all over all devices of `num_nodes` nodes, until the slowest device is done.

    Args:
      platform: the machine.
      num_nodes: nodes that take part, with all their devices.
      bytes_per_device: what a device sends in equal parts to all devices, itself included.
      algorithm: "flat", "halo2" or "halo3", as in `collectives.all_to_all`. Phases are chained per device.
      chunks: parts into which halo2 cuts the bytes, so that phase III of one runs beside phase II of the next.
      far_fraction: part of the bytes between nodes that is left by de-duplication; inside nodes all are sent.
      near_beside: whether halo2 moves what stays in the node beside phase II, as phase I. If not it waits for phase III
        with the rest, as in two plain all-to-alls over a mesh axis each: fewer messages, but nothing in their shadow.

    Raises:
      ValueError: if there is no such all-to-all.
    """
    check_algorithm(algorithm)
    if num_nodes < 1 or chunks < 1 or bytes_per_device <= 0 or not 0 < far_fraction <= 1:
        raise ValueError(
            "a simulation needs at least one node, one chunk, a byte to send and a far_fraction in (0, 1], got "
            f"{num_nodes} nodes, {chunks} chunks, {bytes_per_device} bytes, far_fraction {far_fraction}"
        )
    if chunks > 1 and algorithm != "halo2":
        raise ValueError(f"only halo2 is cut into chunks, got {chunks} for {algorithm}; leave chunks at 1")
    local = platform.devices_per_node
    num_devices = num_nodes * local
    if num_devices > 1 and (not platform.links or num_devices > platform.links[-1].devices):
        reach = platform.links[-1].devices if platform.links else 1
        raise ValueError(f"platform '{platform.name}' joins at most {reach} devices, got {num_devices}")
    begin = np.zeros((num_devices, chunks))
    part = bytes_per_device / num_devices / chunks
    if algorithm == "flat" or num_nodes == 1 or local == 1:
        return float(_phase(platform, _everyone(num_devices, num_devices), part, begin).max())
    inside = _everyone(num_devices, local)
    far = part * far_fraction
    spread = part * (num_nodes - 1)
    if algorithm == "halo3":
        gathered = _phase(platform, inside, part + far * (num_nodes - 1), begin)
        arrived = _phase(
            platform,
            _leaders(num_nodes, local),
            far * local**2 / leaders_of_a_pair(num_nodes, local),
            gathered,
        )
    else:
        arrived = _phase(platform, _same_index(num_nodes, local), far * local, begin)
        if near_beside:
            arrived = np.maximum(arrived, _phase(platform, inside, part, begin))
        else:
            spread += part
    return float(_phase(platform, inside, spread, arrived).max())


def num_messages(num_nodes: int, devices_per_node: int, algorithm: str) -> int:
    """Messages that `simulate_all_to_all` follows; a million takes about a second."""
    devices = num_nodes * devices_per_node
    if algorithm == "flat":
        return devices * (devices - 1)
    inside = devices * (devices_per_node - 1)
    far = devices * (num_nodes - 1)
    striped = far // devices_per_node * leaders_of_a_pair(num_nodes, devices_per_node)
    return 2 * inside + (far if algorithm == "halo2" else striped)


# --- who sends to whom: [devices, messages of each], in the order in which they are posted; -1 for none -----------


def _everyone(num_devices: int, block: int) -> np.ndarray:
    """All members of a block of consecutive devices, beginning with the next one."""
    device = np.arange(num_devices)[:, None]
    return device // block * block + (device + np.arange(1, block)) % block


def _same_index(num_nodes: int, local: int) -> np.ndarray:
    """The device of the same local index in every other node, beginning with the next node."""
    device = np.arange(num_nodes * local)[:, None]
    return (device + local * np.arange(1, num_nodes)) % (num_nodes * local)


def _leaders(num_nodes: int, local: int) -> np.ndarray:
    """The nodes to which a device is leader.

    Local index r of node n leads to every m with (n + m) mod local = r. With fewer nodes than devices in a node several
    share a pair, those with (n + m) mod num_nodes = r mod num_nodes.
    """
    shares = leaders_of_a_pair(num_nodes, local)
    node, step, share = (axis.ravel() for axis in np.indices((num_nodes, num_nodes - 1, shares)))
    other = (node + step + 1) % num_nodes
    index = (node + other) % min(num_nodes, local) + min(num_nodes, local) * share
    leader = node * local + index
    order = np.argsort(leader, kind="stable")
    counts = np.bincount(leader, minlength=num_nodes * local)
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    peers = np.full((num_nodes * local, counts.max()), -1)
    peers[leader[order], place] = (other * local + index)[order]
    return peers


# --- what happens to the messages ----------------------------------------------------------------------------


class _Messages(NamedTuple):
    """Messages of equal size, an element [messages] each: devices, the link that joins them, when each is posted."""

    source: np.ndarray
    target: np.ndarray
    level: np.ndarray
    start: np.ndarray

    def where(self, chosen: np.ndarray) -> "_Messages":
        return _Messages(*(column[chosen] for column in self))


def _phase(platform: Platform, peers: np.ndarray, part_bytes: float, ready: np.ndarray) -> np.ndarray:
    """When every device has sent and received all messages of `part_bytes` of each chunk.

    A device posts a message to each of its `peers` [devices, messages] for every chunk, which it may begin at `ready`
    [devices, chunks]. Returns [devices, chunks].
    """
    chunks = ready.shape[1]
    source, chunk, target = np.broadcast_arrays(
        np.arange(len(peers))[:, None, None], np.arange(chunks)[:, None], peers[:, None, :]
    )
    there = target >= 0
    level = _levels(platform, source, np.where(there, target, source))
    cost = np.array([link.message_seconds for link in platform.links])
    costs = np.where(there, cost[level], 0.0)
    # The first is posted at once; what it costs is what the next one waits.
    posting = np.cumsum(costs, axis=2) - costs
    free = np.zeros(len(peers))
    for i in range(chunks):
        posting[:, i] += np.maximum(ready[:, i], free)[:, None]
        free = posting[:, i, -1] + costs[:, i, -1]
    messages = _Messages(source[there], target[there], level[there], posting[there])
    end = _passage(platform, messages, part_bytes)
    done = ready.copy().reshape(-1)
    for device in (messages.source, messages.target):
        np.maximum.at(done, device * chunks + chunk[there], end)
    return done.reshape(ready.shape)


def _passage(platform: Platform, messages: _Messages, part_bytes: float) -> np.ndarray:
    """When each message has arrived."""
    level = messages.level
    end = np.empty(len(level))
    outside = np.array([link.devices > platform.devices_per_node for link in platform.links])[level]
    for chosen, way in ((~outside, _through_node), (outside, _through_network)):
        if chosen.any():
            end[chosen] = way(platform, messages.where(chosen), part_bytes)
    return end + np.array([link.latency_seconds for link in platform.links])[level]


def _levels(platform: Platform, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The innermost link that joins each pair."""
    level = np.zeros(source.shape, np.int8)
    for link in platform.links[:-1]:
        level += source // link.devices != target // link.devices
    return level


def _through_node(platform: Platform, messages: _Messages, part_bytes: float) -> np.ndarray:
    """Ends of messages inside a node, each level of which has a port at every device."""
    source, target, level, start = messages
    service = part_bytes / np.array([link_rate(link) for link in platform.links])[level]
    ports = len(platform.links)
    start, end = _queue(source * ports + level, start, service)
    return np.maximum(_queue(target * ports + level, start, service)[1], end)


def _through_network(platform: Platform, messages: _Messages, part_bytes: float) -> np.ndarray:
    """Ends of messages between nodes: source interface, uplinks and downlinks that are tapered, and destination's."""
    source, target, level, start = messages
    links, shared = platform.links, platform.devices_per_nic or 1
    first = next(i for i, link in enumerate(links) if link.devices > platform.devices_per_node)
    service = np.full(len(source), part_bytes / (link_rate(links[first]) * shared))
    start, end = _queue(source // shared, start, service)
    limits = [
        i
        for i in range(first, len(links))
        if links[i].taper_fraction < 1 or link_rate(links[i]) < link_rate(links[first])
    ]
    for side, order in ((source, limits), (target, limits[::-1])):
        for i in order:
            inner = links[i - 1].devices if i else 1
            crossing = level >= i
            if not crossing.any():
                continue
            up = np.full(crossing.sum(), part_bytes / (link_rate(links[i]) * links[i].taper_fraction * inner))
            start[crossing], passed = _queue(side[crossing] // inner, start[crossing], up)
            end[crossing] = np.maximum(end[crossing], passed)
    return np.maximum(_queue(target // shared, start, service)[1], end)


def _queue(server: np.ndarray, arrival: np.ndarray, service: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """When each message starts and ends at its first-in, first-out server (Lindley's recursion, solved at once)."""
    # One sort by server and arrival: servers are further apart than arrivals.
    order = np.argsort(server * (2 * arrival.max() + 1.0) + arrival, kind="stable")
    a, s = arrival[order], service[order]
    first = np.flatnonzero(np.diff(server[order], prepend=-1))
    queue = np.repeat(np.arange(len(first)), np.diff(first, append=len(a)))
    before = np.cumsum(s) - s
    before -= before[first][queue]
    slack = a - before
    apart = queue * (slack.max() - slack.min() + 1e-6)
    begin = np.maximum.accumulate(slack + apart) - apart + before
    start, end = np.empty(len(a)), np.empty(len(a))
    start[order], end[order] = begin, begin + s
    return start, end
