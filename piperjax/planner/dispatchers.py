"""This file is the dispatchers that a plan can name: which all-to-all moves rows to their experts, and how."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from piperjax.planner.collectives import check_algorithm


@dataclass(frozen=True, kw_only=True)
class Dispatcher:
    """A way to bring rows to their experts.

    Attributes:
      name: what a plan calls it.
      algorithm: the all-to-all that moves the rows.
      deduplicates: whether a token crosses to a node once, however many of its experts are there, and is copied to
        their devices inside; results are summed inside before they return.
    """

    name: str
    algorithm: str
    deduplicates: bool = False

    def __post_init__(self):
        check_algorithm(self.algorithm)
        if self.deduplicates and self.algorithm == "flat":
            raise ValueError(
                "rows are copied inside the destination node, which the flat all-to-all knows nothing of; "
                "use halo2 or halo3 to de-duplicate"
            )

    @property
    def waits_for_all(self) -> bool:
        """Whether its exchanges wait for every device of the mesh, as permutes do, and not for partners only.

        Pipe ranks run their layers at different times, so then there can be no more than one.
        """
        return self.algorithm == "halo3"


DISPATCHERS = {
    dispatcher.name: dispatcher
    for dispatcher in (
        Dispatcher(name="flat", algorithm="flat"),
        Dispatcher(name="halo2", algorithm="halo2"),
        Dispatcher(name="halo3", algorithm="halo3"),
        Dispatcher(name="halo2_dedup", algorithm="halo2", deduplicates=True),
        Dispatcher(name="halo3_dedup", algorithm="halo3", deduplicates=True),
    )
}

# What becomes of rows beyond a capacity factor.
OVERFLOW = ("drop", "passes")
# Of these numbers of chunks a search chooses; more of them cost more messages than they hide.
SEARCHED_DISPATCH_CHUNKS = (1, 2, 4)


class Way(NamedTuple):
    """A dispatcher, and in how many chunks it sends."""

    dispatch: str
    chunks: int = 1

    def __str__(self) -> str:
        return self.dispatch if self.chunks == 1 else f"{self.dispatch} x{self.chunks}"


def ways(dispatchers: Iterable[str], chunks: Iterable[int] = SEARCHED_DISPATCH_CHUNKS) -> tuple[Way, ...]:
    """Every dispatcher with every number of chunks."""
    return tuple(Way(name, number) for name in dispatchers for number in chunks)


def named(dispatcher: str) -> Dispatcher:
    """The dispatcher of that name.

    Raises:
      ValueError: if there is none; the sentence names the nearest.
    """
    if dispatcher not in DISPATCHERS:
        near = get_close_matches(dispatcher, DISPATCHERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"no dispatcher named {dispatcher!r}; there are {', '.join(DISPATCHERS)}; did you mean {near!r}?"
        )
    return DISPATCHERS[dispatcher]


def check_pipe(dispatcher: str, pipe: int) -> None:
    """Checks that a dispatcher can run in the stages of a pipeline.

    Raises:
      ValueError: if there is no such dispatcher, or it cannot.
    """
    if pipe > 1 and named(dispatcher).waits_for_all:
        raise ValueError(
            f"dispatcher {dispatcher!r} sends permutes, which wait for every device of the mesh, and pipe ranks run at "
            f"different times, so pipe must be 1, got {pipe}; use {dispatcher.replace('halo3', 'halo2')!r}"
        )


def check_overflow(overflow: str, capacity_factor: float) -> None:
    """Checks a capacity factor, that there is such a treatment of rows beyond it, and a factor if that needs one.

    Raises:
      ValueError: if there is not.
    """
    if not 0 <= capacity_factor < math.inf:
        raise ValueError(f"capacity_factor must be 0 (dropless) or positive, got {capacity_factor}")
    if overflow not in OVERFLOW:
        raise ValueError(f"overflow must be one of {', '.join(OVERFLOW)}, got {overflow!r}")
    if overflow == "passes" and not capacity_factor:
        raise ValueError(
            "overflow 'passes' needs a capacity_factor, the size of buffers over the balanced number of rows, got 0, "
            "which makes them so large that one pass is enough; set capacity_factor, such as 1.25, or leave overflow"
        )


def check_chunks(dispatcher: str, chunks: int, tokens: int | None = None) -> None:
    """Checks that there is such a dispatcher, and that the tokens of a microbatch on a device divide into its chunks.

    Raises:
      ValueError: if there is not, or they do not.
    """
    named(dispatcher)
    if chunks < 1:
        raise ValueError(f"dispatch_chunks must be at least 1, got {chunks}")
    if tokens is not None and tokens % chunks:
        near = max(number for number in range(1, chunks) if tokens % number == 0)
        raise ValueError(
            f"dispatch_chunks must divide the {tokens} tokens of a microbatch on a device, got {chunks}; use {near}"
        )
