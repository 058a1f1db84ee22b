"""This file is `python -m piperjax simulate`: flat and hierarchical all-to-alls on a machine, by size and nodes."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from meshes.platform import Platform, known_platforms, load_platform
from piperjax.planner.collectives import all_to_all
from piperjax.planner.locality import Group
from piperjax.planner.network_simulation import num_messages, simulate_all_to_all
from piperjax.planner.routing import expected_nodes

# A simulation of this many messages takes a few seconds and 2 GB; beyond, the closed form answers.
MOST_MESSAGES = 5_000_000
CHUNKS = (1, 4)
ALPHA_FACTORS = (0.25, 1.0, 4.0)

_BYTES = {"": 1, "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SECONDS = {"": 1, "s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("what", choices=("alltoall",), help="what to simulate")
    parser.add_argument(
        "--platform", default="frontier", help=f"{', '.join(known_platforms())}, or a .toml file"
    )
    parser.add_argument(
        "--nodes",
        default="2,4,8,16,32,64,128",
        metavar="N,N",
        help="nodes that take part, all devices of each",
    )
    parser.add_argument(
        "--bytes",
        default="1MB,8MB,64MB",
        metavar="S,S",
        help="bytes that a device sends in all, such as 8MB,64MiB",
    )
    parser.add_argument(
        "--alpha",
        metavar="T,T",
        help="costs of a further message between nodes to compare, such as 5us,15us; the first makes the table "
        "(default: the platform's, a quarter and four times of it)",
    )
    parser.add_argument(
        "--experts", metavar="E,K", help="also de-duplicate tokens that take K of E experts, such as 256,8"
    )
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit code.

    Raises:
      ValueError: if a flag is wrong.
    """
    platform = load_platform(args.platform)
    sizes = [_quantity("--bytes", text, _BYTES) for text in args.bytes.split(",")]
    nodes = [int(_quantity("--nodes", text, {"": 1})) for text in args.nodes.split(",")]
    alphas = _alphas(platform, args.alpha)
    experts = None
    if args.experts:
        experts = tuple(int(_quantity("--experts", text, {"": 1})) for text in args.experts.split(","))
        if len(experts) != 2:
            raise ValueError(
                f"--experts takes two numbers, experts and experts per token, got {args.experts!r}"
            )
    rows = [table_row(platform, size, n, alphas, experts=experts) for size in sizes for n in nodes]
    print(report(platform, rows, alphas))
    return 0


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
    costs = "".join(f"{_time(alpha):>10s}" for alpha in alphas)
    title = f"all-to-all on {platform.name}, {platform.devices_per_node} devices a node"
    lines = [
        f"{title}: simulated, not a measurement and not a reproduction of one",
        f"milliseconds and speed-up over flat; a further message between nodes costs {_time(alphas[0])}",
        f"{'':21s}{'':{len(columns)}s}   best speed-up if it costs",
        f"{'bytes a device':>14s}{'nodes':>7s}{columns}{costs}",
    ]
    for row in rows:
        cells = "".join(_cell(row, name) for name in names)
        best = "".join(f"{speedup:9.2f}x" for speedup in row.speedups)
        lines.append(f"{_size(row.num_bytes):>14s}{row.num_nodes:7d}{cells}{best}")
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


def _alphas(platform: Platform, text: str | None) -> list[float]:
    if text:
        return [_quantity("--alpha", part, _SECONDS) for part in text.split(",")]
    outside = [link for link in platform.links if link.devices > platform.devices_per_node]
    if not outside or not outside[0].message_seconds:
        raise ValueError(
            f"platform '{platform.name}' does not say what a message between nodes costs; give --alpha 5us, "
            "or choose a platform with a network"
        )
    alpha = outside[0].message_seconds
    return [alpha, *(factor * alpha for factor in ALPHA_FACTORS if factor != 1)]


def _quantity(flag: str, text: str, units: dict[str, float]) -> float:
    found = re.fullmatch(r"\s*([0-9.]+(?:e[-+]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2] not in units or found[1].count(".") > 1 or not float(found[1]):
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(
            f"{flag} takes positive numbers with commas between them"
            + (f", each with one of the units {known}" if known else "")
            + f", got {text!r}"
        )
    return float(found[1]) * units[found[2]]


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:g} {unit}"
    return f"{num_bytes:g} B"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:g} us"
