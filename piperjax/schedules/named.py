"""The named schedules: how each is built. Adding one means adding an entry to `NAMED`.

A builder is a function `(num_ranks, num_microbatches) -> Schedule`, with `num_chunks` as a third argument if
the number of stages per pipe rank is a choice.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from piperjax.schedules.classic import gpipe, one_f_one_b
from piperjax.schedules.dualpipe import check as check_dualpipe_v
from piperjax.schedules.dualpipe import dualpipe_v
from piperjax.schedules.interleaved import check as check_interleaved
from piperjax.schedules.interleaved import interleaved
from piperjax.schedules.schedule import Schedule, loop_placement, v_placement
from piperjax.schedules.v_shaped import v_half, v_min, zb_v
from piperjax.schedules.zero_bubble import zb_dual, zb_h1, zb_h2

Placement = tuple[tuple[int, ...], ...]


def _on_a_v(num_ranks: int, num_chunks: int) -> Placement:
    del num_chunks  # Down the ranks and back up: always 2.
    return v_placement(num_ranks)


@dataclass(frozen=True)
class Entry:
    """One named schedule.

    Attributes:
      builder: builds it.
      num_chunks: stages per pipe rank, or the default if they can be chosen.
      takes_chunks: whether the number can be chosen.
      check: refuses numbers `(num_ranks, num_microbatches, num_chunks)` that the builder cannot build.
      placement: stages of each rank by `(num_ranks, num_chunks)`; None where only the builder knows.
    """

    builder: Callable[..., Schedule]
    num_chunks: int = 1
    takes_chunks: bool = False
    check: Callable[[int, int, int], None] | None = None
    placement: Callable[[int, int], Placement] | None = loop_placement

    def build(self, num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
        """Builds the schedule.

        Raises:
          ValueError: if it does not exist for these numbers.
        """
        if self.takes_chunks:
            return self.builder(num_ranks, num_microbatches, num_chunks)
        return self.builder(num_ranks, num_microbatches)


NAMED = {
    "gpipe": Entry(gpipe),
    "one_f_one_b": Entry(one_f_one_b),
    "interleaved": Entry(interleaved, num_chunks=2, takes_chunks=True, check=check_interleaved),
    "zb_h1": Entry(zb_h1),
    "zb_h2": Entry(zb_h2),
    "zb_dual": Entry(zb_dual),
    "zb_v": Entry(zb_v, num_chunks=2, placement=_on_a_v),
    "v_half": Entry(v_half, num_chunks=2, placement=_on_a_v),
    "v_min": Entry(v_min, num_chunks=2, placement=_on_a_v),
    "dualpipe_v": Entry(dualpipe_v, num_chunks=2, check=check_dualpipe_v, placement=_on_a_v),
}


@lru_cache(maxsize=16)
def build_all(num_ranks: int, num_microbatches: int, num_chunks: int) -> tuple[Schedule, ...]:
    """Every named schedule that exists for these numbers; remembered, as `auto` asks again for other times."""
    found = []
    for entry in NAMED.values():
        if entry.takes_chunks or entry.num_chunks == num_chunks:
            with suppress(ValueError):  # It does not exist for so few microbatches, or for this number.
                found.append(entry.build(num_ranks, num_microbatches, num_chunks))
    return tuple(found)
