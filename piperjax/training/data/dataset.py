"""This file is the dataset: a corpus tokenised, split into training and validation text, and packed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from piperjax.training.data.corpus import STANDARD_LIBRARY, find_corpus
from piperjax.training.data.packing import PackedSequences
from piperjax.training.data.shards import TokenStore, default_cache_dir, open_token_store
from piperjax.training.data.tokenizer import ByteTokenizer, Tokenizer

VALIDATION_FRACTION = 0.02

# Where each piece of a split starts in the store, and how many tokens it has: two arrays [N].
Pieces = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Dataset:
    """Text to train on, and text held out to validate with.

    Attributes:
      name: what the text is, for printing.
      tokenizer: made the tokens.
      store: all the tokens.
      train: sequences of the training split; the incomplete last one is dropped.
      validation: sequences of the validation split, the last one padded; empty if there is too little text.
      validation_bytes: UTF-8 bytes of the validation text.
    """

    name: str
    tokenizer: Tokenizer
    store: TokenStore
    train: PackedSequences
    validation: PackedSequences
    validation_bytes: float

    @property
    def seq_len(self) -> int:
        """S, tokens per sequence."""
        return self.train.seq_len

    @property
    def fingerprint(self) -> str:
        """Names the content: equal fingerprints, batch sizes and seeds give equal batches, on any machine."""
        sizes = (self.seq_len, self.train.num_tokens, self.validation.num_tokens)
        return "-".join([self.store.content, *map(str, sizes)])

    @property
    def validation_targets(self) -> int:
        """Targets of weight 1 in the validation split: every token but the first of each piece."""
        return self.validation.num_tokens - self.validation.num_pieces

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per validation target; bits per byte = loss / ln 2 / bytes_per_token."""
        return self.validation_bytes / self.validation_targets if self.validation_targets else float("nan")

    @cached_property
    def unigram_entropy(self) -> float:
        """`unigram_entropy` of this dataset, in nats per token."""
        return unigram_entropy(self)

    def describe(self) -> str:
        """Returns one line for the log."""
        number = self.store.num_documents
        return (
            f"{self.name}: {number:,} document{'s' * (number != 1)}, {self.store.num_tokens:,} tokens; "
            f"{len(self.train):,} training and {len(self.validation):,} validation sequences "
            f"of {self.seq_len}; cache {self.store.path}"
        )


def load_dataset(
    data: str = STANDARD_LIBRARY,
    *,
    seq_len: int,
    tokenizer: Tokenizer | None = None,
    cache_dir: str | Path = "",
    validation_fraction: float = VALIDATION_FRACTION,
    report: Callable[[str], None] = print,
) -> Dataset:
    """Reads, tokenises (or finds in the cache), splits and packs the text that `data` names.

    Whole documents are held out, those whose hash falls below the fraction: a document stays on its side
    when others are added, and equal documents are on the same side, whatever the tokenizer. Only where few or
    uneven documents would make that less than a quarter or more than four times the tokens wished for, or
    halve the training text (a corpus of one file, say), the last part of every document is held out instead.

    Args:
      data: see `find_corpus`.
      seq_len: tokens per sequence.
      tokenizer: None is the byte tokenizer.
      cache_dir: where token caches are kept; "" is `default_cache_dir()`.
      validation_fraction: share of the text to hold out; 0 for none.
      report: receives a line when a cache is rebuilt or tokenising takes long.

    Raises:
      ValueError: if the data cannot be read or there is less than one sequence to train on.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(f"validation_fraction must be at least 0 and less than 1, got {validation_fraction}")
    corpus = find_corpus(data)
    tokenizer = tokenizer or ByteTokenizer()
    store = open_token_store(
        corpus, tokenizer, cache_dir=Path(cache_dir or default_cache_dir()), report=report
    )
    training, validation = _split(store, validation_fraction)
    dataset = Dataset(
        name=corpus.name,
        tokenizer=tokenizer,
        store=store,
        train=PackedSequences(store, *training, seq_len=seq_len, tail="dropped"),
        validation=PackedSequences(store, *validation, seq_len=seq_len, tail="padded"),
        validation_bytes=_text_bytes(store, *validation),
    )
    if not len(dataset.train):
        raise ValueError(
            f"{corpus.name} has {dataset.train.num_tokens} tokens to train on, too few for one sequence of "
            f"{seq_len} and the token after it; give more text or shorter sequences"
        )
    return dataset


def unigram_entropy(dataset: Dataset) -> float:
    """Returns the mean of -log p over the validation targets, in nats per token.

    p is how often each token occurs in the training split, one occurrence added to each: the loss of a model
    that knows the frequencies of the tokens and nothing of their order. One that learns must get below it.

    Raises:
      ValueError: if there is no validation split.
    """
    if not dataset.validation_targets:
        raise ValueError(
            "the unigram entropy is measured on held-out text, but none is held out; give more text"
        )
    targets = dataset.validation.target_counts()
    # The tail that training drops for want of a whole sequence is counted with it.
    counts = dataset.store.token_counts - dataset.validation.token_counts() + 1.0
    return float(-(targets * np.log(counts / counts.sum())).sum() / targets.sum())


def _split(store: TokenStore, fraction: float) -> tuple[Pieces, Pieces]:
    """Returns the pieces of the training and of the validation split."""
    lengths = store.document_tokens
    starts = np.cumsum(lengths) - lengths
    is_held_out = store.document_hashes < np.uint64(fraction * 2**64)
    wished = fraction * store.num_tokens
    most = min(4 * wished, (wished + store.num_tokens) / 2)
    if wished / 4 <= lengths[is_held_out].sum() <= most:
        return (starts[~is_held_out], lengths[~is_held_out]), (starts[is_held_out], lengths[is_held_out])
    last = (lengths * fraction).astype(np.int64)
    first = lengths - last
    # A piece of one token has no target: left out of the validation split.
    kept = last > 1
    return (starts, first), ((starts + first)[kept], last[kept])


def _text_bytes(store: TokenStore, starts: np.ndarray, lengths: np.ndarray) -> float:
    """Returns the bytes of text in the pieces; part of a document counts for its share of the tokens."""
    begins = np.cumsum(store.document_tokens) - store.document_tokens
    documents = np.searchsorted(begins, starts, side="right") - 1
    return float((store.document_bytes[documents] * (lengths / store.document_tokens[documents])).sum())
