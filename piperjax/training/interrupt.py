"""This file is being asked to stop: signals become a flag that the loop reads between steps."""

import os
import signal
import threading
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupt:
    """While entered, remembers the first signal that asks the run to stop; a second one exits at once.

    SIGINT is Ctrl-C, SIGTERM and SIGUSR1 are what SLURM sends before the time limit. A process that stopped
    for signal N exits with 128 + N, as shells report it: 130, 143, 138.

    Attributes:
      signal: the signal that came, None so far.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    @property
    def name(self) -> str:
        """Name of the signal that came, "" so far."""
        return self.signal.name if self.signal else ""

    def __enter__(self) -> "Interrupt":
        # Python delivers signals to the main thread only; elsewhere (a notebook's worker) they stay as they are.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in HANDLED}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            # Not an exception: JAX's and orbax's threads could hold the interpreter for minutes at exit.
            os.write(2, b"\nstopped at once; the last complete checkpoint is kept\n")
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        os.write(2, f"\n{self.name}: saving after this step; once more to stop at once\n".encode())
