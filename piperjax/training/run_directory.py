"""This file is the run directory: made, writable, and in the hands of one run at a time."""

import os
import socket
from pathlib import Path
from typing import TextIO

LOCK_FILE = ".lock"


def make_run_directory(path: Path | str) -> None:
    """Makes the directory and its parents.

    Raises:
      ValueError: if it cannot be made or written into.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot make the run directory {path}: {error.strerror}; choose another --out"
        ) from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"cannot write into the run directory {path}; choose another --out")


class RunLock:
    """Held while a run writes into its directory; the system frees it if the process dies.

    Where the system or the file system has no such locks, nothing is held.

    Raises:
      ValueError: if another process trains in the directory.
    """

    def __init__(self, directory: Path | str):
        self._stream: TextIO | None = None
        try:
            import fcntl
        except ImportError:
            return
        stream = (Path(directory) / LOCK_FILE).open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip() or "another process"
            stream.close()
            raise ValueError(
                f"{directory} is in use by {owner}; wait for it, or choose another --out"
            ) from None
        except OSError:
            stream.close()
            return
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        self._stream = stream

    def close(self) -> None:
        """Lets others in."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
