"""This file is the packing: documents laid end to end and cut into fixed-length sequences without padding."""

from typing import Literal

import numpy as np

from piperjax.training.data.shards import TokenStore

_COUNTED_TOKENS = 1 << 20

# One training example; every leaf is [S]. The same five names are the leaves of a batch, [M, B, S].
Sequence = dict[str, np.ndarray]
LEAVES = {
    "tokens": np.int32,
    "targets": np.int32,
    "positions": np.int32,
    "segment_ids": np.int32,
    "weights": np.float32,
}


class PackedSequences:
    """The sequences of one split, each a pure function of its index.

    The pieces (documents, or parts of them) are put in a fixed random order, which depends on no seed, and
    laid end to end. Sequence `i` is the S tokens of that stream from `i * S` on; its targets are the same
    shifted by one:

        stream    a0 a1 a2 |  b0 b1 b2 b3 b4 |  c0 ...          S = 4, documents a, b, c
        sequence  [a0 a1 a2 b0] [b1 b2 b3 b4] ...
        targets   [a1 a2 b0 b1] [b2 b3 b4 c0]
        weights   [ 1  1  0  1] [ 1  1  1  0]                   0: the target begins another document
        segments  [ 1  1  1  2] [ 1  1  1  1]
        positions [ 0  1  2  0] [ 0  1  2  3]                   b goes on in the second, from position 0

    so every token that follows another of its document is a target of weight 1 exactly once.

    Args:
      store: the tokens.
      starts: [N] offset in the store of the first token of each piece.
      lengths: [N] tokens of each piece, at least 1.
      seq_len: S.
      tail: what happens to the last sequence when the stream ends inside it. "dropped": it does not exist.
        "padded": its rest is end-of-document tokens of weight 0, segment 0 and position 0.
    """

    def __init__(
        self,
        store: TokenStore,
        starts: np.ndarray,
        lengths: np.ndarray,
        *,
        seq_len: int,
        tail: Literal["dropped", "padded"],
    ):
        if seq_len < 1:
            raise ValueError(f"a sequence must hold at least one token, got seq_len = {seq_len}")
        order = _fixed_order(len(starts))
        self.store = store
        self.seq_len = seq_len
        self._starts = starts[order]
        self._ends = np.cumsum(lengths[order])
        self._begins = self._ends - lengths[order]
        # The last token has no successor, so it is a target only.
        steps = max(self.num_tokens - 1, 0)
        self._length = steps // seq_len if tail == "dropped" else -(-steps // seq_len)

    @property
    def num_tokens(self) -> int:
        """Tokens in the split, those of a dropped tail included."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def num_pieces(self) -> int:
        """Documents in the split, or parts of documents."""
        return len(self._starts)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sequence:
        """Returns sequence `index`: a dict with the names of `LEAVES`, each [S]."""
        if not 0 <= index < self._length:
            raise IndexError(f"sequence {index} of {self._length}")
        S = self.seq_len
        begin = int(index) * S
        tokens, within, pieces = self._read(begin, min(begin + S + 1, self.num_tokens))
        stream = np.full(S + 1, self.store.end_of_document, np.int32)
        positions = np.zeros(S + 1, np.int32)
        segments = np.zeros(S + 1, np.int32)
        stream[: len(tokens)] = tokens
        positions[: len(tokens)] = within
        segments[: len(tokens)] = pieces + 1
        is_target = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        return {
            "tokens": stream[:-1],
            "targets": stream[1:],
            "positions": positions[:-1],
            "segment_ids": segments[:-1],
            "weights": is_target.astype(np.float32),
        }

    def token_counts(self) -> np.ndarray:
        """Returns how often each token occurs in the split, int64 [V]; reads all of it."""
        counts = np.zeros_like(self.store.token_counts)
        for begin in range(0, self.num_tokens, _COUNTED_TOKENS):
            tokens, _, _ = self._read(begin, min(begin + _COUNTED_TOKENS, self.num_tokens))
            counts += np.bincount(tokens, minlength=len(counts))
        return counts

    def target_counts(self) -> np.ndarray:
        """Returns how often each token is a target of weight 1, int64 [V]; the first of a piece is none."""
        counts = self.token_counts()
        return counts - np.bincount(self.store.tokens(self._starts), minlength=len(counts))

    def _read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns tokens begin..end of the stream, each one's place in its piece's part here, and that piece.

        Pieces are numbered from 0, the one that `begin` falls into; all three are [end - begin].
        """
        first = np.searchsorted(self._ends, begin, side="right")
        last = np.searchsorted(self._begins, end, side="left")
        # Where each piece begins in the stream, how much of it is here, and from which offset of the store.
        left = np.maximum(self._begins[first:last], begin)
        counts = np.minimum(self._ends[first:last], end) - left
        sources = self._starts[first:last] + (left - self._begins[first:last])
        within = np.arange(end - begin) - np.repeat(left - begin, counts)
        tokens = self.store.tokens(np.repeat(sources, counts) + within)
        return tokens, within, np.repeat(np.arange(last - first), counts)


def padding(seq_len: int, end_of_document: int) -> Sequence:
    """Returns a sequence that counts for nothing: weight 0 and segment 0 throughout, each leaf [S]."""
    leaves = {name: np.zeros(seq_len, dtype) for name, dtype in LEAVES.items()}
    return leaves | {name: np.full(seq_len, end_of_document, np.int32) for name in ("tokens", "targets")}


def _fixed_order(count: int) -> np.ndarray:
    """Returns a permutation [count] that no version of numpy will change, as its generators might.

    Documents of one file or directory resemble each other; a random order spreads them over the sequences.
    """
    with np.errstate(over="ignore"):
        # SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers whose outputs look random.
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
