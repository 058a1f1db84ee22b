"""V-shaped schedules: stages go down the ranks and back up, so that all ranks hold equally much for equally long.

Rank r holds stages r (chunk 0) and 2P - 1 - r (chunk 1); first and last stage share rank 0. V-Half and V-Min
repeat a building block, the moments at which one microbatch runs on every rank, every six units: three each
for two chunks at f = i = w = 1. What is held is what the block's lifetimes add up to, divided by six. (Qi et
al., Pipeline Parallelism with Controllable Memory, arXiv:2405.15362, which writes B for our I.)
"""

from collections import Counter, deque

from piperjax.schedules.schedule import Action, Schedule, dependencies, v_placement

UNITS_PER_MICROBATCH = 6


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """Builds ZB-V: no bubble at equal times with 1F1B's memory.

    With `2P - 1` or more microbatches the bubble of a rank, from its own first action to its own last, is
    zero at f = i = w, and every rank holds at most 2P chunks (P stage activations) between F and W. A step
    that ends together on all ranks takes `(P - 1) f` more. Its lockstep table follows DualPipeV's order; from `2P`
    microbatches on it costs `2M (f + i + w) + (P - 1) (f + i + max(f, i) - 2w)` for any w up to f and i, at equal
    times what the step takes asynchronously, with at most 2P + 1 chunks in flight.
    """
    ranks = tuple(_zb_v_rank(rank, num_ranks, num_microbatches) for rank in range(num_ranks))
    return _schedule("zb_v", num_microbatches, ranks, clock="dual")


def v_half(num_ranks: int, num_microbatches: int) -> Schedule:
    """Builds V-Half: about half of 1F1B's memory with half of its bubble.

    Activations spend two units per hop down and one per hop up: at most `2 (P // 2 + 1)` chunks, `P // 2 + 1`
    stage activations, are held on a rank between F and W. At f = i = w = 1 and enough microbatches the bubble
    is `3 (P - 1)` units for even P and one less for odd P > 1, where 1F1B's is `6 (P - 1)`.
    """
    # Three units at the turn keep the four moments apart modulo six when P is even.
    turn = 3 * num_ranks + (0 if num_ranks % 2 else 3)
    blocks = [
        (2 * rank, 3 * num_ranks - 2 - rank, turn - 1 + 2 * rank, turn + 3 * num_ranks - 2 - rank)
        for rank in range(num_ranks)
    ]
    return _repeated("v_half", num_microbatches, blocks, most_held=2 * (num_ranks // 2 + 1))


def v_min(num_ranks: int, num_microbatches: int) -> Schedule:
    """Builds V-Min: about a third of 1F1B's memory with two thirds of its bubble.

    Activations spend one unit per hop, the fastest possible: at most `2 ceil((P + 2) / 3)` chunks,
    `ceil((P + 2) / 3)` stage activations, are held on a rank between F and W. At f = i = w = 1 and enough
    microbatches the bubble is `4 (P - 1) - 1` units, or `4 (P - 1) + 1` if three divides P.
    """
    # Two units at the turn keep the four moments apart modulo six when three divides P.
    turn = 2 * num_ranks + (2 if num_ranks % 3 == 0 else 0)
    blocks = [
        (rank, 2 * num_ranks - 1 - rank, turn + rank, turn + 2 * num_ranks - 1 - rank)
        for rank in range(num_ranks)
    ]
    return _repeated("v_min", num_microbatches, blocks, most_held=2 * -(-(num_ranks + 2) // 3))


def _zb_v_rank(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    """One rank of ZB-V, for as many microbatches as fill the pipeline, then cut to those there are."""
    down, up = rank, 2 * num_ranks - 1 - rank
    behind, total = num_ranks - rank, max(num_microbatches, 2 * num_ranks - 1)
    actions: list[Action] = []
    counts: Counter[tuple[str, int]] = Counter()

    def run(kinds: str, stage: int):
        for kind in kinds:
            actions.append(Action(kind, stage, counts[kind, stage]))
            counts[kind, stage] += 1

    run("F" * (2 * behind - 1), down)
    for _ in range(rank):
        run("F", up)
        run("F", down)
    for _ in range(behind):
        run("FIW", up)
    while counts["F", up] < total:
        run("FIW" if counts["F", down] < total else "IW", down)
        run("FIW", up)
    for _ in range(rank):
        run("I", down)
        run("I", up)
    for _ in range(behind):
        run("IW", down)
    run("W" * (total - counts["W", up]), up)
    run("W" * (total - counts["W", down]), down)
    return tuple(action for action in actions if action.microbatch < num_microbatches)


def _repeated(
    name: str, num_microbatches: int, blocks: list[tuple[int, int, int, int]], *, most_held: int
) -> Schedule:
    """Repeats a block of moments (F and F, I and I, down and up the V); W fill what is left."""
    orders = []
    for rank, moments in enumerate(blocks):
        up = 2 * len(blocks) - 1 - rank
        places = ("F", rank), ("F", up), ("I", up), ("I", rank)
        timed = [
            (moment + UNITS_PER_MICROBATCH * microbatch, Action(kind, stage, microbatch))
            for (kind, stage), moment in zip(places, moments, strict=True)
            for microbatch in range(num_microbatches)
        ]
        orders.append(deque(action for _, action in sorted(timed)))
    ranks = _with_weight_gradients(orders, most_held)
    return _schedule(name, num_microbatches, ranks, clock="single")


def _with_weight_gradients(orders: list[deque[Action]], most_held: int) -> tuple[tuple[Action, ...], ...]:
    """Runs the orders in unit time; a rank that must wait, or that holds all it may, runs a W instead."""
    ranks: list[list[Action]] = [[] for _ in orders]
    waiting: list[deque[Action]] = [deque() for _ in orders]
    held, done = [0] * len(orders), set()
    while any(orders) or any(waiting):
        finished = []
        for rank, order in enumerate(orders):
            ahead = order and all(
                any(need in done for need in group) for group in dependencies(order[0], 2 * len(orders))
            )
            if ahead and not (order[0].kind == "F" and held[rank] >= most_held):
                action = order.popleft()
                held[rank] += action.kind == "F"
            elif waiting[rank]:
                action = waiting[rank].popleft()
                held[rank] -= 1
            else:
                continue
            ranks[rank].append(action)
            finished.append(action)
            if action.kind == "I":
                waiting[rank].append(action._replace(kind="W"))
        assert finished, "a block holds at most what it may"
        done.update(finished)
    return tuple(map(tuple, ranks))


def _schedule(
    name: str, num_microbatches: int, ranks: tuple[tuple[Action, ...], ...], *, clock: str
) -> Schedule:
    return Schedule(
        name=name,
        num_stages=2 * len(ranks),
        num_microbatches=num_microbatches,
        ranks=ranks,
        stage_of_chunk=v_placement(len(ranks)),
        clock=clock,
    )
