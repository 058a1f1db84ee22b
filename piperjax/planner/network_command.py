"""This file is `python -m piperjax simulate`: all-to-alls on a machine by size and nodes, in text and SVG."""

import argparse
import re

from meshes.platform import Platform, known_platforms, load_platform
from piperjax.planner.network_chart import speedup_chart
from piperjax.planner.network_table import report, table_row
from piperjax.planner.text_file import write_text

ALPHA_FACTORS = (0.25, 1.0, 4.0)

_BYTES = {"": 1, "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SECONDS = {"": 1, "s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("what", choices=("alltoall",), help="what to simulate")
    parser.add_argument(
        "--platform", default="frontier", help=f"{', '.join(known_platforms())}, or a .toml file"
    )
    parser.add_argument(
        "--nodes",
        default="2..128",
        metavar="N,N",
        help="nodes that take part, all devices of each, such as 2,6,16; 2..128 doubles from 2 to 128",
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
    parser.add_argument("--svg", metavar="FILE", help="also write the speed-ups as an SVG picture")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit code.

    Raises:
      ValueError: if a flag is wrong.
    """
    platform = load_platform(args.platform)
    sizes = [_quantity("--bytes", text, _BYTES) for text in args.bytes.split(",")]
    nodes = [number for text in args.nodes.split(",") for number in _doubling(text)]
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
    if args.svg:
        write_text(args.svg, speedup_chart(platform, rows, alphas))
        print(f"\nwrote {args.svg}")
    return 0


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


def _doubling(text: str) -> list[int]:
    """The number, or all from the first to at most the last of "2..128", each twice the one before."""
    ends = [int(_quantity("--nodes", end, {"": 1})) for end in text.split("..")]
    if len(ends) > 2 or ends[0] > ends[-1]:
        raise ValueError(
            f"--nodes takes numbers, or the first and the last of a range as in 2..128, got {text!r}"
        )
    numbers = [ends[0]]
    while 2 * numbers[-1] <= ends[-1]:
        numbers.append(2 * numbers[-1])
    return numbers


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
