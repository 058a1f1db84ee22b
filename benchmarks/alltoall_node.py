"""One node of a shaped run of `benchmarks.alltoall`: measures cells together with the other nodes, and prints samples.

Started by `benchmarks.shaped_network.run_on_nodes`. Before times are taken, every variant must return what flat does.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from benchmarks.alltoall_cells import CELLS, Cell, Layer, Overlap, Sample
from benchmarks.alltoall_programs import Program, programs_of
from meshes.mesh import build_mesh, simulate_devices
from piperjax.runtime.stopwatch import operand
from piperjax.training.distributed import initialize, process_group

# Sums of experts in another order.
TOLERANCE = 1e-5
# Threads of a process for the work of its devices, by default one for every core. An exchange holds one while it waits,
# and products, cut into parts for all of them, would wait for it.
OVERLAP_THREADS = 8
# After the barrier, for its messages to be acknowledged and its threads to rest: they would be part of what follows.
SETTLE_SECONDS = 0.01


def measure(cells: tuple[Cell, ...], mesh: Mesh) -> None:
    """Prints the samples of this process."""
    barrier = _barrier(mesh)
    for cell in cells:
        programs = {name: _compiled(program) for name, program in programs_of(cell, mesh).items()}
        check(cell, {name: program() for name, program in programs.items()})
        for repeat in range(cell.repeats):
            # To and fro, so that what drifts does so for all variants alike.
            for name in list(programs)[:: -1 if repeat % 2 else 1]:
                barrier()
                time.sleep(SETTLE_SECONDS)
                start = time.perf_counter()
                jax.block_until_ready(programs[name]())
                end = start + (time.perf_counter() - start) / cell.rounds
                print(Sample(cell.label, name, start, end).line(), flush=True)


def _compiled(program: Program) -> Callable[[], jax.Array]:
    jitted = jax.jit(program.function, compiler_options=dict(program.options))
    compiled = jitted.lower(*program.arguments).compile()
    return lambda: compiled(*program.arguments)


def _barrier(mesh: Mesh) -> Callable[[], None]:
    axes = mesh.axis_names
    total = jax.shard_map(lambda x: lax.psum(x, axes), mesh=mesh, in_specs=jax.P(*axes), out_specs=jax.P())
    program = _compiled(Program(total, (operand(mesh, (1,)),)))
    return lambda: jax.block_until_ready(program())


def check(cell: Cell, results: dict) -> None:
    """Exits if variants that should do the same do not: to the bit, or where experts are added up to rounding."""
    names = cell.lossless if isinstance(cell, Layer) else cell.variants
    names = [name for name in names if name not in ("wire", "products")]
    exact = not isinstance(cell, Layer | Overlap)
    expected = jax.tree.leaves(results[names[0]])
    for name in names:
        for found, first in zip(jax.tree.leaves(results[name]), expected, strict=True):
            for one, other in zip(found.addressable_shards, first.addressable_shards, strict=True):
                a, b = np.asarray(one.data), np.asarray(other.data)
                if not np.abs(a - b).max() <= (0.0 if exact else TOLERANCE * np.abs(b).max()):
                    sys.exit(f"{cell.label}: {name} does not return what {names[0]} does")


def main() -> int:
    """Joins the other nodes and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--process-id", type=int, required=True)
    parser.add_argument("--local", type=int, required=True, help="devices of each node")
    parser.add_argument("--part", choices=CELLS, required=True, help="what to measure")
    args = parser.parse_args()
    if args.part == "overlap":
        os.environ.setdefault("NPROC", str(OVERLAP_THREADS))  # Read by XLA when its devices start.
    elif version("jaxlib").startswith("0.10."):
        # A sixth of the minutes of a sweep; later releases know no such flag.
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
    simulate_devices(args.local)
    initialize(process_group(args.coordinator, args.processes, args.process_id))
    measure(CELLS[args.part], build_mesh(pipe=1, data=1, expert_factors=(1, args.processes, args.local)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
