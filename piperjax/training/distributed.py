"""This file is several processes: starting them, the rows each one reads, and agreeing to stop."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

CONNECT_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """Where the processes of a run meet.

    Attributes:
      coordinator: HOST:PORT on which process 0 listens.
      num_processes: processes of the run.
      process_id: number of this one.
    """

    coordinator: str
    num_processes: int
    process_id: int

    def __post_init__(self) -> None:
        port = self.coordinator.rpartition(":")[2]
        if not re.fullmatch(r".+:\d+", self.coordinator) or not 0 < int(port) < 65536:
            raise ValueError(f"--coordinator must be HOST:PORT such as node1:12345, got '{self.coordinator}'")
        if self.num_processes < 1:
            raise ValueError(f"--processes must be at least 1, got {self.num_processes}")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"--process-id must lie in 0..{self.num_processes - 1} for {self.num_processes} processes, "
                f"got {self.process_id}"
            )


def process_group(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> ProcessGroup | None:
    """Returns the group that the three flags describe, None if none is given.

    Raises:
      ValueError: if only some of them are given.
    """
    flags = {"--coordinator": coordinator, "--processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return None
    if missing:
        raise ValueError(f"--coordinator, --processes and --process-id go together; {missing[0]} is missing")
    return ProcessGroup(coordinator=coordinator, num_processes=num_processes, process_id=process_id)


def is_slurm_step(environment: Mapping[str, str] = os.environ) -> bool:
    """True inside an `srun` of more than one task."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    # A batch script has SLURM_PROCID too; only a step started by srun has more than one task in it.
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    return all(name in environment for name in needed) and tasks.isdigit() and int(tasks) > 1


def initialize(group: ProcessGroup | None) -> None:
    """Joins the other processes, those of `group` or of the SLURM step; does nothing for a lone process.

    Must run before JAX starts its devices. On CPU the processes talk through gloo.

    Raises:
      ValueError: if the others cannot be reached.
    """
    if group is None and not is_slurm_step():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The preemption service would swallow SIGTERM; the loop has its own handler and agrees inside the step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if group is None:
            jax.distributed.initialize(initialization_timeout=CONNECT_SECONDS)
        else:
            jax.distributed.initialize(
                group.coordinator,
                group.num_processes,
                group.process_id,
                cluster_detection_method="deactivate",
                initialization_timeout=CONNECT_SECONDS,
            )
    except (RuntimeError, ValueError) as error:
        where = f"the coordinator {group.coordinator}" if group else "the other SLURM tasks"
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"could not reach {where} within {CONNECT_SECONDS} s ({reason}); start every process with the same "
            "--coordinator and --processes, and check that the port is free and open"
        ) from error


def is_writer() -> bool:
    """True on the one process that writes logs and run.json."""
    return jax.process_index() == 0


def local_rows(sharding: NamedSharding, shape: tuple[int, int, int]) -> list[int]:
    """Returns the rows (second dimension of batch leaves [M, B, S]) that this process's devices hold, ascending."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({row for index in indices for row in range(*index[1].indices(shape[1]))})


def place_batch(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding, *, rows: list[int], num_rows: int
) -> dict[str, jax.Array]:
    """Returns the global arrays [M, num_rows, S] of which this process holds `rows` in `batch` leaves."""
    if len(rows) == num_rows and jax.process_count() == 1:
        return dict(jax.device_put(dict(batch), sharding))
    position = {row: at for at, row in enumerate(rows)}

    def globally(leaf: np.ndarray) -> jax.Array:
        shape = (leaf.shape[0], num_rows, leaf.shape[2])

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            wanted = [position[row] for row in range(*index[1].indices(num_rows))]
            return leaf[index[0], wanted, index[2]]

        return jax.make_array_from_callback(shape, sharding, piece)

    return {name: globally(leaf) for name, leaf in batch.items()}


def stop_flags(mesh: Mesh, *, is_asked: bool) -> jax.Array | np.ndarray:
    """Returns the `stop` argument of a train step: this process's wish, beside those of the others.

    A lone process has a scalar; several have int32 `[num_devices]`, so that the maximum is a tiny all-reduce.
    """
    if jax.process_count() == 1:
        return np.int32(is_asked)
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.full(1, is_asked, np.int32))


def first_devices(per_process: int | None) -> list[jax.Device]:
    """Returns the first `per_process` devices of every process, or all of them.

    Raises:
      ValueError: if a process has fewer.
    """
    devices = jax.devices()
    if per_process is None:
        return devices
    chosen = []
    for process in range(jax.process_count()):
        here = [device for device in devices if device.process_index == process]
        if len(here) < per_process:
            raise ValueError(
                f"--devices {per_process} asks for more than the {len(here)} {here[0].platform} devices there are"
                + ("" if here[0].platform == "cpu" else "; set JAX_PLATFORMS=cpu to simulate them on the CPU")
            )
        chosen += here[:per_process]
    return chosen
