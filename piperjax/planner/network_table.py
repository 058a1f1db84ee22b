"""This file is the table of `python -m piperjax simulate`: all-to-alls on a machine, by size and nodes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from meshes.platform import Platform
from piperjax.planner.collectives import all_to_all
from piperjax.planner.locality import Group
from piperjax.planner.network_simulation import num_messages, simulate_all_to_all
from piperjax.planner.routing import expected_nodes

# A simulation of this many messages takes a few seconds and 2 GB; beyond, the closed form answers.
MOST_MESSAGES = 5_000_000
CHUNKS = (1, 4)


class Row(NamedTuple):
    """One size on one number of nodes.

    Attributes:
      num_bytes: what a device sends in all, itself included.
      num_nodes: nodes that take part.
      seconds: by algorithm; halo2 in the better number of chunks; halo2_dedup where experts are given.
      closed: algorithms whose seconds are those of the closed form.
      speedups: flat over the quickest of the others, without de-duplication, for each cost of a message.
    """

    num_bytes: float
    num_nodes: int
    seconds: dict[str, float]
    closed: tuple[str, ...]
    speedups: tuple[float, ...]


def table_row(
    platform: Platform,
    num_bytes: float,
    num_nodes: int,
    alphas: Sequence[float],
    *,
    experts: tuple[int, int] | None = None,
) -> Row:
    """Simulates one size on one number of nodes, with the first message cost and, for speed-ups, with all."""
    closed: list[str] = []
    tables = [_seconds(with_alpha(platform, alpha), num_bytes, num_nodes, closed) for alpha in alphas]
    seconds = dict(tables[0])
    if experts and experts[0] % (num_nodes * platform.devices_per_node) == 0:
        fraction = expected_nodes(*experts, num_nodes) / experts[1]
        first = with_alpha(platform, alphas[0])
        if _chunks(platform, num_nodes, "halo2"):
            seconds["halo2_dedup"] = _halo2(first, num_bytes, num_nodes, min(1.0, fraction))
    return Row(
        num_bytes,
        num_nodes,
        seconds,
        tuple(dict.fromkeys(closed)),
        tuple(table["flat"] / min(table["halo2"], table["halo3"]) for table in tables),
    )


def with_alpha(platform: Platform, message_seconds: float) -> Platform:
    """The same machine with another cost of a further message between nodes; latencies are at least that."""
    links = tuple(
        link
        if link.devices <= platform.devices_per_node
        else replace(
            link, message_seconds=message_seconds, latency_seconds=max(link.latency_seconds, message_seconds)
        )
        for link in platform.links
    )
    return replace(platform, links=links)


def report(platform: Platform, rows: Sequence[Row], alphas: Sequence[float]) -> str:
    """The table as text."""
    names = [
        name for name in ("flat", "halo2", "halo3", "halo2_dedup") if any(name in row.seconds for row in rows)
    ]
    columns = "".join(f"{name:>12s}" if name == "flat" else f"{name:>19s}" for name in names)
    costs = "".join(f"{show_seconds(alpha):>10s}" for alpha in alphas)
    title = f"all-to-all on {platform.name}, {platform.devices_per_node} devices a node"
    lines = [
        f"{title}: simulated, not a measurement and not a reproduction of one",
        f"milliseconds and speed-up over flat; a further message between nodes costs {show_seconds(alphas[0])}",
        f"{'':21s}{'':{len(columns)}s}   best speed-up if it costs",
        f"{'bytes a device':>14s}{'nodes':>7s}{columns}{costs}",
    ]
    for row in rows:
        cells = "".join(_cell(row, name) for name in names)
        best = "".join(f"{speedup:9.2f}x" for speedup in row.speedups)
        lines.append(f"{show_bytes(row.num_bytes):>14s}{row.num_nodes:7d}{cells}{best}")
    return "\n".join([*lines, *_footnotes(rows, names)])


def _footnotes(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    lines = [
        "halo2 is the quicker of 1 and 4 chunks. Large flat exchanges of few nodes queue here at their destinations;",
        "a library that shares an interface fairly between messages is as quick as halo2 there.",
    ]
    if any(row.closed for row in rows):
        lines.append(f"* closed form: a simulation would follow more than {MOST_MESSAGES:,} messages")
    if any(name not in row.seconds for row in rows for name in names):
        lines.append("- the experts do not divide over the devices")
    return lines


def _cell(row: Row, name: str) -> str:
    seconds = row.seconds.get(name)
    if seconds is None:
        return f"{'-':>12s}{'':7s}"
    mark = "*" if name in row.closed else " "
    cell = f"{seconds * 1e3:11.3f}{mark}"
    return cell if name == "flat" else f"{cell}{row.seconds['flat'] / seconds:6.2f}x"


def _seconds(platform: Platform, num_bytes: float, num_nodes: int, closed: list[str]) -> dict[str, float]:
    """Seconds by algorithm; names those that are closed forms in `closed`."""
    seconds = {}
    for name, simulated in _ALGORITHMS.items():
        if _chunks(platform, num_nodes, name):
            seconds[name] = simulated(platform, num_bytes, num_nodes)
        else:
            group = Group(num_nodes * platform.devices_per_node)
            seconds[name] = float(all_to_all(platform, group, num_bytes, algorithm=name).seconds)
            closed.append(name)
    return seconds


def _chunks(platform: Platform, num_nodes: int, algorithm: str) -> list[int]:
    messages = num_messages(num_nodes, platform.devices_per_node, algorithm)
    return [c for c in CHUNKS if c * messages <= MOST_MESSAGES]


def _halo2(platform: Platform, num_bytes: float, num_nodes: int, far_fraction: float = 1.0) -> float:
    return min(
        simulate_all_to_all(platform, num_nodes, num_bytes, "halo2", chunks=c, far_fraction=far_fraction)
        for c in _chunks(platform, num_nodes, "halo2")
    )


_ALGORITHMS: dict[str, Callable[[Platform, float, int], float]] = {
    "flat": lambda platform, num_bytes, nodes: simulate_all_to_all(platform, nodes, num_bytes, "flat"),
    "halo2": _halo2,
    "halo3": lambda platform, num_bytes, nodes: simulate_all_to_all(platform, nodes, num_bytes, "halo3"),
}


def show_bytes(num_bytes: float) -> str:
    """Bytes in the largest decimal unit that fits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:g} {unit}"
    return f"{num_bytes:g} B"


def show_seconds(seconds: float) -> str:
    """Seconds in microseconds."""
    return f"{seconds * 1e6:g} us"
