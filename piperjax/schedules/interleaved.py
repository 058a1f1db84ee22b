"""Interleaved 1F1B: several stages per pipe rank shorten the bubble and lengthen the stash."""

from piperjax.schedules.schedule import Action, Schedule, loop_placement


def interleaved(num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """Builds 1F1B with virtual stages (Narayanan et al., arXiv:2104.04473): rank r holds r, r + P, r + 2P, ...

    Microbatches go through the chunks in groups of P. Rank r runs `2 (P - r - 1) + (v - 1) P` forwards ahead,
    so at most `vP + P - 1` chunks, `P (1 + (P - 1) / (vP))` stage activations, are in flight. With f and b
    seconds per chunk the bubble is `(P - 1) (f + b)`: 1F1B's, divided by v. Every activation makes v hops.

    Raises:
      ValueError: if M is no multiple of P or there are fewer than two chunks.
    """
    check(num_ranks, num_microbatches, num_chunks)
    total = num_microbatches * num_chunks
    ranks = []
    for rank in range(num_ranks):
        forwards = [_turn(turn, rank, num_ranks, num_chunks) for turn in range(total)]
        backwards = [
            (num_ranks * num_chunks - 1 - stage, microbatch)
            for stage, microbatch in (
                _turn(turn, num_ranks - 1 - rank, num_ranks, num_chunks) for turn in range(total)
            )
        ]
        # Warmup: one forward per hop down and back, plus the earlier chunks of the first group.
        warmup = min(2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks, total)
        actions = [Action("F", *place) for place in forwards[:warmup]]
        for turn in range(total):
            if turn + warmup < total:
                actions.append(Action("F", *forwards[turn + warmup]))
            actions.append(Action("B", *backwards[turn]))
        ranks.append(tuple(actions))
    return Schedule(
        name="interleaved",
        num_stages=num_ranks * num_chunks,
        num_microbatches=num_microbatches,
        ranks=tuple(ranks),
        stage_of_chunk=loop_placement(num_ranks, num_chunks),
    )


def check(num_ranks: int, num_microbatches: int, num_chunks: int) -> None:
    """Refuses what `interleaved` cannot build, without building it."""
    if num_ranks > 0 and num_microbatches % num_ranks:
        raise ValueError(
            f"interleaved deals microbatches out in groups of the {num_ranks} pipe ranks, so their number must "
            f"be a multiple of {num_ranks}, got {num_microbatches}; use one_f_one_b for other numbers"
        )
    if num_chunks < 2:
        raise ValueError(
            f"interleaved needs at least 2 chunks per pipe rank, got {num_chunks}; use one_f_one_b"
        )


def _turn(turn: int, rank: int, num_ranks: int, num_chunks: int) -> tuple[int, int]:
    """(stage, microbatch) of a rank's forward number `turn`: P microbatches on each chunk in turn."""
    group, within = divmod(turn, num_ranks * num_chunks)
    chunk, microbatch = divmod(within, num_ranks)
    return chunk * num_ranks + rank, group * num_ranks + microbatch
