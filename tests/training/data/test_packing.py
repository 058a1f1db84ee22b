"""The packing laws, on an example drawn by hand and on random documents."""

import numpy as np
import pytest

from piperjax.training.data.packing import LEAVES, PackedSequences, padding
from piperjax.training.data.shards import TokenStore

END = 99


def store_of(*lengths):
    """Returns a store whose document d is the tokens 100 d, 100 d + 1, ..."""
    tokens = np.concatenate([100 * d + np.arange(length) for d, length in enumerate(lengths)])
    return TokenStore(
        path=None,
        content="",
        shards=(tokens.astype(np.uint16),),
        document_tokens=np.array(lengths, np.int64),
        document_bytes=np.array(lengths, np.int64) - 1,
        document_hashes=np.zeros(len(lengths), np.uint64),
        token_counts=np.bincount(tokens, minlength=100 * len(lengths)),
        end_of_document=END,
    )


def pack(*lengths, seq_len, tail="dropped"):
    starts = np.cumsum(lengths) - lengths
    return PackedSequences(store_of(*lengths), starts, np.array(lengths), seq_len=seq_len, tail=tail)


def draw(sequence):
    return "\n".join(f"{name:<12}" + " ".join(f"{int(x):>3}" for x in sequence[name]) for name in LEAVES)


def test_drawn_by_hand():
    # Three documents of 3, 5 and 2 tokens, which the fixed order puts as 2, 1, 0.
    packed = pack(3, 5, 2, seq_len=4, tail="padded")
    assert [draw(packed[index]) for index in range(len(packed))] == [
        "tokens      200 201 100 101\n"
        "targets     201 100 101 102\n"
        "positions     0   1   0   1\n"
        "segment_ids   1   1   2   2\n"
        "weights       1   0   1   1",
        "tokens      102 103 104   0\n"
        "targets     103 104   0   1\n"
        "positions     0   1   2   0\n"
        "segment_ids   1   1   1   2\n"
        "weights       1   1   0   1",
        "tokens        1   2  99  99\n"
        "targets       2  99  99  99\n"
        "positions     0   1   0   0\n"
        "segment_ids   1   1   0   0\n"
        "weights       1   0   0   0",
    ]


def test_the_incomplete_tail_is_dropped_or_padded():
    assert [len(pack(3, 5, 2, seq_len=s)) for s in (1, 3, 4, 8, 9, 10)] == [9, 3, 2, 1, 1, 0]
    assert [len(pack(3, 5, 2, seq_len=s, tail="padded")) for s in (1, 3, 4, 8, 9, 10)] == [9, 3, 3, 2, 1, 1]
    assert len(pack(1, seq_len=4, tail="padded")) == 0


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 1000])
def test_laws(seq_len):
    lengths = np.random.default_rng(seq_len).integers(1, 40, 60)
    packed = pack(*lengths, seq_len=seq_len, tail="padded")
    targets = []
    for index in range(len(packed)):
        sequence = packed[index]
        tokens, goals, positions, segments, weights = (sequence[name] for name in LEAVES)
        assert {name: leaf.dtype for name, leaf in sequence.items()} == LEAVES
        assert all(leaf.shape == (seq_len,) for leaf in sequence.values())
        is_real = segments > 0
        np.testing.assert_array_equal(goals[:-1], tokens[1:])
        # A target counts exactly where it is the successor of the token in the same document.
        np.testing.assert_array_equal(weights == 1, is_real & (goals == tokens + 1))
        assert set(np.unique(weights)) <= {0, 1}
        # Segments count up from 1; positions count up inside each and restart at 0.
        if is_real.any():
            np.testing.assert_array_equal(np.unique(segments[is_real]), np.arange(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            (here,) = np.nonzero(segments == segment)
            np.testing.assert_array_equal(positions[here], np.arange(len(here)))
            np.testing.assert_array_equal(tokens[here] - tokens[here[0]], np.arange(len(here)))
        targets += goals[weights == 1].tolist()
    # No token is lost or seen twice: all but the first of each document are targets once.
    expected = [100 * d + t for d, length in enumerate(lengths) for t in range(1, length)]
    assert sorted(targets) == expected
    np.testing.assert_array_equal(np.nonzero(packed.target_counts())[0], expected)
    assert packed.token_counts().sum() == packed.num_tokens == lengths.sum()


def test_pieces_may_be_part_of_a_document():
    starts, lengths = np.array([3, 12]), np.array([4, 3])
    packed = PackedSequences(store_of(10, 10), starts, lengths, seq_len=7, tail="padded")
    assert packed[0]["tokens"].tolist() == [102, 103, 104, 3, 4, 5, 6]
    assert packed.num_pieces == 2


def test_counting_in_small_portions(monkeypatch):
    packed = pack(3, 50, 7, seq_len=4)
    whole = packed.token_counts()
    monkeypatch.setattr("piperjax.training.data.packing._COUNTED_TOKENS", 4)
    np.testing.assert_array_equal(packed.token_counts(), whole)


def test_the_order_of_documents_is_fixed_for_ever():
    # Sorted by SplitMix64 of seed 0, whose published outputs begin e220a839..., 6e789e6a..., 06c45d18...,
    # f88bb8a8..., 1b39896a...
    packed = pack(*[1] * 5, seq_len=5, tail="padded")
    assert (packed[0]["tokens"] // 100).tolist() == [2, 4, 1, 0, 3]


def test_indices_outside():
    packed = pack(3, 5, 2, seq_len=4)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"sequence {index} of 2"):
            packed[index]


def test_sequence_length_must_be_positive():
    with pytest.raises(ValueError, match="a sequence must hold at least one token, got seq_len = 0"):
        pack(3, seq_len=0)


def test_padding_counts_for_nothing():
    assert draw(padding(2, END)) == (
        "tokens       99  99\n"
        "targets      99  99\n"
        "positions     0   0\n"
        "segment_ids   0   0\n"
        "weights       0   0"
    )
