"""This file is the tokenizers, bytes or any tokenizer.json: text to token ids and back."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# Names that published tokenizers give their end-of-document token, tried in this order.
END_OF_DOCUMENT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_document|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<EOS>",
    "<|im_end|>",
)


class Tokenizer(Protocol):
    """What the data pipeline asks of a tokenizer.

    Attributes:
      vocab_size: ids are 0 .. vocab_size - 1, the end-of-document id included.
      end_of_document: id put after every document; no text encodes to it.
      fingerprint: names what `encode` computes; equal fingerprints may share a token cache.
    """

    vocab_size: int
    end_of_document: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids [T] of `text`, without an end-of-document token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of every text."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids` [T]; special tokens such as end-of-document become nothing."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 for the end of a document."""

    vocab_size = 257
    end_of_document = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        """Returns the bytes of `text`, uint16 [T]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids` [T]; bytes that are not UTF-8 become the replacement character."""
        array = _checked_ids(ids, self.vocab_size)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """Any `tokenizer.json`, read by the `tokenizers` library.

    The file's own truncation, padding and automatic special tokens are turned off, and special tokens
    written out in a text are encoded as ordinary text, so a document cannot forge its own end.

    The end-of-document token is, in this order: the argument; `eos_token` of a `tokenizer_config.json`
    beside the file; the first of `END_OF_DOCUMENT_NAMES` that the vocabulary holds.

    Raises:
      ValueError: if the file is missing or no tokenizer, or has no end-of-document token.
    """

    def __init__(self, path: str | Path, end_of_document: str | None = None):
        self.path = _tokenizer_file(Path(path).expanduser())
        content = _read(self.path)
        self._tokenizer = _parse(self.path, content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"tokenizer {self.path} has an empty vocabulary; give a trained tokenizer.json")
        name = _end_of_document_name(self.path, vocabulary, end_of_document)
        # Ids may have holes, so the number of entries is not the size of the embedding that is needed.
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.end_of_document: int = vocabulary[name]
        digest = hashlib.sha256(content)
        digest.update(name.encode("utf-8"))
        self.fingerprint = f"huggingface-{digest.hexdigest()[:16]}"

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of `text`, int64 [T]."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of every text, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids` [T]; special tokens become nothing."""
        return self._tokenizer.decode(_checked_ids(ids, self.vocab_size).tolist(), skip_special_tokens=True)


def open_tokenizer(name: str = "bytes") -> Tokenizer:
    """Returns the byte tokenizer for `"bytes"`, otherwise that of the tokenizer.json (or directory) named."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)


def _checked_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    array = np.asarray(ids, np.int64).reshape(-1)
    if array.size and not 0 <= array.min() <= array.max() < vocab_size:
        raise ValueError(
            f"token ids must lie in 0..{vocab_size - 1}, got {array.min()}..{array.max()}; "
            "decode with the tokenizer that encoded"
        )
    return array


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise ValueError(f"directory {path} holds no tokenizer.json; give the path of the file itself")
        return path / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"no tokenizer at {path}; give the path of a tokenizer.json, or 'bytes' for the built-in one"
        )
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read tokenizer {path}: {error.strerror}") from error


def _parse(path: Path, content: bytes) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs the package 'tokenizers', which is not installed; "
            "install it or use the built-in tokenizer 'bytes'"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    # The library raises plain Exception for anything that it cannot parse.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a tokenizer.json of the Hugging Face tokenizers library ({reason}); "
            "convert the tokenizer with tokenizer.save_pretrained() and give the tokenizer.json it writes"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _end_of_document_name(path: Path, vocabulary: dict[str, int], wished: str | None) -> str:
    if wished is not None:
        if wished not in vocabulary:
            raise ValueError(
                f"tokenizer {path} has no token '{wished}' to end documents with; name one of its own"
            )
        return wished
    names = (*_configured_name(path.with_name("tokenizer_config.json")), *END_OF_DOCUMENT_NAMES)
    for name in names:
        if name in vocabulary:
            return name
    raise ValueError(
        f"tokenizer {path} has no end-of-document token: none of {', '.join(names)} is in its vocabulary; "
        "add one to the tokenizer, or name it as eos_token in a tokenizer_config.json beside the file"
    )


def _configured_name(path: Path) -> tuple[str, ...]:
    """Returns `eos_token` of a tokenizer_config.json: a string there, or {"content": string}."""
    if not path.is_file():
        return ()
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); mend it, or remove it to use the default rule"
        ) from error
    token = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return (token,) if isinstance(token, str) else ()
