"""A schedule in a few numbers: how often which work sets the pace of a tick, and how many slots its buffers have.

The planner compares thousands of meshes, and building every schedule would take minutes. In lockstep a step is the sum
over ticks of the slowest rank, and few kinds of tick exist: "some rank runs F and B, none more". Counted once, they
price any costs at once. The counts follow two laws, which the tests check against built tables: from about two
microbatches per pipe rank on they are linear in the microbatches, and (P, r P) ranks and microbatches give counts that
are affine in P. So small tables are counted, and large ones extended from them.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from piperjax.schedules import registry
from piperjax.schedules.filling import RECOMPUTING_UNITS, UNITS
from piperjax.schedules.lower import lower
from piperjax.schedules.schedule import Action
from piperjax.schedules.ticks import TickTable, has_choice, pack

LARGEST_BUILT_RANKS = 8
# From how many microbatches per rank on one more adds the same, and after how many more ranks the pattern repeats.
STEADY_MICROBATCHES_PER_RANK = {"zb_h2": 4}
RANK_PERIOD = {"v_min": 6}
LARGEST_BUILT = {"v_min": 14}


class Work(NamedTuple):
    """Numbers of actions that one rank runs in one part of a tick.

    Attributes:
      forward, backward, input_gradient, weight_gradient: actions of each kind.
      side_by_side: backwards or input gradients beside a forward of another microbatch, which overlap can shorten.
    """

    forward: int = 0
    backward: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0
    side_by_side: int = 0


class Slots(NamedTuple):
    """Buffer slots of the executor on its worst rank, as `lower` counts them; fractions where extended."""

    inputs: float
    stash: float
    gradients: float
    taps: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a schedule costs in lockstep, in counts.

    Attributes:
      counts: of each kind of tick part, float `[kinds]`; negative ones come from extending.
      works: of each kind the work of the ranks that can be slowest, int `[kinds, choices, 5]` in the order of `Work`.
      num_ticks: exchanges between neighbours.
      num_microbatches: how often embedding, head and gradient of the embedding run.
      slots: buffers.
    """

    counts: np.ndarray
    works: np.ndarray
    num_ticks: float
    num_microbatches: int
    slots: Slots

    @property
    def splits_backward(self) -> bool:
        """Whether backward is split into input and weight gradients."""
        return bool(self.works[..., Work._fields.index("weight_gradient")].any())

    @property
    def side_by_side(self) -> float:
        """Ticks in which a forward and a backward of different microbatches share a rank."""
        return float(self.counts @ self.works[..., Work._fields.index("side_by_side")].max(-1))

    def seconds(self, stage_seconds: np.ndarray) -> np.ndarray:
        """Seconds of all ticks, without exchanges, embedding and head.

        Args:
          stage_seconds: of the slowest stage, `[..., 5]`: F, B, I, W, and what a backward beside a forward saves.
        """
        signed = stage_seconds * np.array([1, 1, 1, 1, -1])
        by_rank = signed @ self.works.reshape(-1, 5).T
        slowest = by_rank.reshape(*by_rank.shape[:-1], *self.works.shape[:2]).max(-1)
        return slowest @ self.counts


@lru_cache(maxsize=4096)
def profile(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int = 0,
    slots: str | None = None,
    *,
    recomputes: bool = False,
) -> Profile:
    """Counts a named schedule; exact up to 8 ranks (v_min: 14), extended beyond.

    Args:
      name: as in `registry`.
      num_chunks: stages per pipe rank, 0 for the schedule's own number.
      slots: how ticks are laid out, see `ticks.pack`.
      recomputes: whether a backward runs its forward again; decides where ticks can be laid out in several ways.

    Raises:
      ValueError: if the schedule does not exist for these numbers.
    """
    P, M, how = num_ranks, num_microbatches, (slots, recomputes)
    largest = LARGEST_BUILT.get(registry.canonical(name), LARGEST_BUILT_RANKS)
    small = min(P, largest)
    steady = P * STEADY_MICROBATCHES_PER_RANK.get(registry.canonical(name), 2)
    if largest >= P and steady + small >= M:
        return _counted(name, P, M, num_chunks, how)
    if registry.is_file(name) or registry.canonical(name) == "auto":
        return _counted(name, P, M, num_chunks, how)
    registry.check(name, P, M, num_chunks)
    if largest >= P:
        base, more = (_counted(name, P, m, num_chunks, how) for m in (steady, steady + P))
        share = (M - steady) / P
        return _sum([(1 - share, base), (share, more)], num_microbatches=M)
    # Ranks: counts of (P, r P) are affine in P. Microbatches: what is left over continues at the slope of few ranks.
    ratio = min(M / P, steady / P)
    if registry.canonical(name) == "interleaved":
        ratio = int(ratio)
    period = RANK_PERIOD.get(registry.canonical(name), largest // 2)
    many = largest - (largest - P) % period
    few = many - period
    fewer, more = (max(1, round(ratio * ranks)) for ranks in (few, many))
    reach = (P - many) / period
    flat = steady // P * many
    left = (M - (more + reach * (more - fewer))) / many
    shares = [
        (1 + reach, _counted(name, many, more, num_chunks, how)),
        (-reach, _counted(name, few, fewer, num_chunks, how)),
    ]
    if left:
        shares += [
            (left, _counted(name, many, flat + many, num_chunks, how)),
            (-left, _counted(name, many, flat, num_chunks, how)),
        ]
    return _sum(shares, num_microbatches=M)


def _counted(name: str, P: int, M: int, num_chunks: int, how: tuple[str | None, bool]) -> Profile:
    slots, recomputes = how
    # Most tables are the same for either.
    recomputes = recomputes and has_choice(registry.build(name, P, M, num_chunks), slots)
    return _counted_once(name, P, M, num_chunks, slots, recomputes)


@lru_cache(maxsize=1024)
def _counted_once(name: str, P: int, M: int, num_chunks: int, slots: str | None, recomputes: bool) -> Profile:
    table = pack(registry.build(name, P, M, num_chunks), slots, RECOMPUTING_UNITS if recomputes else UNITS)
    lowered = lower(table)
    counts = Counter(part for row in table.ticks for part in _parts(row, table))
    return _profile(
        counts,
        num_ticks=len(table.ticks) * (P > 1),
        num_microbatches=M,
        slots=Slots(
            lowered.num_input_slots,
            lowered.num_stash_slots,
            lowered.num_gradient_slots,
            lowered.num_tap_slots,
        ),
    )


def _parts(row: tuple[tuple[Action, ...], ...], table: TickTable) -> Iterable[frozenset[Work]]:
    """The work of every rank that may be slowest, in a tick or in its parts before and after the head."""
    last = table.schedule.num_stages - 1
    head = any(a.kind == "F" and a.stage == last for actions in row for a in actions)
    if head and not table.head_comes_first:
        early = [[a for a in actions if a.kind == "F" or a in table.before_head] for actions in row]
        yield _slowest(_work(done, actions) for done, actions in zip(early, row, strict=True))
        late = [[a for a in actions if a not in done] for done, actions in zip(early, row, strict=True)]
        yield _slowest(_work(done, actions) for done, actions in zip(late, row, strict=True))
    else:
        yield _slowest(_work(actions, actions) for actions in row)


def _work(done: Iterable[Action], tick: tuple[Action, ...]) -> Work:
    beside = sum(a.kind in "BI" and tick[0].kind == "F" and tick[0][1:] != a[1:] for a in done)
    kinds = "".join(action.kind for action in done)
    return Work(kinds.count("F"), kinds.count("B"), kinds.count("I"), kinds.count("W"), beside)


def _slowest(works: Iterable[Work]) -> frozenset[Work]:
    return _undominated(frozenset(works))


@lru_cache(maxsize=4096)
def _undominated(different: frozenset[Work]) -> frozenset[Work]:
    """Leaves out work that another rank has and more, with no more overlap to save."""
    return frozenset(
        work
        for work in different
        if not any(
            other != work
            and all(a <= b for a, b in zip(work[:4], other[:4], strict=True))
            and other.side_by_side <= work.side_by_side
            for other in different
        )
    )


def _profile(counts: Counter, *, num_ticks: float, num_microbatches: int, slots: Slots) -> Profile:
    kinds = list(counts)
    works = np.zeros((len(kinds), max(map(len, kinds), default=1), 5))
    for kind, choices in zip(works, kinds, strict=True):
        kind[: len(choices)] = sorted(choices)
    return Profile(
        counts=np.array([counts[kind] for kind in kinds], float),
        works=works,
        num_ticks=num_ticks,
        num_microbatches=num_microbatches,
        slots=slots,
    )


def _sum(weighted: list[tuple[float, Profile]], *, num_microbatches: int) -> Profile:
    """A linear combination of profiles."""
    counts: Counter = Counter()
    for weight, part in weighted:
        for count, choices in zip(part.counts, part.works, strict=True):
            counts[frozenset(Work(*map(int, work)) for work in choices)] += weight * count
    return _profile(
        Counter({kind: count for kind, count in counts.items() if abs(count) > 1e-9}),
        num_ticks=sum(weight * part.num_ticks for weight, part in weighted),
        num_microbatches=num_microbatches,
        slots=Slots(
            *(sum(weight * part.slots[i] for weight, part in weighted) for i in range(len(Slots._fields)))
        ),
    )
