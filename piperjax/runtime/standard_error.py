"""This file keeps lines that nobody needs from standard error, also those that compiled code writes there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PASS_ON = """
import sys
marker = sys.argv[1].encode()
for line in sys.stdin.buffer:
    if marker not in line:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


@contextmanager
def without_lines(marker: str) -> Iterator[None]:
    """Passes on what this process writes to standard error meanwhile, but for lines that hold `marker`.

    Another process does it, so that the last words of one that XLA ends arrive, too. An empty marker changes nothing.
    """
    if not marker:
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    # In a session of its own it outlives Ctrl-C.
    reader = subprocess.Popen(
        [sys.executable, "-c", _PASS_ON, marker],
        stdin=subprocess.PIPE,
        stderr=terminal,
        start_new_session=True,
    )
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
        reader.wait()
