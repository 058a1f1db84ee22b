"""This file is a process that ends in time, whatever it does: for what may abort or hang."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that is over.

    Attributes:
      returncode: minus the signal's number if a signal ended it; None if it had to be stopped, or never began.
      stdout: what it printed, also if it was stopped.
      stderr: likewise; why it never began if it did not.
    """

    returncode: int | None
    stdout: str = ""
    stderr: str = ""


def run_bounded(
    command: Sequence[str], *, limit_seconds: float, environ: Mapping[str, str] | None = None
) -> Ended:
    """Runs a command without input; kills it and its children when the time is over.

    Args:
      command: program and arguments.
      limit_seconds: how long it may take.
      environ: all of its environment variables; this process's by default.
    """
    try:
        process = subprocess.Popen(
            command,
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return Ended(returncode=None, stderr=f"{command[0]}: {error.strerror}")
    returncode: int | None = None
    try:
        out, err = process.communicate(timeout=limit_seconds)
        returncode = process.returncode
    except subprocess.TimeoutExpired as expired:
        out, err = expired.stdout or b"", expired.stderr or b""
    finally:
        # Children may outlive it and hold its pipes; also when we are interrupted ourselves.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    if returncode is None:
        # A process that waits for a device in the kernel cannot be killed; it is left behind.
        with suppress(subprocess.TimeoutExpired):
            out, err = process.communicate(timeout=2)
    return Ended(
        returncode=returncode, stdout=out.decode(errors="replace"), stderr=err.decode(errors="replace")
    )
