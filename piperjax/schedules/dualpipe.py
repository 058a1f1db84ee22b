"""DualPipeV: DeepSeek's bidirectional schedule folded into a V, so that no parameters are held twice."""

from collections import deque

from piperjax.schedules.schedule import Action, Schedule, v_placement


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """Builds DualPipeV (DeepSeek-AI, github.com/deepseek-ai/DualPipe; "cut-in-half" by Sea AI Lab).

    Rank r holds stages r (chunk 0) and 2P - 1 - r (chunk 1). In the main phase a forward of one chunk is
    paired with a backward of the other, so that either can hide the other's communication. With f, b and w
    seconds per chunk (b the full backward) and no overlap the bubble is `(P - 1) (f + 2 b - 3 w)`; at most
    `2P + 1` chunks are in flight. Its lockstep table is that of `zb_v`: every backward is split, as the executor
    runs it, and W wait for cheaper places.

    Raises:
      ValueError: if there are fewer than `2 P` microbatches.
    """
    check(num_ranks, num_microbatches)
    return Schedule(
        name="dualpipe_v",
        num_stages=2 * num_ranks,
        num_microbatches=num_microbatches,
        ranks=tuple(_Rank(rank, num_ranks).phases(num_microbatches) for rank in range(num_ranks)),
        stage_of_chunk=v_placement(num_ranks),
    )


def check(num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> None:
    """Refuses what `dualpipe_v` cannot build, without building it."""
    del num_chunks  # Always 2.
    if num_microbatches < 2 * num_ranks:
        raise ValueError(
            f"dualpipe_v needs at least two microbatches per pipe rank, {2 * num_ranks} in all, got "
            f"{num_microbatches}; raise num_microbatches or use zb_v"
        )


class _Rank:
    """One rank's actions, appended phase by phase; every chunk counts its own microbatches."""

    def __init__(self, rank: int, num_ranks: int):
        self.rank, self.num_ranks = rank, num_ranks
        self.stages = (rank, 2 * num_ranks - 1 - rank)
        self.forwards, self.backwards = [0, 0], [0, 0]
        self.waiting: deque[Action] = deque()
        self.actions: list[Action] = []

    def phases(self, num_microbatches: int) -> tuple[Action, ...]:
        behind = self.num_ranks - self.rank - 1
        for _ in range(2 * behind):
            self.forward(0)
        for _ in range(self.rank + 1):
            self.forward(0)
            self.forward(1)
        for _ in range(behind):
            self.backward(1, split=True)
            self.weight_gradient()
            self.forward(1)
        for _ in range(num_microbatches - 2 * self.num_ranks + self.rank + 1):
            self.forward(0)
            self.backward(1)
            self.forward(1)
            self.backward(0)
        for _ in range(behind):
            self.backward(1)
            self.forward(1)
            self.backward(0)
        # The later half of this phase splits its backwards: their W fill the end.
        whole = self.rank + 1
        for turn in range(2 * (self.rank + 1)):
            self.backward(1 - turn % 2, split=turn >= whole)
        for _ in range(behind):
            self.weight_gradient()
            self.backward(0, split=True)
        while self.waiting:
            self.weight_gradient()
        return tuple(self.actions)

    def forward(self, chunk: int):
        self.actions.append(Action("F", self.stages[chunk], self.forwards[chunk]))
        self.forwards[chunk] += 1

    def backward(self, chunk: int, *, split: bool = False):
        stage, microbatch = self.stages[chunk], self.backwards[chunk]
        self.backwards[chunk] += 1
        self.actions.append(Action("I" if split else "B", stage, microbatch))
        if split:
            self.waiting.append(Action("W", stage, microbatch))

    def weight_gradient(self):
        self.actions.append(self.waiting.popleft())
