"""This file is the device mesh: JAX devices arranged over the axes so that experts stay close together."""

from collections.abc import Sequence
from math import prod

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from meshes.axes import AXES


def build_mesh(
    *, pipe: int, data: int, expert_factors: tuple[int, int, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arranges devices over `AXES`, consecutive devices innermost.

    Devices are taken in order of process and then of number, so that the innermost expert axis joins devices of one
    process, and the next axes join neighbouring processes. All axes are of type Auto.

    Args:
      expert_factors: sizes of the expert axes (group, node, local), as `Platform.expert_factors` gives them.
      devices: what to use, by default every device of every process.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (pipe, data, *expert_factors)
    if len(expert_factors) != 3 or min(shape) < 1:
        raise ValueError(f"a mesh needs positive sizes pipe, data and three expert factors, got {shape}")
    if prod(shape) != len(devices):
        raise ValueError(
            f"pipe {pipe} x data {data} x expert {prod(expert_factors)} = {prod(shape)} must equal the "
            f"{len(devices)} devices; change one of the sizes, or give -1 to let it take the devices left over"
        )
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def simulate_devices(num_devices: int) -> None:
    """Lets the CPU appear as `num_devices` devices, without touching the environment or other backends.

    Must run before JAX first looks for devices; afterwards it is an error unless there are enough already.

    Raises:
      ValueError: if JAX has already started with fewer CPU devices.
    """
    if num_devices < 1:
        raise ValueError(f"the number of simulated devices must be at least 1, got {num_devices}")
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError:  # JAX has started
        found = len(jax.local_devices(backend="cpu"))
        if found < num_devices:
            raise ValueError(
                f"{num_devices} CPU devices must be asked for before JAX starts, but it already runs with {found}; "
                "call simulate_devices before any other use of JAX, or restart Python (in a notebook: the kernel)"
            ) from None
