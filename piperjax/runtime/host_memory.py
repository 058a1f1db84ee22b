"""This file is how much memory a process may use on this computer."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# Where Linux says how much memory the processes of this container may use, in versions 2 and 1 of control groups.
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory_bytes(limits: Sequence[str] = CONTAINER_LIMITS) -> int | None:
    """Memory that this process may use: the computer's, or the container's if that is less; None if unknown."""
    found = []
    with suppress(AttributeError, OSError, ValueError):  # Not on every operating system.
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in limits:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # Else "max": no limit.
            found.append(int(text))
    return min(found, default=None)
