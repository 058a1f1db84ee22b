"""This file is a program that starts JAX, prints its devices, and lets two of them exchange data.

`python -m piperjax.runtime.device_probe` prints a JSON object per line as it gets on, so that whoever runs it knows how
far it came when it hangs or aborts: first the devices, then the exchange.
"""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from piperjax.runtime import backend


def main() -> int:
    """Runs the program; returns the exit code."""
    try:
        # A CPU simulates two devices, so that there is something to exchange.
        backend.prepare(2)
        devices = jax.local_devices()
        _print(describe(devices))
        if len(devices) > 1:
            _print({"exchange_seconds": exchange(devices[:2])})
    except Exception as error:  # Whatever it is, it is what the user wants to know.
        lines = str(error).splitlines()
        _print({"problem": lines[0] if lines else type(error).__name__})
        return 1
    return 0


def describe(devices: list[jax.Device]) -> dict[str, Any]:
    """Returns backend, kinds and memory of the devices of this process."""
    first = devices[0]
    stats = first.memory_stats() if first.platform != "cpu" else None
    name = first.platform
    if name != "cpu":
        name = "rocm" if "rocm" in first.client.platform_version.lower() else "cuda"
    return {
        "backend": name,
        "kinds": [device.device_kind for device in devices],
        "memory_bytes": (stats or {}).get("bytes_limit"),
    }


def exchange(devices: list[jax.Device]) -> float:
    """Runs an all-to-all of 1 MiB per device, twice; returns the seconds of the second.

    Raises:
      ValueError: if what arrives is not what was sent.
    """
    mesh = Mesh(np.asarray(devices), ("expert",))
    num = len(devices)
    sent = np.arange(num * num * 2**18 // num, dtype=np.float32).reshape(
        num, num, -1
    )  # [source, destination, row]
    swap = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.all_to_all(x, "expert", split_axis=1, concat_axis=1, tiled=True),
            mesh=mesh,
            in_specs=P("expert"),
            out_specs=P("expert"),
        )
    )
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        received = jax.block_until_ready(swap(jnp.asarray(sent)))
    seconds = time.perf_counter() - start
    if not np.array_equal(np.asarray(received), sent.swapaxes(0, 1)):
        raise ValueError("an all-to-all between two devices brought other numbers than were sent")
    return seconds


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main())
