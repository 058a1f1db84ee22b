"""This file reads a compiled program's text: how often each part runs, its FLOP, and what its collectives move.

XLA's own cost analysis counts the body of a loop once. Here bodies are multiplied by their number of turns, and the
branches of a conditional by how often each is taken, which the caller knows from its schedule.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

ITEMSIZES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line: name, type as text, operation, and the rest from the operands on."""

    name: str
    shape: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    def called(self, key: str) -> list[str]:
        """Names of the computations under a key such as "body" or "branch_computations"."""
        found = re.search(rf"\b{key}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.rest)
        if found is None:
            return []
        return [found[1]] if found[1] else re.findall(r"[\w.\-]+", found[2])


class Visit(NamedTuple):
    """An instruction and how often it runs in one execution of the program."""

    instruction: Instruction
    computation: str
    times: float


class Conditional(NamedTuple):
    """A conditional as a caller must weigh it.

    Attributes:
      depth: loops around it.
      branches: scopes (`op_name`) inside of each branch, as one text per branch; false comes first.
    """

    depth: int
    branches: tuple[str, ...]


Weigh = Callable[[Conditional], Sequence[float]]
# Turns of a loop whose number the program does not know, from its scope.
Turns = Callable[[str], float]


def evenly(conditional: Conditional) -> Sequence[float]:
    """Every branch equally often."""
    return [1 / len(conditional.branches)] * len(conditional.branches)


@dataclass(frozen=True, eq=False)
class Module:
    """A compiled program.

    Attributes:
      computations: instructions by computation.
      entry: where it starts.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @cached_property
    def shapes(self) -> dict[tuple[str, str], str]:
        """Types by computation and name."""
        return {(name, one.name): one.shape for name, lines in self.computations.items() for one in lines}

    @cached_property
    def _scopes(self) -> dict[str, str]:
        return {}

    def scopes(self, computation: str) -> str:
        """Scopes of a computation and of all that it calls, joined."""
        if computation not in self._scopes:
            own = [match[1] for one in self.computations[computation] if (match := _op_name(one))]
            below = [self.scopes(name) for one in self.computations[computation] for name in _all_called(one)]
            self._scopes[computation] = " ".join(dict.fromkeys([*own, *below]))
        return self._scopes[computation]

    def visits(self, weigh: Weigh = evenly, *, unknown_turns: Turns = lambda _: 1.0) -> Iterator[Visit]:
        """Every instruction of the program with how often it runs.

        Args:
          weigh: how often each branch of a conditional is taken, as fractions.
          unknown_turns: turns of loops whose number depends on data, by their scope (`op_name`).
        """
        yield from self._visits(self.entry, 1.0, 0, weigh, unknown_turns)

    def _visits(self, name: str, times: float, depth: int, weigh: Weigh, unknown_turns: Turns):
        for one in self.computations[name]:
            yield Visit(one, name, times)
            if one.operation == "while":
                turns = _turns(one)
                if turns is None:
                    scope = _op_name(one)
                    turns = unknown_turns(scope[1] if scope else "")
                inner = times * turns
                yield from self._visits(one.called("body")[0], inner, depth + 1, weigh, unknown_turns)
            elif one.operation == "conditional":
                branches = one.called("branch_computations") or [
                    *one.called("false_computation"),
                    *one.called("true_computation"),
                ]
                weights = weigh(Conditional(depth, tuple(self.scopes(branch) for branch in branches)))
                for branch, weight in zip(branches, weights, strict=True):
                    if weight:
                        yield from self._visits(branch, times * weight, depth, weigh, unknown_turns)
            elif one.operation in ("fusion", "call", "async-start"):
                for called in (*one.called("calls"), *one.called("to_apply")):
                    yield from self._visits(called, times, depth, weigh, unknown_turns)

    def product_flop(self, visit: Visit) -> float:
        """FLOP of a matrix product, two per multiply-add; 0 for other instructions."""
        one = visit.instruction
        if one.operation != "dot":
            return 0.0
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        left = _dimensions(self.shapes[visit.computation, one.operands[0]])
        depth = math.prod(left[int(d)] for d in contracted[1].split(",") if d)
        return 2.0 * visit.times * depth * math.prod(_dimensions(one.shape))


def parse(text: str) -> Module:
    """Reads the text of an optimized HLO module."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)):
            lines.append(Instruction(*found.groups()))
    return Module(computations, entry)


def sent_bytes(one: Instruction, group_size: int) -> float:
    """Bytes that a device sends in one collective, by an algorithm that sends no byte twice but to reduce.

    With g devices: a permutation sends its buffer; all-to-all, all-gather and reduce-scatter (g - 1) / g of the whole
    buffer; an all-reduce twice that.
    """
    operation = one.operation.removesuffix("-start")
    num_bytes = shape_bytes(one.shape)
    if one.operation.endswith("-start"):
        num_bytes /= 2 if operation in ("all-reduce", "all-to-all") else 1
    others = (group_size - 1) / max(group_size, 1)
    if operation == "collective-permute":
        return num_bytes
    if operation == "reduce-scatter":
        return num_bytes * group_size * others
    return num_bytes * others * (2 if operation == "all-reduce" else 1)


def first_group(one: Instruction) -> tuple[int, ...]:
    """Devices of the first group of a collective, as numbers of partitions. Of a permutation, a sender and receiver.

    Reads `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)` and `mesh['a'=2,'b'=4] {'b'}`.
    """
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", one.rest):
        return tuple(int(number) for number in pairs.groups())
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", one.rest):
        return tuple(int(number) for number in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.rest):
        shape, source = (_numbers(text) for text in iota.groups()[:2])
        ids = np.arange(math.prod(source)).reshape(source)
        ids = ids.transpose(_numbers(iota[3])) if iota[3] else ids
        return tuple(int(number) for number in ids.reshape(shape)[0])
    if named := re.search(r"replica_groups=@?mesh\[([^\]]*)\]\s*\{([^}]*)\}", one.rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        axes = re.findall(r"'([^']+)'", named[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        place = tuple(slice(None) if name in axes else 0 for name in sizes)
        return tuple(int(number) for number in ids[place].ravel())
    return (0,)


def axes_of(group: Sequence[int], sizes: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ, of a mesh with these sizes, outermost first."""
    places = np.array(np.unravel_index(np.asarray(group), tuple(sizes.values())))
    return tuple(name for name, along in zip(sizes, places, strict=True) if len(set(along.tolist())) > 1)


def _turns(loop: Instruction) -> int | None:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    return int(found[1]) if found else None


def _op_name(one: Instruction):
    return re.search(r'op_name="([^"]*)"', one.rest)


def _all_called(one: Instruction) -> list[str]:
    keys = ("body", "calls", "to_apply", "branch_computations", "true_computation", "false_computation")
    return [name for key in keys for name in one.called(key)]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _dimensions(shape: str) -> tuple[int, ...]:
    found = _SHAPE.search(shape)
    return _numbers(found[2]) if found[2] else ()


def shape_bytes(shape: str) -> float:
    """Bytes of an array or of all arrays of a tuple."""
    return float(
        sum(
            ITEMSIZES.get(dtype, 0) * math.prod(_numbers(dimensions) if dimensions else ())
            for dtype, dimensions in _SHAPE.findall(shape)
        )
    )
