"""Lowering: a tick table becomes the integer columns that the executor scans over.

Buffers are counted here and nowhere else. A value that waits (an activation that has arrived, a gradient
that has arrived, the layer inputs kept for backward) holds a slot from the tick that writes it to the tick
that reads it last; slots are given out by greedy interval colouring, which is optimal for intervals, so a
buffer has exactly as many slots as values ever wait at once on the worst rank.
"""

import heapq
from collections import Counter
from dataclasses import dataclass, fields

import numpy as np

from piperjax.schedules.schedule import Action
from piperjax.schedules.ticks import TickTable


@dataclass(frozen=True, kw_only=True)
class RankColumns:
    """Per tick and pipe rank, int32 `[ticks, ranks]`; arrivals are `[ticks, ranks, channels]`.

    A slot column points one past the last slot ("trash") where nothing is to be kept.

    Attributes:
      forward_on, forward_microbatch, forward_chunk: the forward of this tick, if any.
      forward_is_first: the forward reads the embedding instead of an arrival.
      forward_input: slot of the arrived activation that the forward reads.
      forward_stash: slot where the forward keeps what backward needs.
      backward_on, backward_microbatch, backward_chunk: the backward (or input gradient) of this tick, if any.
      backward_is_first: the backward's result goes to the embedding.
      backward_stash: slot with what the forward kept.
      backward_gradient: slot with the arrived output gradient.
      backward_taps: slot where an input gradient leaves what its weight gradient needs.
      weight_gradient_on, weight_gradient_microbatch, weight_gradient_chunk, weight_gradient_taps: weight
        gradients of this tick, `[ticks, ranks, weight gradients per tick]`.
      head_owner: the rank holds the last stage's output that the head of this tick reads.
      head_gradient: gradient slot that receives this tick's gradient of the head.
      input_arrival: input slot that receives what arrives over each forward channel.
      gradient_arrival: gradient slot that receives what arrives over each backward channel.
    """

    forward_on: np.ndarray
    forward_microbatch: np.ndarray
    forward_chunk: np.ndarray
    forward_is_first: np.ndarray
    forward_input: np.ndarray
    forward_stash: np.ndarray
    backward_on: np.ndarray
    backward_microbatch: np.ndarray
    backward_chunk: np.ndarray
    backward_is_first: np.ndarray
    backward_stash: np.ndarray
    backward_gradient: np.ndarray
    backward_taps: np.ndarray
    weight_gradient_on: np.ndarray
    weight_gradient_microbatch: np.ndarray
    weight_gradient_chunk: np.ndarray
    weight_gradient_taps: np.ndarray
    head_owner: np.ndarray
    head_gradient: np.ndarray
    input_arrival: np.ndarray
    gradient_arrival: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TickColumns:
    """Per tick, the same on every rank, int32 `[ticks]`: slots that all ranks work on together.

    Attributes:
      embedding_on, embedding_microbatch: look up the embedding of a microbatch.
      head_on, head_microbatch: head and loss of a microbatch.
      embedding_gradient_on, embedding_gradient_microbatch: add a gradient to the embedding.
    """

    embedding_on: np.ndarray
    embedding_microbatch: np.ndarray
    head_on: np.ndarray
    head_microbatch: np.ndarray
    embedding_gradient_on: np.ndarray
    embedding_gradient_microbatch: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LoweredSchedule:
    """What the executor interprets.

    Attributes:
      table: the tick table this was lowered from.
      rank_columns: columns that differ by pipe rank.
      tick_columns: columns that all ranks share.
      num_input_slots: arrived activations that wait at once (trash slot not counted).
      num_stash_slots: kept layer inputs at once.
      num_gradient_slots: arrived gradients at once.
      num_tap_slots: input gradients at once whose weight gradients are due; 0 if backward is never split.
      weight_gradients_per_tick: most weight gradients of a rank in one tick.
      early_weight_gradients: how many of these columns are run before the head, by ranks without a forward.
      head_comes_first: the head reads what the tick before has left, so that nobody waits between F and B.
      forward_channels: rank shifts over which activations travel: +1, -1, or 0 for the rank itself.
      backward_channels: the same for gradients.
    """

    table: TickTable
    rank_columns: RankColumns
    tick_columns: TickColumns
    num_input_slots: int
    num_stash_slots: int
    num_gradient_slots: int
    num_tap_slots: int
    weight_gradients_per_tick: int
    early_weight_gradients: int
    head_comes_first: bool
    forward_channels: tuple[int, ...]
    backward_channels: tuple[int, ...]

    @property
    def has_backward(self) -> bool:
        """Whether the schedule trains."""
        return self.table.schedule.passes == "forward_backward"

    @property
    def num_ticks(self) -> int:
        """Ticks per step."""
        return len(self.table.ticks)


def lower(table: TickTable) -> LoweredSchedule:
    """Lowers a tick table to integer columns.

    Where some backwards are split into I and W, a full B is run as both in one tick.
    """
    return _Lowering(table).run()


class _Lowering:
    """Working state of `lower`: columns being filled, and the lifetimes of waiting values by rank."""

    def __init__(self, table: TickTable):
        self.table, self.schedule = table, table.schedule
        self.tick_of = table.tick_of()
        self.splits = any(action.kind in "IW" for action in self.tick_of)
        # Tick of the backward or input gradient, and of the weight gradient, of a (stage, microbatch).
        self.backward_tick = {a[1:]: tick for a, tick in self.tick_of.items() if a.kind in "BI"}
        self.weight_tick = {a[1:]: tick for a, tick in self.tick_of.items() if self.splits and a.kind in "BW"}
        self.head_comes_first = table.head_comes_first
        self.early = int(bool(table.before_head))
        self.weight_columns = self._weight_columns()
        self.weights_per_tick = 1 + max(self.weight_columns.values(), default=-1)
        size = (len(table.ticks), self.schedule.num_ranks)
        shifts = [
            _shift(
                self.schedule.rank_of_stage[s], self.schedule.rank_of_stage[s + 1], self.schedule.num_ranks
            )
            for s in range(self.schedule.num_stages - 1)
        ]
        self.forward_channels = tuple(sorted(set(shifts), reverse=True))
        self.backward_channels = tuple(sorted({-s for s in shifts}))
        self.shifts = shifts
        channels = {"input_arrival": len(shifts and self.forward_channels)}
        channels["gradient_arrival"] = len(self.backward_channels) if self._trains else 0
        channels |= {
            f.name: self.weights_per_tick for f in fields(RankColumns) if "weight_gradient" in f.name
        }
        self.rank = {
            f.name: np.zeros(size + ((channels[f.name],) if f.name in channels else ()), np.int32)
            for f in fields(RankColumns)
        }
        self.tick = {f.name: np.zeros(size[:1], np.int32) for f in fields(TickColumns)}

    @property
    def _trains(self) -> bool:
        return self.schedule.passes == "forward_backward"

    def _weight_columns(self) -> dict[tuple[int, int], int]:
        """Column of each weight gradient in its tick: 0 before the head if there are such, the others after it."""
        late: Counter[tuple[int, int]] = Counter()
        columns = {}
        for key, tick in sorted(self.weight_tick.items(), key=lambda item: item[1]):
            if Action("W", *key) in self.table.before_head:
                columns[key] = 0
            else:
                place = (tick, self.schedule.rank_of_stage[key[0]])
                columns[key] = self.early + late[place]
                late[place] += 1
        return columns

    def run(self) -> LoweredSchedule:
        inputs, stashes, gradients, taps = self._slots()
        trash = (inputs.count, stashes.count, gradients.count)
        for name, slot in (
            ("forward_input", trash[0]),
            ("input_arrival", trash[0]),
            ("forward_stash", trash[1]),
            ("backward_stash", trash[1]),
            ("backward_gradient", trash[2]),
            ("head_gradient", trash[2]),
            ("gradient_arrival", trash[2]),
        ):
            self.rank[name][:] = slot
        for action in self.tick_of:
            if action.kind == "F":
                self._forward(action, inputs, stashes, gradients)
            elif action.kind in "BI":
                self._backward(action, stashes, gradients, taps)
        self._weight_gradients(taps)
        return LoweredSchedule(
            table=self.table,
            rank_columns=RankColumns(**self.rank),
            tick_columns=TickColumns(**self.tick),
            num_input_slots=inputs.count,
            num_stash_slots=stashes.count,
            num_gradient_slots=gradients.count,
            num_tap_slots=taps.count,
            weight_gradients_per_tick=self.weights_per_tick,
            early_weight_gradients=self.early,
            head_comes_first=self.head_comes_first,
            forward_channels=self.forward_channels,
            backward_channels=self.backward_channels if self._trains else (),
        )

    def _slots(self) -> tuple["_Slots", "_Slots", "_Slots", "_Slots"]:
        schedule, tick_of = self.schedule, self.tick_of
        inputs, stashes, gradients, taps = (_Slots(schedule.num_ranks) for _ in range(4))
        for action, tick in tick_of.items():
            kind, stage, microbatch = action
            key, rank = (stage, microbatch), schedule.rank_of_stage[stage]
            if kind == "F":
                if stage:
                    sent = tick_of[Action("F", stage - 1, microbatch)]
                    inputs.add(rank, key, sent + 1, tick)
                if self._trains:
                    stashes.add(rank, key, tick, self.backward_tick[key])
            elif kind in "BI":
                is_last = stage == schedule.num_stages - 1
                if is_last:
                    arrival = tick_of[Action("F", stage, microbatch)] + self.head_comes_first
                else:
                    arrival = self.backward_tick[stage + 1, microbatch] + 1
                gradients.add(rank, key, arrival, tick)
                if self.splits:
                    taps.add(rank, key, tick, self.weight_tick[key])
        for slots in (inputs, stashes, gradients, taps):
            slots.colour()
        return inputs, stashes, gradients, taps

    def _forward(self, action: Action, inputs: "_Slots", stashes: "_Slots", gradients: "_Slots"):
        _, stage, microbatch = action
        tick, rank = self.tick_of[action], self.schedule.rank_of_stage[stage]
        place, key = (tick, rank), (stage, microbatch)
        self.rank["forward_on"][place] = 1
        self.rank["forward_microbatch"][place] = microbatch
        self.rank["forward_chunk"][place] = self.schedule.chunk_of_stage[stage]
        if self._trains:
            self.rank["forward_stash"][place] = stashes.slot[key]
        if stage == 0:
            self.rank["forward_is_first"][place] = 1
            self.tick["embedding_on"][tick], self.tick["embedding_microbatch"][tick] = 1, microbatch
        else:
            self.rank["forward_input"][place] = inputs.slot[key]
        if stage == self.schedule.num_stages - 1:
            head_tick = tick + self.head_comes_first
            self.rank["head_owner"][head_tick, rank] = 1
            self.tick["head_on"][head_tick], self.tick["head_microbatch"][head_tick] = 1, microbatch
            if self._trains:
                self.rank["head_gradient"][head_tick, rank] = gradients.slot[key]
        else:
            channel = self.forward_channels.index(self.shifts[stage])
            receiver = self.schedule.rank_of_stage[stage + 1]
            self.rank["input_arrival"][tick + 1, receiver, channel] = inputs.slot[stage + 1, microbatch]

    def _backward(self, action: Action, stashes: "_Slots", gradients: "_Slots", taps: "_Slots"):
        _, stage, microbatch = action
        tick, rank = self.tick_of[action], self.schedule.rank_of_stage[stage]
        place, key = (tick, rank), (stage, microbatch)
        self.rank["backward_on"][place] = 1
        self.rank["backward_microbatch"][place] = microbatch
        self.rank["backward_chunk"][place] = self.schedule.chunk_of_stage[stage]
        self.rank["backward_stash"][place] = stashes.slot[key]
        self.rank["backward_gradient"][place] = gradients.slot[key]
        if self.splits:
            self.rank["backward_taps"][place] = taps.slot[key]
        if stage == 0:
            self.rank["backward_is_first"][place] = 1
            self.tick["embedding_gradient_on"][tick] = 1
            self.tick["embedding_gradient_microbatch"][tick] = microbatch
        else:
            channel = self.backward_channels.index(-self.shifts[stage - 1])
            receiver = self.schedule.rank_of_stage[stage - 1]
            self.rank["gradient_arrival"][tick + 1, receiver, channel] = gradients.slot[stage - 1, microbatch]

    def _weight_gradients(self, taps: "_Slots"):
        for (stage, microbatch), tick in self.weight_tick.items():
            rank = self.schedule.rank_of_stage[stage]
            place = (tick, rank, self.weight_columns[stage, microbatch])
            self.rank["weight_gradient_on"][place] = 1
            self.rank["weight_gradient_microbatch"][place] = microbatch
            self.rank["weight_gradient_chunk"][place] = self.schedule.chunk_of_stage[stage]
            self.rank["weight_gradient_taps"][place] = taps.slot[stage, microbatch]


class _Slots:
    """Lifetimes of the values that wait on each rank, and the slots they get."""

    def __init__(self, num_ranks: int):
        self.lifetimes: list[list[tuple[int, int, tuple[int, int]]]] = [[] for _ in range(num_ranks)]
        self.slot: dict[tuple[int, int], int] = {}
        self.count = 0

    def add(self, rank: int, key: tuple[int, int], first_tick: int, last_tick: int):
        self.lifetimes[rank].append((first_tick, last_tick, key))

    def colour(self):
        for lifetimes in self.lifetimes:
            free: list[int] = []
            live: list[tuple[int, int]] = []
            used = 0
            for first, last, key in sorted(lifetimes):
                while live and live[0][0] < first:
                    heapq.heappush(free, heapq.heappop(live)[1])
                if free:
                    slot = heapq.heappop(free)
                else:
                    slot, used = used, used + 1
                self.slot[key] = slot
                heapq.heappush(live, (last, slot))
            self.count = max(self.count, used)


def _shift(sender: int, receiver: int, num_ranks: int) -> int:
    """Rank shift from sender to receiver as -1, 0 or +1 on the ring of pipe ranks."""
    shift = (receiver - sender) % num_ranks
    if shift == 0:
        return 0
    if shift == 1:
        return 1
    if shift == num_ranks - 1:
        return -1
    raise ValueError(
        f"consecutive stages must be on the same or on neighbouring pipe ranks, got ranks {sender} and {receiver}"
    )
