"""This file is the machine that a run finds itself on: which platform it is, and how much memory a device has."""

from collections.abc import Sequence
from dataclasses import replace

import jax

from meshes.platform import Platform, detect_platform, load_platform
from piperjax.runtime.host_memory import host_memory_bytes


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
