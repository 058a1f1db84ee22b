"""This file writes what a command was asked to write, or says in a sentence why it cannot."""

from pathlib import Path


def write_text(path: str, text: str) -> None:
    """Writes a file.

    Raises:
      ValueError: if it cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror}; give a file in an existing folder"
        ) from None
