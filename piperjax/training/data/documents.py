"""This file is the readers: one file of any accepted kind and compression to its documents."""

import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
ACCEPTED = (
    ".txt, .md, .rst, .py, .jsonl and .parquet files, compressed (.gz, .bz2, .xz, .zst) or not, "
    "directories of them, and globs"
)
_PARQUET_ROWS = 1024


def is_readable(path: Path) -> bool:
    """Says whether the name is of a kind that `read_documents` takes."""
    return _kind(path)[0] in (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def read_documents(path: Path) -> Iterator[str]:
    """Yields the documents of a file: the whole of a text, a line of .jsonl, a row of .parquet.

    Empty documents are passed over. Lines and rows are streamed.

    Raises:
      ValueError: naming file and line, if the file cannot be read, is binary, or a record has no text.
    """
    kind, compression = _kind(path)
    read = {".jsonl": _lines, ".parquet": _rows}.get(kind, _text)
    try:
        with closing(_open(path, compression)) as stream:
            yield from (text for text in read(path, stream) if text)
    except OSError as error:
        # Errors of the operating system carry a number; those of the decompressors do not.
        if error.errno is not None:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        raise _broken(path, compression, error) from error
    except (EOFError, zlib.error, *_decompressor_errors()) as error:
        raise _broken(path, compression, error) from error


def _kind(path: Path) -> tuple[str, str]:
    """Returns the suffix that says what the file holds, and its compression ("" for none), in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def _text(path: Path, stream: BinaryIO) -> Iterator[str]:
    content = stream.read()
    if b"\0" in content:
        raise _binary(path, content[: content.index(b"\0")].count(b"\n") + 1)
    try:
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _undecodable(path, content[: error.start].count(b"\n") + 1, error) from error


def _lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if b"\0" in line:
            raise _binary(path, number)
        try:
            source = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _undecodable(path, number, error) from error
        if source.strip():
            yield _record_text(f"{path} line {number}", source)


def _record_text(place: str, source: str) -> str:
    try:
        record = json.loads(source)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))
        raise ValueError(
            f"{place} is not valid JSON ({reason}); each line must be one object with a field 'text'"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{place} must be a JSON object with a field 'text', but is {_json_type(record)}")
    if "text" not in record:
        fields = ", ".join(list(record)[:8]) or "none"
        raise ValueError(
            f"{place} has no field 'text' (its fields: {fields}); rename the field that holds the text"
        )
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(f"{place}: field 'text' must be a string, but is {_json_type(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: field 'text' holds half a surrogate pair, which is no text; repair the escape"
        ) from error
    return text


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _rows(path: Path, stream: BinaryIO) -> Iterator[str]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing_package(path, "pyarrow") from error
    # Parquet is read from its end; seeking in a compressed stream would decompress it again and again.
    source = stream if _kind(path)[1] == "" else io.BytesIO(stream.read())
    row = 0
    try:
        file = parquet.ParquetFile(source)
        _check_column(path, file.schema_arrow)
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=["text"]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is None:
                    raise ValueError(f"{path} row {row}: column 'text' is null; drop such rows")
                yield text
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is not a whole parquet file, reading stopped after {row} rows ({reason})"
        ) from error


def _check_column(path: Path, schema: Any) -> None:
    if "text" not in schema.names:
        names = ", ".join(schema.names[:8]) or "none"
        raise ValueError(
            f"{path} has no column 'text' (its columns: {names}); rename the column that holds the text"
        )
    kind = schema.field("text").type
    if str(kind).startswith("dictionary"):
        kind = kind.value_type
    if str(kind) not in ("string", "large_string", "string_view"):
        raise ValueError(f"{path}: column 'text' must hold strings, but holds {kind}")


def _open(path: Path, compression: str) -> BinaryIO:
    """Opens the decompressed content; the standard library may have been built without some of these."""
    openers: dict[str, Callable[[Path], Any]] = {
        "": lambda file: file.open("rb"),
        ".gz": _gzip,
        ".bz2": _bzip2,
        ".xz": _xz,
        ".zst": lambda file: io.BufferedReader(_ZstdReader(file), 1 << 20),
    }
    return openers[compression](path)


def _gzip(path: Path) -> Any:
    import gzip

    return gzip.open(path, "rb")


def _bzip2(path: Path) -> Any:
    try:
        import bz2
    except ImportError as error:
        raise _missing_package(path, "bz2 (part of Python)") from error
    return bz2.open(path, "rb")


def _xz(path: Path) -> Any:
    try:
        import lzma
    except ImportError as error:
        raise _missing_package(path, "lzma (part of Python)") from error
    return lzma.open(path, "rb")


class _ZstdReader(io.RawIOBase):
    """Zstandard frames as a stream that, unlike the library's own, notices a file that was cut short."""

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise _missing_package(path, "zstandard") from error
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = None
        self._file = path.open("rb")
        self._pending = b""
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            chunk = self._input or self._file.read(1 << 18)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._pending = self._frame.decompress(chunk)
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _decompressor_errors() -> tuple[type[Exception], ...]:
    """Returns the errors of those decompressors that are in use; importing one here could fail again."""
    lzma, zstandard = sys.modules.get("lzma"), sys.modules.get("zstandard")
    return (*((lzma.LZMAError,) if lzma else ()), *((zstandard.ZstdError,) if zstandard else ()))


def _broken(path: Path, compression: str, error: Exception) -> ValueError:
    kind = {
        "": "readable",
        ".gz": "whole gzip",
        ".bz2": "whole bzip2",
        ".xz": "whole xz",
        ".zst": "whole zstd",
    }
    return ValueError(f"{path} is not a {kind[compression]} file ({error}); fetch or compress it again")


def _binary(path: Path, line: int) -> ValueError:
    return ValueError(
        f"{path} line {line} holds a NUL byte, so it is binary or not UTF-8; give text in UTF-8"
    )


def _undecodable(path: Path, line: int, error: UnicodeDecodeError) -> ValueError:
    byte = error.object[error.start]
    return ValueError(
        f"{path} line {line} is not UTF-8 (byte 0x{byte:02x}); convert the file or leave it out"
    )


def _missing_package(path: Path, package: str) -> ValueError:
    return ValueError(f"reading {path} needs the package {package}, which is not installed; install it")
