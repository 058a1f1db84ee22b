"""Zero-bubble schedules, one stage per pipe rank: weight gradients wait for moments that would be idle.

Qi et al. (arXiv:2401.10241) split the backward into I, which the neighbour waits for, and W, which nobody
waits for. Times below are f, i and w seconds of F, I and W. The paper writes B for our I.
"""

from piperjax.schedules.schedule import Action, Schedule, one_stage_per_rank


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """Builds ZB-H1: 1F1B's memory, a third of its bubble at equal times.

    Rank r runs W of a microbatch r microbatches after its I, so every rank holds at most P between F and W.
    With P or more microbatches the bubble is `(P - 1) (f + i - w)`, where w is at most f and i.
    """
    ranks = tuple(
        _one_rank(rank, num_microbatches, warmup=num_ranks - rank, delay=rank) for rank in range(num_ranks)
    )
    return one_stage_per_rank("zb_h1", num_microbatches, ranks)


def zb_h2(num_ranks: int, num_microbatches: int) -> Schedule:
    """Builds ZB-H2: no bubble at equal times, with up to 2P - 1 microbatches between F and W.

    With `2P - 1` or more microbatches the bubble of a rank, from its own first action to its own last, is
    `(P - 1) (f + i - 2w)`: zero at equal times. Ranks start and end one after another, so a step that ends
    together on all ranks takes `(P - 1) f` more.
    """
    ranks = tuple(
        _one_rank(rank, num_microbatches, warmup=2 * (num_ranks - rank) - 1, delay=2 * rank)
        for rank in range(num_ranks)
    )
    return one_stage_per_rank("zb_h2", num_microbatches, ranks, clock="single")


def zb_dual(num_ranks: int, num_microbatches: int) -> Schedule:
    """Builds the zero-bubble schedule for lockstep ticks that hold a forward and a backward each.

    F(m) runs on rank r at tick `m + r`, I(m) at `m + 2 (P - 1) - r`, and `ticks.pack` puts W where a rank lacks
    a forward or a backward, the rest into ticks that all ranks share. With `2 P - 1` or more microbatches
    lockstep costs `M (f + i + w) + (P - 1) (f + i - w)`, ZB-H1's bubble, without needing f = i = w: only
    `w <= f` and `w <= i`. With fewer there is not enough slack, and `pack` may run one action per tick. At most
    `2 (P - r) - 1` microbatches are in flight on rank r.
    """
    ranks = tuple(
        _one_rank(rank, num_microbatches, warmup=2 * (num_ranks - rank) - 1, delay=rank)
        for rank in range(num_ranks)
    )
    return one_stage_per_rank("zb_dual", num_microbatches, ranks)


def _one_rank(rank: int, num_microbatches: int, *, warmup: int, delay: int) -> tuple[Action, ...]:
    """`warmup` forwards, then I, W of `delay` microbatches ago, F in turn; the last W at the end."""
    warmup = min(warmup, num_microbatches)
    actions = [Action("F", rank, m) for m in range(warmup)]
    for m in range(num_microbatches):
        actions.append(Action("I", rank, m))
        if m >= delay:
            actions.append(Action("W", rank, m - delay))
        if m + warmup < num_microbatches:
            actions.append(Action("F", rank, m + warmup))
    waiting = range(max(0, num_microbatches - delay), num_microbatches)
    return (*actions, *(Action("W", rank, m) for m in waiting))
