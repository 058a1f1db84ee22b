"""This file is the machine that a run finds itself on: which platform it is, and how much memory a device has."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax

from meshes.platform import Platform, detect_platform, load_platform

# Where Linux says how much memory the processes of this container may use, in versions 2 and 1 of control groups.
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def find_platform(name: str, devices: Sequence[jax.Device]) -> Platform:
    """Returns the named machine description, or for "auto" the one that the devices are recognised by.

    Where it does not say how much memory a device has, that is asked of the device. Simulated devices share the memory
    of their host, each with an equal part.
    """
    first = devices[0]
    here = sum(device.process_index == first.process_index for device in devices)
    if name != "auto":
        platform = load_platform(name)
    else:
        platform = detect_platform(
            first.platform, first.device_kind, num_devices=len(devices), devices_per_process=here
        )
    if platform.device.memory_bytes is not None:
        return platform
    return replace(platform, device=replace(platform.device, memory_bytes=_memory_bytes(first, here)))


def _memory_bytes(device: jax.Device, sharing: int) -> int | None:
    """Memory of a device, of which `sharing` share the host's if it has none of its own; None if nobody tells."""
    if device.platform == "cpu":
        host = host_memory_bytes()
        return None if host is None else host // sharing
    if device.process_index != jax.process_index():
        return None
    return (device.memory_stats() or {}).get("bytes_limit")


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
