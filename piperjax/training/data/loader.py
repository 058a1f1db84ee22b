"""This file is the loader: which sequences make up which step, read by each process for its own rows only."""

import hashlib
import math
import operator
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from piperjax.training.data.packing import LEAVES, PackedSequences, padding

Batch = dict[str, np.ndarray]
Rows = slice | Sequence[int]

_PREFETCH_STEPS = 4
_READ_THREADS = 2


class TrainBatches:
    """The training batches of a run, each a pure function of (seed, step).

    Step `s` takes the sequences at positions `s * batch_size ..` of an endless order in which every epoch is
    another permutation of the whole split. Row `r` of microbatch `m` is position
    `s * batch_size + m * B_mb + r`, with B_mb = batch_size / num_microbatches: neither the mesh nor the
    number of processes enters, and the position of a run in its data is its step.

    Args:
      sequences: usually `dataset.train`.
      batch_size: sequences per step, over all processes.
      num_microbatches: M.
      rows: the rows of each microbatch that this process reads; all by default.
      seed: chooses the order.
    """

    def __init__(
        self,
        sequences: PackedSequences,
        *,
        batch_size: int,
        num_microbatches: int = 1,
        rows: Rows = slice(None),
        seed: int = 0,
    ):
        # Imported here since it takes a second, which is not for those who only ask for help.
        import grain

        if not len(sequences):
            raise ValueError("there is no sequence to train on; give more text or shorter sequences")
        self._sequences = sequences
        self._batch_size = batch_size
        self._offsets = _offsets(batch_size, num_microbatches, rows)
        # Grain takes 32-bit seeds and adds 1 for each epoch; hashed, lest seed 0's second epoch be seed 1's
        # first.
        order = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")
        self._order = grain.MapDataset.range(len(sequences)).shuffle(seed=order).repeat()

    def sequence_index(self, position: int) -> int:
        """Returns which sequence stands at a position of the run."""
        return int(self._order[position])

    def epoch(self, step: int) -> float:
        """Returns how many times the split has been read before `step`."""
        return step * self._batch_size / len(self._sequences)

    def batch(self, step: int) -> Batch:
        """Returns this process's rows of a step: the leaves of `LEAVES`, each [M, rows, S]."""
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        positions = step * self._batch_size + self._offsets
        indices = [self.sequence_index(position) for position in positions.flat]
        return _stack(self._sequences, positions.shape, indices)

    def iterate(self, first_step: int = 0) -> Iterator[Batch]:
        """Yields `batch(first_step)`, `batch(first_step + 1)`, ... without end, read ahead by threads."""
        import grain

        options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_PREFETCH_STEPS)
        return iter(grain.MapDataset.range(first_step, sys.maxsize).map(self.batch).to_iter_dataset(options))


class ValidationBatches:
    """The validation sequences in order, once each; rows past the last one are padding of weight 0.

    Args:
      sequences: usually `dataset.validation`.
      batch_size: sequences per batch, over all processes.
      num_microbatches: M.
      rows: the rows of each microbatch that this process reads; all by default.
    """

    def __init__(
        self,
        sequences: PackedSequences,
        *,
        batch_size: int,
        num_microbatches: int = 1,
        rows: Rows = slice(None),
    ):
        self._sequences = sequences
        self._batch_size = batch_size
        self._offsets = _offsets(batch_size, num_microbatches, rows)

    def __len__(self) -> int:
        return math.ceil(len(self._sequences) / self._batch_size)

    def __getitem__(self, index: int) -> Batch:
        """Returns this process's rows of a batch: the leaves of `LEAVES`, each [M, rows, S]."""
        if not 0 <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        positions = index * self._batch_size + self._offsets
        return _stack(self._sequences, positions.shape, list(positions.flat))


def _offsets(batch_size: int, num_microbatches: int, rows: Rows) -> np.ndarray:
    """Returns the positions [M, rows] inside a step of the rows that this process reads."""
    if batch_size < 1 or num_microbatches < 1 or batch_size % num_microbatches:
        raise ValueError(
            f"batch_size must be a positive multiple of num_microbatches, got {batch_size} sequences in "
            f"{num_microbatches} microbatches"
        )
    grid = np.arange(batch_size).reshape(num_microbatches, -1)
    if isinstance(rows, slice):
        chosen = grid[:, rows]
    else:
        chosen = np.array([operator.index(row) for row in rows], np.int64)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < grid.shape[1]:
            raise ValueError(f"rows must lie in 0..{grid.shape[1] - 1}, got {chosen.min()}..{chosen.max()}")
        chosen = grid[:, chosen]
    if not chosen.size:
        raise ValueError(f"rows {rows} select none of the {grid.shape[1]} rows of a microbatch")
    return chosen


def _stack(sequences: PackedSequences, grid: tuple[int, ...], indices: list[int]) -> Batch:
    blank = padding(sequences.seq_len, sequences.store.end_of_document)
    rows = [sequences[index] if index < len(sequences) else blank for index in indices]
    return {name: np.stack([row[name] for row in rows]).reshape(*grid, -1) for name in LEAVES}
