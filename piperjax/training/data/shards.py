"""This file is the token cache: a corpus tokenised once, kept as memory-mapped shards."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from piperjax.training.data.corpus import Corpus
from piperjax.training.data.documents import read_documents
from piperjax.training.data.tokenizer import Tokenizer

# Raise this when documents, tokens or files of the cache change their meaning.
FORMAT = 1
SHARD_TOKENS = 1 << 27
# What reading files of unknown content as an index and numpy arrays can raise.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError)
_BATCH_CHARACTERS = 1 << 22
_REPORT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """All tokens of a corpus, document after document, each ending in the end-of-document token.

    Attributes:
      path: directory of the cache.
      content: hash of all texts and of the tokenizer, wherever the files lie; equal content is equal tokens.
      shards: memory-mapped token arrays; laid end to end they are the tokens at offsets 0 .. num_tokens - 1.
      document_tokens: [N] int64, tokens of each document, its end-of-document token included.
      document_bytes: [N] int64, UTF-8 bytes of each document's text.
      document_hashes: [N] uint64, hash of each document's text, the same for every tokenizer.
      token_counts: [V] int64, how often each token occurs.
      end_of_document: the token that ends every document.
    """

    path: Path
    content: str
    shards: tuple[np.ndarray, ...]
    document_tokens: np.ndarray
    document_bytes: np.ndarray
    document_hashes: np.ndarray
    token_counts: np.ndarray
    end_of_document: int

    @property
    def num_documents(self) -> int:
        """N, documents in the corpus."""
        return len(self.document_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens in the corpus, one end-of-document token for each document included."""
        return sum(len(shard) for shard in self.shards)

    def tokens(self, offsets: np.ndarray) -> np.ndarray:
        """Returns the tokens [T] at the given offsets [T], int32."""
        if len(self.shards) == 1:
            return self.shards[0][offsets].astype(np.int32)
        ends = np.cumsum([len(shard) for shard in self.shards])
        homes = np.searchsorted(ends, offsets, side="right")
        found = np.empty(len(offsets), np.int32)
        for home in np.unique(homes):
            here = homes == home
            found[here] = self.shards[home][offsets[here] - (ends[home] - len(self.shards[home]))]
        return found


def default_cache_dir() -> Path:
    """Returns the directory where caches go when none is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "piperjax"


def open_token_store(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    cache_dir: Path,
    report: Callable[[str], None] = print,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenStore:
    """Returns the corpus as tokens, from the cache if its files, sizes and times are unchanged.

    A cache appears under its final name only when it is whole, so a killed process leaves nothing that could
    be mistaken for one, and of several processes that want the same cache one builds it. A cache that is
    damaged or of another format is built again, and `report` says so.

    Raises:
      ValueError: if a file cannot be read, the corpus holds no text, or the cache cannot be written.
    """
    key = _key(corpus, tokenizer)
    path = Path(cache_dir).expanduser().absolute() / key[:20]
    try:
        if (store := _open_valid(path, key, report=lambda _: None)) is not None:
            return store
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock"), report) as is_exclusive:
            # While this process waited for the lock, another may have built the cache.
            if (store := _open_valid(path, key, report)) is not None:
                return store
            if is_exclusive:
                _remove_leftovers(path)
            temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
            try:
                with _Writer(temporary, tokenizer, shard_tokens) as writer:
                    for texts in _batches(corpus, report):
                        writer.add(texts)
                    writer.finish(key)
                _publish(temporary, path, key)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        store = _open_valid(path, key, report)
    except OSError as error:
        raise ValueError(
            f"cannot write the token cache {path}: {error.strerror or error}; "
            "name another cache directory or free some space"
        ) from error
    assert store is not None
    return store


def _key(corpus: Corpus, tokenizer: Tokenizer) -> str:
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in corpus.files]
    settings = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "files": files}
    return hashlib.sha256(json.dumps(settings).encode("utf-8")).hexdigest()


def _open_valid(path: Path, key: str, report: Callable[[str], None]) -> TokenStore | None:
    """Opens the cache; a damaged one is reported and None is returned, as for one that does not exist."""
    if not path.exists():
        return None
    try:
        return _open(path, key)
    except _DAMAGE as error:
        report(f"token cache {path} is damaged or of another kind ({error}); building it again")
        return None


def _open(path: Path, key: str) -> TokenStore:
    index = json.loads((path / "index.json").read_text())
    if index.get("key") != key:
        raise ValueError("index.json belongs to other data")
    shards = []
    for number, num_tokens in enumerate(index["shard_tokens"]):
        file = path / _shard_name(number)
        wished = num_tokens * np.dtype(index["dtype"]).itemsize
        if file.stat().st_size != wished:
            raise ValueError(f"{file.name} holds {file.stat().st_size} bytes instead of {wished}")
        # A plain array on the same pages: indexing a memmap object costs several times more.
        shards.append(np.asarray(np.memmap(file, index["dtype"], mode="r")))
    table = np.load(path / "documents.npy", mmap_mode="r")
    counts = np.load(path / "counts.npy")
    total = sum(index["shard_tokens"])
    if table.shape != (3, index["num_documents"]) or table[0].sum() != total or counts.sum() != total:
        raise ValueError("documents.npy or counts.npy does not match index.json")
    return TokenStore(
        path=path,
        content=index["content"],
        shards=tuple(shards),
        document_tokens=table[0].astype(np.int64),
        document_bytes=table[1].astype(np.int64),
        document_hashes=table[2],
        token_counts=counts,
        end_of_document=index["end_of_document"],
    )


def _publish(temporary: Path, path: Path, key: str) -> None:
    """Renames a whole cache into place, and a damaged one out of the way."""
    while True:
        try:
            os.rename(temporary, path)
            return
        except OSError:
            if not path.exists():
                raise
        # On a file system without locks another process may have been faster: its files are as good.
        if _open_valid(path, key, report=lambda _: None) is not None:
            return
        # Processes that still have the old files mapped keep them.
        discarded = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
        os.rename(path, discarded)
        shutil.rmtree(discarded) if discarded.is_dir() else discarded.unlink()


class _Writer:
    """Appends documents to shards. A document never straddles two shards."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, shard_tokens: int):
        directory.mkdir()
        self._directory = directory
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self._shard_lengths: list[int] = []
        self._file: Any = None
        self._counts = np.zeros(tokenizer.vocab_size, np.int64)
        self._document_tokens: list[int] = []
        self._document_bytes: list[int] = []
        self._document_hashes: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_shard()

    def add(self, texts: list[str]) -> None:
        documents = []
        for text, ids in zip(texts, self._tokenizer.encode_batch(texts), strict=True):
            content = text.encode("utf-8")
            digest = hashlib.blake2b(content, digest_size=8).digest()
            tokens = np.empty(len(ids) + 1, self._dtype)
            tokens[:-1] = ids
            tokens[-1] = self._tokenizer.end_of_document
            documents.append(tokens)
            self._append(tokens)
            self._document_tokens.append(len(tokens))
            self._document_bytes.append(len(content))
            self._document_hashes.append(int.from_bytes(digest, "little"))
        self._counts += np.bincount(np.concatenate(documents), minlength=len(self._counts))

    def _append(self, tokens: np.ndarray) -> None:
        if self._file is None or self._shard_lengths[-1] + len(tokens) > self._shard_tokens:
            self._close_shard()
            self._file = (self._directory / _shard_name(len(self._shard_lengths))).open("wb")
            self._shard_lengths.append(0)
        self._file.write(tokens.data)
        self._shard_lengths[-1] += len(tokens)

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(self, key: str) -> None:
        self._close_shard()
        columns = [self._document_tokens, self._document_bytes, self._document_hashes]
        table = np.array(columns, np.uint64)
        content = hashlib.blake2b(table.tobytes(), digest_size=10)
        content.update(self._tokenizer.fingerprint.encode("utf-8"))
        np.save(self._directory / "documents.npy", table)
        np.save(self._directory / "counts.npy", self._counts)
        index = {
            "key": key,
            "content": content.hexdigest(),
            "dtype": np.dtype(self._dtype).name,
            "shard_tokens": self._shard_lengths,
            "num_documents": len(self._document_tokens),
            "end_of_document": self._tokenizer.end_of_document,
        }
        (self._directory / "index.json").write_text(json.dumps(index))


def _shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


def _batches(corpus: Corpus, report: Callable[[str], None]) -> Iterator[list[str]]:
    """Yields the documents in lists of a few million characters, and reports progress every few seconds."""
    texts: list[str] = []
    characters = documents = 0
    reported = time.monotonic()
    for number, path in enumerate(corpus.files, start=1):
        for text in read_documents(path):
            texts.append(text)
            characters += len(text)
            documents += 1
            if characters >= _BATCH_CHARACTERS:
                yield texts
                texts, characters = [], 0
            if time.monotonic() - reported > _REPORT_SECONDS:
                report(f"tokenising: {documents} documents, file {number} of {len(corpus.files)}")
                reported = time.monotonic()
    if not documents:
        raise ValueError(f"{corpus.name} holds no documents, only empty ones; give data with text in it")
    if texts:
        yield texts


@contextmanager
def _lock(path: Path, report: Callable[[str], None]) -> Iterator[bool]:
    """Holds an exclusive lock while other processes wait; yields False where the file system has no locks."""
    with path.open("a") as file:
        yield _locked(file, report)


def _locked(file: IO[str], report: Callable[[str], None]) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report("waiting for another process that is tokenising the same data")
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes left behind; only the holder of the lock may."""
    for leftover in path.parent.glob(f"{path.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
