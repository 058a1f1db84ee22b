"""Runs of layers of one kind: how the layers of every stage are walked by loops without a branch.

Every rank runs the same program, but stages differ in how many layers of which kind they hold. A conditional inside
the loop over layers would hand on the gradients of all layers, and XLA copies what a branch leaves as it is. So the
layers of a stage are rounds of runs: in each round a run of every kind in turn, some of them empty, and each run is
a loop whose number of turns is the rank's own. Dense layers before MoE layers are one round; two kinds in turn are
one round per pair.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs of every chunk of every rank; arrays are `[pipe, chunk, round, kind]` int32.

    Attributes:
      first: position of the first layer of the run.
      count: how many layers it has.
    """

    first: np.ndarray
    count: np.ndarray

    @property
    def num_rounds(self) -> int:
        """Most rounds that any stage needs."""
        return self.count.shape[2]

    @property
    def num_kinds(self) -> int:
        """Kinds of layers."""
        return self.count.shape[3]

    @property
    def has_single_turns(self) -> bool:
        """Whether a loop over layers has one turn on every rank, and is in no loop over rounds."""
        return self.num_rounds == 1 and any(self.fixed_count(kind) == 1 for kind in range(self.num_kinds))

    @cached_property
    def last(self) -> np.ndarray:
        """1 where a run holds the last layer of its chunk, else 0: `[pipe, chunk, round, kind]` int32."""
        last = np.zeros_like(self.count)
        for rank, chunk in np.ndindex(self.count.shape[:2]):
            if len(runs := np.argwhere(self.count[rank, chunk])):
                last[rank, chunk, *runs[-1]] = 1
        return last

    def fixed_count(self, kind: int) -> np.int32 | None:
        """How many layers of a kind every run of it has; None if they differ."""
        return _only(self.count[..., kind])

    def fixed_last(self, kind: int) -> np.int32 | None:
        """`last` of a kind, if it is the same everywhere."""
        return _only(self.last[..., kind])

    def fixed_first(self, kind: int) -> np.int32 | None:
        """Where every run of a kind begins; None if they differ."""
        return _only(self.first[..., kind])


def runs_of(kind: np.ndarray, num_kinds: int) -> Runs:
    """Splits layers into runs; `kind` is `[pipe, chunk, position]`, at least `num_kinds` where there is no layer."""
    places = {}
    for rank, chunk in np.ndindex(kind.shape[:2]):
        number, before = 0, 0
        for position, this in enumerate(kind[rank, chunk].tolist()):
            if this < num_kinds:
                number += this < before
                before = this
                places.setdefault((rank, chunk, number, this), []).append(position)
    shape = (*kind.shape[:2], 1 + max(number for _, _, number, _ in places), num_kinds)
    first, count = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for place, positions in places.items():
        first[place], count[place] = positions[0], len(positions)
    return Runs(first=first, count=count)


class Walk(NamedTuple):
    """Per device: positions of layers in the order in which a loop takes them; int32, known or not.

    Attributes:
      start: the first.
      count: how many.
      step: 1, or -1 for a backward.
    """

    start: jax.Array | np.int32
    count: jax.Array | np.int32
    step: np.int32 = np.int32(1)

    def position(self, turn: jax.Array) -> jax.Array:
        """Position at a turn of the loop."""
        return self.start + self.step * turn

    def reversed(self) -> "Walk":
        """The same positions from the last to the first."""
        return Walk(self.start + self.step * (self.count - np.int32(1)), self.count, -self.step)

    def without(self, turns: jax.Array | np.int32) -> "Walk":
        """The same but for some turns at the end."""
        return self._replace(count=self.count - turns)

    def last(self, turns: jax.Array | np.int32) -> "Walk":
        """So many turns at the end."""
        return self.after(self.count - turns)

    def after(self, turns: jax.Array | np.int32) -> "Walk":
        """What remains after some turns."""
        return Walk(self.start + self.step * turns, self.count - turns, self.step)

    def pairs(self, other: "Walk") -> jax.Array | np.int32:
        """Turns that both have."""
        known = all(isinstance(count, np.integer) for count in (self.count, other.count))
        return (np if known else jnp).minimum(self.count, other.count)


def _only(values: np.ndarray) -> np.int32 | None:
    return values.flat[0] if (values == values.flat[0]).all() else None
