"""What is measured on the shaped network, and what the processes of its nodes tell of it.

A cell is one size or one layer; its variants do the same by different means, in turn. A time is taken by all processes
at once, on one clock, as the nodes are namespaces of one machine: from when the last one begins to when the last ends.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

ITEM_BYTES = 4
SAMPLE = "sample "  # Gloo prints lines of its own.
ALGORITHMS = ("flat", "halo2", "halo3")


class Variant(NamedTuple):
    """One way to dispatch: a dispatcher, its capacity factor (0 for any routing), and in how many chunks it sends.

    Rows that find no room are dropped, or travel in later passes: `overflow` as in a plan.
    """

    dispatch: str
    capacity_factor: float = 0.0
    chunks: int = 1
    overflow: str = "drop"

    def __str__(self) -> str:
        capacity = f" capacity {self.capacity_factor:g}" if self.capacity_factor else ""
        passes = " in passes" if self.overflow == "passes" else ""
        return f"{self.dispatch}{capacity}{passes}" + (f" x{self.chunks}" if self.chunks > 1 else "")

    @property
    def drops(self) -> bool:
        """Whether rows may be dropped."""
        return self.capacity_factor > 0 and self.overflow == "drop"


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A raw all-to-all over all devices.

    Attributes:
      pair_bytes: bytes that every device has for every other.
      rounds: all-to-alls in a call, one after the other; a time is that of one.
      repeats: times that are taken of each variant.
    """

    pair_bytes: int
    rounds: int = 1
    repeats: int = 5

    @property
    def label(self) -> str:
        """How tables and records call it."""
        return f"{self.pair_bytes} B per pair"

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants."""
        return ALGORITHMS


@dataclass(frozen=True, kw_only=True)
class NodeExchange:
    """All-to-alls inside every node at the same time, or between those of one local index: how fast either is alone.

    Attributes:
      pair_bytes: bytes that every device has for every other of its node, or of its index.
      where: "inside" the nodes, whose sockets never leave the machine, or "between" them.
      rounds: all-to-alls in a call, one after the other; a time is that of one.
      repeats: times that are taken.
    """

    pair_bytes: int
    where: Literal["inside", "between"] = "inside"
    rounds: int = 1
    repeats: int = 9
    variants: tuple[str, ...] = ("node",)

    @property
    def label(self) -> str:
        """How tables and records call it."""
        return f"{self.where} the nodes, {self.pair_bytes} B per pair"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Dispatch and combine of a layer whose experts are small, in float32 and forward.

    Attributes:
      num_experts: routed experts.
      experts_per_token: experts that a token takes, at random.
      tokens: tokens of each device.
      d_model: width.
      ways: how they are dispatched.
      repeats: times that are taken of each variant.
    """

    num_experts: int
    experts_per_token: int
    tokens: int
    d_model: int
    ways: tuple[Variant, ...]
    repeats: int = 3
    rounds: int = 1

    @property
    def label(self) -> str:
        """How tables and records call it."""
        return (
            f"E={self.num_experts} k={self.experts_per_token}, {self.tokens} tokens of "
            f"{self.row_bytes} B a device"
        )

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants."""
        return tuple(str(way) for way in self.ways)

    @property
    def lossless(self) -> dict[str, Variant]:
        """Variants that drop no rows, by name."""
        return {str(way): way for way in self.ways if not way.drops}

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return ITEM_BYTES * self.d_model


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Dispatch and combine of a layer whose experts take a part of the time that the wire does.

    Variants are the wire alone (experts that return what they get), the products alone (on buffers and groups like
    those of the layer), and the layer in 1, 2, ... chunks.

    Attributes:
      num_experts: routed experts.
      experts_per_token: experts that a token takes, at random.
      tokens: tokens of each device.
      d_model: width.
      d_ff: width of an expert.
      dispatch: dispatcher.
      chunks: numbers of chunks.
      passes: "forward", or with "backward".
      repeats: times that are taken of each variant.
    """

    num_experts: int
    experts_per_token: int
    tokens: int
    d_model: int
    d_ff: int
    dispatch: str = "halo2_dedup"
    chunks: tuple[int, ...] = (1, 2, 4, 8)
    passes: str = "forward"
    repeats: int = 8
    rounds: int = 1

    @property
    def label(self) -> str:
        """How tables and records call it."""
        return f"{self.dispatch}, {self.passes}"

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants."""
        return ("wire", "products", *(f"x{chunks}" for chunks in self.chunks))


Cell = Exchange | NodeExchange | Layer | Overlap

_FLAT, _ONCE, _DROPPING = Variant("flat"), Variant("halo2_dedup"), Variant("flat", 1.5)
_CHUNKED, _IN_PASSES = Variant("halo2_dedup", chunks=2), Variant("halo2_dedup", 3.0, overflow="passes")
# Times of small sizes scatter by a factor of two on shared cores; medians of many do not.
# Rows of 4 KiB are those of 2,048 elements in bfloat16, as models with 64 experts and 6 of them for a token have. Flat
# dispatch that drops nothing sends 16 times the rows (64 times with 256 experts), so it has few tokens. With 8 of 256
# experts, buffers for any routing hold 32 times the rows that come; in passes, 3 times.
SWEEP: tuple[Cell, ...] = (
    NodeExchange(pair_bytes=4, repeats=25),
    NodeExchange(pair_bytes=131_072),
    NodeExchange(pair_bytes=131_072, where="between"),
    Exchange(pair_bytes=256, repeats=51),
    Exchange(pair_bytes=1024, repeats=31),
    Exchange(pair_bytes=4096, repeats=21),
    Exchange(pair_bytes=65_536, repeats=3),
    Layer(
        num_experts=64,
        experts_per_token=6,
        tokens=4,
        d_model=1024,
        ways=(_FLAT, Variant("halo2"), _ONCE),
    ),
    Layer(num_experts=64, experts_per_token=6, tokens=32, d_model=1024, ways=(_ONCE, _CHUNKED, _DROPPING)),
    Layer(num_experts=256, experts_per_token=8, tokens=32, d_model=1024, ways=(_ONCE, _DROPPING, _IN_PASSES)),
)
# Products are a third of the wire forward. Fewer tokens, and backward would mostly add up gradients of weights.
_OVERLAPPED = dict(num_experts=8, experts_per_token=2, tokens=1024, d_model=1024, d_ff=2048)
OVERLAP = (
    Overlap(**_OVERLAPPED, chunks=(1, 4), repeats=7),
    Overlap(**_OVERLAPPED, chunks=(1, 4), passes="forward and backward", repeats=4),
)
CELLS: dict[str, tuple[Cell, ...]] = {"sweep": SWEEP, "overlap": OVERLAP}


class Sample(NamedTuple):
    """One time that one process took: when it began and ended, in seconds on the machine's clock."""

    cell: str
    variant: str
    start: float
    end: float

    def line(self) -> str:
        """As a line of text."""
        return SAMPLE + json.dumps(self)


def read_samples(printed: str) -> list[Sample]:
    """Those lines of what a process printed that are samples, in order."""
    samples = []
    for line in printed.splitlines():
        if line.startswith(SAMPLE):
            cell, variant, start, end = json.loads(line.removeprefix(SAMPLE))
            samples.append(Sample(cell, variant, start, end))
    return samples


def merge(processes: Sequence[Iterable[Sample]]) -> dict[str, dict[str, list[float]]]:
    """Seconds of every repeat by cell and variant, from the samples of all processes.

    Raises:
      ValueError: if the processes did not take the same samples in the same order.
    """
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for samples in zip(*processes, strict=True):
        names = {sample[:2] for sample in samples}
        if len(names) != 1:
            raise ValueError(f"processes must take the same times in the same order, got {sorted(names)}")
        cell, variant = names.pop()
        last_start = max(sample.start for sample in samples)
        seconds[cell][variant].append(max(sample.end for sample in samples) - last_start)
    return {cell: dict(variants) for cell, variants in seconds.items()}


def paired_ratio(slow: Sequence[float], quick: Sequence[float]) -> float:
    """How many times as long one variant took as the other: the median over pairs taken one after the other."""
    return median(a / b for a, b in zip(slow, quick, strict=True))
