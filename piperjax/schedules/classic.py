"""The classic schedules, one stage per pipe rank: GPipe, 1F1B, and the forward pass alone."""

from collections.abc import Callable

from piperjax.schedules.schedule import Action, Schedule, loop_placement


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """Builds GPipe (Huang et al., arXiv:1811.06965): all forwards, then all backwards.

    Every rank holds `num_microbatches` in flight. With forward and backward costs f and b seconds
    the bubble is `(num_stages - 1) * (f + b)`.
    """
    microbatches = range(num_microbatches)
    ranks = tuple(
        tuple(Action("F", stage, m) for m in microbatches)
        + tuple(Action("B", stage, m) for m in microbatches)
        for stage in range(num_stages)
    )
    return _one_stage_per_rank("gpipe", num_microbatches, ranks)


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """Builds 1F1B (PipeDream-flush, Narayanan et al., arXiv:2006.09503), one stage per pipe rank.

    Rank r holds at most `min(num_stages - r, num_microbatches)` microbatches in flight when ranks run
    asynchronously. With forward and backward costs f and b seconds the bubble is
    `(num_stages - 1) * (f + b)`. The lockstep tick table of `ticks.pack` runs the same backward order
    with forwards hoisted: same bubble, `2 * (num_stages - r) - 1` in flight.
    """
    ranks = []
    for stage in range(num_stages):
        # Warmup: rank r runs P - r - 1 forwards ahead, as many as its first backward is hops away.
        warmup = min(num_stages - stage - 1, num_microbatches)
        actions = [Action("F", stage, m) for m in range(warmup)]
        for m in range(num_microbatches):
            if m + warmup < num_microbatches:
                actions.append(Action("F", stage, m + warmup))
            actions.append(Action("B", stage, m))
        ranks.append(tuple(actions))
    return _one_stage_per_rank("one_f_one_b", num_microbatches, tuple(ranks))


def forward_only(num_stages: int, num_microbatches: int) -> Schedule:
    """Builds the evaluation schedule: every microbatch passes through the stages once."""
    ranks = tuple(
        tuple(Action("F", stage, m) for m in range(num_microbatches)) for stage in range(num_stages)
    )
    return Schedule(
        name="forward_only",
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        ranks=ranks,
        stage_of_chunk=loop_placement(num_stages),
        passes="forward",
    )


def _one_stage_per_rank(name: str, num_microbatches: int, ranks: tuple[tuple[Action, ...], ...]) -> Schedule:
    return Schedule(
        name=name,
        num_stages=len(ranks),
        num_microbatches=num_microbatches,
        ranks=ranks,
        stage_of_chunk=loop_placement(len(ranks)),
    )


BUILDERS: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "one_f_one_b": one_f_one_b}
ALIASES = {"1f1b": "one_f_one_b"}


def build(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """Builds a schedule by its name.

    Raises:
      ValueError: if no schedule has that name.
    """
    from difflib import get_close_matches

    name = ALIASES.get(name, name)
    if name not in BUILDERS:
        known = [*BUILDERS, *ALIASES]
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no schedule named {name!r}; schedules are {', '.join(known)}{hint}")
    return BUILDERS[name](num_ranks, num_microbatches)
