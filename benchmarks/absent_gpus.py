"""GPUs that are not there, for which XLA compiles all the same: its plugin and a description of the device are enough.

    pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin nvidia-cuda-nvcc-cu12     # of the version of jax

Nothing runs, so times are not known; what a compiled program does, and in which order, is.
"""

import importlib.util
import os
from pathlib import Path

# Read when JAX looks for plugins, which may be long before anything is compiled for them.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
TARGET = Path(__file__).parent / "h100.txtpb"
# Autotuning would run products.
OPTIONS = {"xla_gpu_autotune_level": 0}


def reason_to_skip() -> str | None:
    """Why nothing can be compiled for GPUs here; None if it can."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        return "needs the CUDA plugin of this jax, though no GPU: see benchmarks/absent_gpus.py"
    return None


def h100(num_nodes: int, per_node: int) -> list:
    """H100s of several nodes."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        topology_name="h100",
        platform="cuda",
        topology=f"1x{num_nodes}x{per_node}",
        target_config=TARGET.read_text(encoding="utf-8"),
    )
    return list(topology.devices)
