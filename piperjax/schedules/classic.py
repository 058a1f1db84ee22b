"""The classic schedules: GPipe and 1F1B with one stage per pipe rank, and the forward pass alone."""

from piperjax.schedules.schedule import Action, Schedule, loop_placement, one_stage_per_rank


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
    return one_stage_per_rank("gpipe", num_microbatches, ranks)


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
    return one_stage_per_rank("one_f_one_b", num_microbatches, tuple(ranks))


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


def forward_only_like(schedule: Schedule, num_microbatches: int) -> Schedule:
    """Builds the evaluation schedule for the stages as another schedule places them.

    A rank runs the deepest stage whose input is there, so with v chunks and microbatches of f seconds per
    chunk the pipeline is full after `(P - 1) f` and little waits between chunks.
    """
    done: dict[tuple[int, int], int] = {}
    following = [0] * schedule.num_stages
    ranks: list[list[Action]] = [[] for _ in schedule.stage_of_chunk]
    tick = 0
    while len(done) < schedule.num_stages * num_microbatches:
        for rank, stages in enumerate(schedule.stage_of_chunk):
            for stage in sorted(stages, reverse=True):
                m = following[stage]
                if m < num_microbatches and (not stage or done.get((stage - 1, m), tick) < tick):
                    ranks[rank].append(Action("F", stage, m))
                    done[stage, m], following[stage] = tick, m + 1
                    break
        tick += 1
    return Schedule(
        name="forward_only",
        num_stages=schedule.num_stages,
        num_microbatches=num_microbatches,
        ranks=tuple(map(tuple, ranks)),
        stage_of_chunk=schedule.stage_of_chunk,
        passes="forward",
    )
