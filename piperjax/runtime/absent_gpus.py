"""GPUs that are not here, for which XLA compiles all the same: JAX's plugin and a description of the device are enough.

    pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin nvidia-cuda-nvcc-cu12     # of the version of jax
    pip install --no-deps jax-rocm7-pjrt jax-rocm7-plugin                             # and the libraries of ROCm

Nothing runs, so times are not known; what a compiled program does, in which order, and in how much memory, is. Products
are not tuned, as that would run them. Descriptions (`GpuTargetConfig` of XLA) are in `meshes/gpus/`; the file of a
platform names one (`device.gpu`).
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import meshes
from piperjax.runtime.xla_flags import FLAGS, PLUGINS, Backend

DIRECTORY = Path(meshes.__file__).parent / "gpus"
# What it takes, of a version of jax; `--no-deps`, as the libraries of NVIDIA are large and not needed.
PIP: dict[Backend, str] = {
    "cuda": "jax-cuda12-pjrt=={0} jax-cuda12-plugin=={0} nvidia-cuda-nvcc-cu12",
    "rocm": "jax-rocm7-pjrt=={0} jax-rocm7-plugin=={0}",
}
# Autotuning would run products.
OPTIONS = {"xla_gpu_autotune_level": 0}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of GPU.

    Attributes:
      name: of its file.
      backend: "cuda" or "rocm".
      description: what XLA is told.
    """

    name: str
    backend: Backend
    description: str


def names() -> tuple[str, ...]:
    """Kinds of GPUs that are described."""
    return tuple(sorted(path.stem for path in DIRECTORY.glob("*.txtpb")))


def target(name: str) -> Target:
    """Reads a description.

    Raises:
      ValueError: if there is none of that name.
    """
    if name not in names():
        raise ValueError(f"GPUs that can be compiled for are {', '.join(names())}, got {name!r}")
    text = (DIRECTORY / f"{name}.txtpb").read_text(encoding="utf-8")
    backend = re.search(r'^platform_name: "(\w+)"', text, re.MULTILINE)[1].lower()
    return Target(name=name, backend=backend, description=text)


def reason_to_skip(backend: Backend) -> str | None:
    """Why nothing can be compiled for such GPUs here; None if it can."""
    if any(importlib.util.find_spec(name.replace("-", "_")) for name in PLUGINS[backend]):
        return None
    return (
        f"to compile for GPUs that are not here takes JAX's plugin for {backend.upper()}, which is not installed: "
        f"pip install --no-deps {PIP[backend].format('.'.join(jax.__version__.split('.')[:3]))}"
    )


def devices(kind: Target, num_devices: int, per_node: int) -> Sequence[jax.Device]:
    """That many of them, on nodes of `per_node`.

    Raises:
      ValueError: if the plugin is not installed, or XLA cannot load it.
    """
    from jax.experimental import topologies

    if reason := reason_to_skip(kind.backend):
        raise ValueError(reason)
    nodes, rest = divmod(num_devices, per_node)
    shape = (nodes, per_node) if nodes and not rest else (1, num_devices)
    # Read when JAX looks for plugins.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        with _gpus_taken_for_granted():
            topology = topologies.get_topology_desc(
                topology_name=kind.name,
                platform=kind.backend,
                topology=f"1x{shape[0]}x{shape[1]}",
                target_config=kind.description,
            )
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"JAX did not load its {kind.backend.upper()} plugin, so nothing can be compiled for {kind.name}: "
            f"install the plugin of this version of jax, and the libraries that it links to ({said})"
        ) from None
    return list(topology.devices)


def compiler_options(backend: Backend) -> dict[str, Any]:
    """Options to compile with: the flags of a run, as far as a program can be compiled with them, without tuning."""
    return {flag.name: option(flag.value) for flag in FLAGS[backend] if flag.value} | OPTIONS


def option(value: str) -> bool | int | str:
    """The value of a flag as an option, which has a type."""
    return {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)


@contextmanager
def _gpus_taken_for_granted():
    """JAX's ROCm plugin registers itself only where it counts GPUs, which has no setting."""
    from jax._src import hardware_utils

    counted = getattr(hardware_utils, "num_available_amd_gpus", None)
    if counted is None:
        yield
        return
    hardware_utils.num_available_amd_gpus = lambda **_: 1
    try:
        yield
    finally:
        hardware_utils.num_available_amd_gpus = counted
