"""This file is the corpus: which files `--data` names, in an order that is the same on every machine."""

import glob
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from piperjax.training.data.documents import ACCEPTED, TEXT_SUFFIXES, is_readable

STANDARD_LIBRARY = "stdlib"
# Directories of the standard library that hold installed packages, byte code or tests instead of the library.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files to train on.

    Attributes:
      name: what the user asked for, for printing.
      files: in reading order.
    """

    name: str
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the files as stored, in bytes."""
        return sum(path.stat().st_size for path in self.files)


def find_corpus(data: str = STANDARD_LIBRARY) -> Corpus:
    """Returns the corpus that `data` names: files, directories or globs, separated by commas.

    Directories are searched recursively, without hidden entries; in directories and globs, files of other
    kinds and empty ones are passed over. Files keep the order of the arguments and are sorted by their path
    inside each, so the order does not depend on where the data lie. "stdlib" is the source text of the
    running Python's standard library.

    Raises:
      ValueError: if a path is missing, of an unknown kind, empty, or holds no file that can be read.
    """
    if data == STANDARD_LIBRARY:
        return standard_library()
    # A path that exists is taken as it stands, commas, brackets and all.
    parts = [data] if os.path.exists(os.path.expanduser(data)) else [part.strip() for part in data.split(",")]
    if not all(parts):
        raise ValueError(
            f"--data '{data}' has an empty path between its commas; remove the stray comma or space"
        )
    files: dict[Path, None] = {}
    for part in parts:
        try:
            files.update(dict.fromkeys(_find(part)))
        except OSError as error:
            raise ValueError(f"cannot read {error.filename or part}: {error.strerror}") from error
    return Corpus(name=data, files=tuple(files))


def standard_library() -> Corpus:
    """Returns the standard library of the running Python as a corpus: real text that every machine has.

    Source and text files, about 12 MB; its tests and installed packages are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in _walk(root, _NOT_LIBRARY) if path.is_file()]
    files = [path for path in found if path.suffix in TEXT_SUFFIXES and os.path.getsize(path)]
    if not files:
        raise ValueError(
            f"this Python keeps no source text in {root} to train on; give --data PATH, {ACCEPTED}"
        )
    return Corpus(name=f"standard library of Python {platform.python_version()}", files=tuple(files))


def _find(part: str) -> list[Path]:
    path = Path(os.path.expanduser(part)).absolute()
    if os.path.isdir(path):
        return _with_content(_walk(path)) or _refuse(f"directory {path} holds none")
    if os.path.exists(path):
        if not is_readable(path):
            raise ValueError(f"cannot tell what {path} holds from its name; --data takes {ACCEPTED}")
        return _with_content([path]) or _refuse(f"{path} is empty")
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        what = "nothing matches" if glob.has_magic(part) else "there is no file or directory"
        raise ValueError(f"{what} {path}; --data takes {ACCEPTED}")
    found = [file for match in matches for file in (_walk(match) if match.is_dir() else [match])]
    return _with_content(found) or _refuse(f"none of the matches of {path} is one")


def _with_content(files: list[Path]) -> list[Path]:
    readable = [path for path in files if is_readable(path)]
    for path in readable:
        # Passing over it would train on other text than was meant.
        if not path.is_file():
            raise ValueError(f"{path} is a broken link or no regular file; mend or remove it")
    return [path for path in readable if path.stat().st_size]


def _refuse(finding: str) -> NoReturn:
    raise ValueError(f"--data needs files with text in them, but {finding}; it takes {ACCEPTED}")


def _walk(root: Path, left_out: frozenset[str] = frozenset({"__pycache__"})) -> list[Path]:
    """Returns the files below `root`, sorted by their path inside it."""
    files = []
    for directory, names, leaves in os.walk(root, onerror=_raise):
        names[:] = [name for name in names if name not in left_out and not name.startswith(".")]
        files += [Path(directory, leaf) for leaf in leaves if not leaf.startswith(".")]
    return sorted(files, key=lambda path: path.relative_to(root).parts)


def _raise(error: OSError) -> None:
    raise error
