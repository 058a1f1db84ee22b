"""A pipeline schedule: for every pipe rank, the ordered actions it runs. Valid if it exists."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

KINDS = ("F", "B", "I", "W")
_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


class Action(NamedTuple):
    """One unit of work: `2F0` is the forward of microbatch 0 on stage 2.

    Attributes:
      kind: F forward, B full backward, I input gradient, W weight gradient.
      stage: slice of layers, numbered in layer order.
      microbatch: index of the microbatch in the step.
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Reads `2F0`; the inverse of `str`."""
        match = _ACTION.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"an action is <stage><F|B|I|W><microbatch> such as 2F0, got {text.strip()!r}")
        return cls(match[2], int(match[1]), int(match[3]))


def dependencies(action: Action, num_stages: int) -> tuple[tuple[Action, ...], ...]:
    """Actions that must have finished before `action`: a tuple of alternatives-free groups.

    Each group lists actions of which at least one exists in a schedule (B or I give the same
    input gradient), and that one must be done.
    """
    kind, stage, microbatch = action
    if kind == "F":
        return ((Action("F", stage - 1, microbatch),),) if stage else ()
    if kind == "W":
        return ((Action("I", stage, microbatch),),)
    own_forward = (Action("F", stage, microbatch),)
    if stage == num_stages - 1:
        return (own_forward,)
    return own_forward, (Action("B", stage + 1, microbatch), Action("I", stage + 1, microbatch))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every pipe rank runs, in order.

    Attributes:
      name: how the schedule is called in messages and on the command line.
      num_stages: stages of the model; a pipe rank may hold several.
      num_microbatches: microbatches per step.
      ranks: for each pipe rank its actions in the order it runs them.
      stage_of_chunk: for each pipe rank the stages it holds, in chunk order.
      passes: "forward_backward" for training, "forward" for evaluation.
      clock: how `ticks.pack` lays it out unless told otherwise: "dual" (a forward and a backward per tick),
        "single" (one action per tick) or "ordered" (a rank's order is kept strictly).
    """

    name: str
    num_stages: int
    num_microbatches: int
    ranks: tuple[tuple[Action, ...], ...]
    stage_of_chunk: tuple[tuple[int, ...], ...]
    passes: Literal["forward_backward", "forward"] = "forward_backward"
    clock: Literal["dual", "single", "ordered"] = "dual"

    def __post_init__(self):
        if self.num_stages < 1 or self.num_microbatches < 1:
            raise ValueError(
                f"schedule {self.name!r}: needs at least one stage and one microbatch, got "
                f"{self.num_stages} stages and {self.num_microbatches} microbatches"
            )
        if self.clock not in ("dual", "single", "ordered"):
            raise ValueError(f"schedule {self.name!r}: clock is dual, single or ordered, got {self.clock!r}")
        self._check_placement()
        self._check_once()
        order = _executable_order(self)
        object.__setattr__(self, "_order", order)

    @property
    def num_ranks(self) -> int:
        """Pipe ranks."""
        return len(self.ranks)

    @property
    def num_chunks(self) -> int:
        """Stages per pipe rank."""
        return len(self.stage_of_chunk[0])

    @cached_property
    def rank_of_stage(self) -> tuple[int, ...]:
        """Pipe rank that holds each stage."""
        place = {stage: rank for rank, stages in enumerate(self.stage_of_chunk) for stage in stages}
        return tuple(place[stage] for stage in range(self.num_stages))

    @cached_property
    def chunk_of_stage(self) -> tuple[int, ...]:
        """Position of each stage among the stages of its pipe rank."""
        place = {s: chunk for stages in self.stage_of_chunk for chunk, s in enumerate(stages)}
        return tuple(place[stage] for stage in range(self.num_stages))

    def executable_order(self) -> tuple[tuple[int, Action], ...]:
        """(rank, action) pairs in an order that respects every dependency."""
        return self._order

    def __str__(self) -> str:
        width = len(str(self.num_ranks - 1))
        return "\n".join(
            f"rank {rank:{width}d} | " + " ".join(map(str, actions))
            for rank, actions in enumerate(self.ranks)
        )

    def _check_placement(self):
        stages = sorted(stage for held in self.stage_of_chunk for stage in held)
        if stages != list(range(self.num_stages)) or len(self.stage_of_chunk) != self.num_ranks:
            raise ValueError(
                f"schedule {self.name!r}: each of the {self.num_stages} stages must be held by exactly one of "
                f"{self.num_ranks} pipe ranks, but the placement is {self.stage_of_chunk}"
            )
        if len({len(held) for held in self.stage_of_chunk}) != 1:
            raise ValueError(
                f"schedule {self.name!r}: every pipe rank must hold the same number of stages, "
                f"but they hold {[len(held) for held in self.stage_of_chunk]}"
            )
        for rank, actions in enumerate(self.ranks):
            for action in actions:
                if action.stage not in self.stage_of_chunk[rank]:
                    raise ValueError(
                        f"schedule {self.name!r}: rank {rank} runs {action} but holds stages "
                        f"{list(self.stage_of_chunk[rank])}"
                    )

    def _check_once(self):
        counts = Counter(action for actions in self.ranks for action in actions)
        for action in counts:
            if not 0 <= action.microbatch < self.num_microbatches:
                raise ValueError(
                    f"schedule {self.name!r}: microbatches run from 0 to {self.num_microbatches - 1}, got {action}"
                )
        for stage in range(self.num_stages):
            for microbatch in range(self.num_microbatches):
                found = {kind: counts[Action(kind, stage, microbatch)] for kind in KINDS}
                self._check_cell(stage, microbatch, found)

    def _check_cell(self, stage: int, microbatch: int, found: dict[str, int]):
        seen = {kind: number for kind, number in found.items() if number}
        if self.passes == "forward":
            good, rule = seen == {"F": 1}, "must run F exactly once and nothing else"
        else:
            good = seen in ({"F": 1, "B": 1}, {"F": 1, "I": 1, "W": 1})
            rule = "must run F and either B or I+W exactly once"
        if not good:
            runs = ", ".join(f"{kind}×{number}" for kind, number in seen.items()) or "nothing"
            raise ValueError(
                f"schedule {self.name!r}: stage {stage}, microbatch {microbatch} {rule}, but it runs {runs}"
            )


def _executable_order(schedule: Schedule) -> tuple[tuple[int, Action], ...]:
    """Runs the schedule with unit costs; raises ValueError naming the actions that wait for ever."""
    done: set[Action] = set()
    position = [0] * schedule.num_ranks
    order: list[tuple[int, Action]] = []
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.ranks):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                groups = dependencies(action, schedule.num_stages)
                if not all(any(need in done for need in group) for group in groups):
                    break
                done.add(action)
                order.append((rank, action))
                position[rank] += 1
                progress = True
    stuck = [
        f"rank {rank} waits at {actions[position[rank]]}"
        for rank, actions in enumerate(schedule.ranks)
        if position[rank] < len(actions)
    ]
    if stuck:
        raise ValueError(f"schedule {schedule.name!r}: deadlock, {'; '.join(stuck)}; reorder these actions")
    return tuple(order)


def one_stage_per_rank(
    name: str, num_microbatches: int, ranks: tuple[tuple[Action, ...], ...], *, clock: str = "dual"
) -> Schedule:
    """A schedule whose rank r holds stage r."""
    return Schedule(
        name=name,
        num_stages=len(ranks),
        num_microbatches=num_microbatches,
        ranks=ranks,
        stage_of_chunk=loop_placement(len(ranks)),
        clock=clock,
    )


def loop_placement(num_ranks: int, num_chunks: int = 1) -> tuple[tuple[int, ...], ...]:
    """Stages of each rank when stages are dealt out in turn: rank r holds r, r + P, r + 2P, ..."""
    return tuple(tuple(range(rank, num_ranks * num_chunks, num_ranks)) for rank in range(num_ranks))


def v_placement(num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Stages of each rank when they go down the ranks and back up: rank r holds r and 2P - 1 - r."""
    return tuple((rank, 2 * num_ranks - 1 - rank) for rank in range(num_ranks))


def parse(text: str, *, name: str = "custom", clock: str = "ordered") -> Schedule:
    """Reads a schedule from lines of actions, one line per pipe rank; the inverse of `str`.

    A line may begin with `rank 0 |`; actions are separated by spaces, or by commas with empty cells between
    them (CSV); `#` starts a comment. What a person wrote is kept in that order: the clock is "ordered".

    Raises:
      ValueError: if a token is no action or the schedule is invalid.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        body = line.split("#", 1)[0].split("|", 1)[-1].replace(",", " ").replace('"', " ").split()
        if body:
            try:
                rows.append(tuple(Action.parse(token) for token in body))
            except ValueError as error:
                raise ValueError(f"schedule {name!r}, line {number}: {error}") from None
    if not rows:
        raise ValueError(
            f"schedule {name!r}: no actions found; write one line per pipe rank such as '0F0 0B0'"
        )
    return from_rows(rows, name=name, clock=clock)


def from_rows(rows: Iterable[tuple[Action, ...]], *, name: str, clock: str = "dual") -> Schedule:
    """Builds a schedule from actions alone: sizes and placement are read off the actions."""
    ranks = tuple(tuple(row) for row in rows)
    everything = [action for row in ranks for action in row]
    held = tuple(tuple(dict.fromkeys(sorted(action.stage for action in row))) for row in ranks)
    kinds = {action.kind for action in everything}
    return Schedule(
        name=name,
        num_stages=1 + max(action.stage for action in everything),
        num_microbatches=1 + max(action.microbatch for action in everything),
        ranks=ranks,
        stage_of_chunk=held,
        passes="forward" if kinds == {"F"} else "forward_backward",
        clock=clock,
    )
