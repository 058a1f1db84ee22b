"""Device meshes: devices that are close together share the inner axes."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from meshes.axes import AXES, EXPERT
from meshes.mesh import build_mesh, simulate_devices

ROOT = Path(__file__).resolve().parents[2]


def test_consecutive_devices_are_innermost():
    mesh = build_mesh(pipe=2, data=1, expert_factors=(1, 2, 2), devices=jax.devices()[::-1])
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Auto,) * 5
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert ids.tolist() == [[[[[0, 1], [2, 3]]]], [[[[4, 5], [6, 7]]]]]


@dataclass(frozen=True)
class FakeDevice:
    process_index: int
    id: int


def test_processes_come_before_numbers(monkeypatch):
    """Numbers need not follow processes: with one process per node the inner axis still joins one process."""
    monkeypatch.setattr("meshes.mesh.Mesh", lambda devices, names, axis_types: devices)
    devices = [FakeDevice(process_index=n % 2, id=n) for n in range(8)]
    arranged = build_mesh(pipe=1, data=1, expert_factors=(1, 2, 4), devices=devices)
    processes = np.vectorize(lambda device: device.process_index)(arranged)
    assert processes.tolist() == [[[[[0] * 4, [1] * 4]]]]


def test_arrays_shard_over_the_expert_axes():
    mesh = build_mesh(pipe=1, data=2, expert_factors=(1, 2, 2))
    x = jax.device_put(np.arange(8.0), NamedSharding(mesh, P(EXPERT)))
    shards = {shard.device.id: shard.data.tolist() for shard in x.addressable_shards}
    assert [shards[n] for n in range(8)] == [[0, 1], [2, 3], [4, 5], [6, 7]] * 2


def test_some_of_the_devices():
    mesh = build_mesh(pipe=1, data=1, expert_factors=(1, 1, 2), devices=jax.devices()[:2])
    assert mesh.size == 2


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (
            {"pipe": 2, "data": 2, "expert_factors": (1, 1, 4)},
            "pipe 2 x data 2 x expert 4 = 16 must equal the 8 devices; change one of the sizes, or give -1 to let it "
            "take the devices left over",
        ),
        (
            {"pipe": 0, "data": 2, "expert_factors": (1, 1, 4)},
            "a mesh needs positive sizes pipe, data and three expert factors, got (0, 2, 1, 1, 4)",
        ),
        (
            {"pipe": 2, "data": 2, "expert_factors": (2,)},
            "a mesh needs positive sizes pipe, data and three expert factors, got (2, 2, 2)",
        ),
    ],
)
def test_impossible_meshes(sizes, sentence):
    with pytest.raises(ValueError) as error:
        build_mesh(**sizes)
    assert str(error.value) == sentence


def test_asking_for_devices_too_late():
    assert len(jax.devices()) == 8
    simulate_devices(4)
    assert len(jax.devices()) == 8
    with pytest.raises(
        ValueError, match="16 CPU devices must be asked for before JAX starts, but it already runs with 8"
    ):
        simulate_devices(16)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        simulate_devices(0)


@pytest.mark.parametrize(
    "flags", ["", "--xla_force_host_platform_device_count=2 --xla_cpu_enable_fast_math=false"]
)
def test_asking_in_time_wins_over_the_environment_and_leaves_it_alone(flags):
    program = """
import os
from meshes.mesh import simulate_devices
simulate_devices(3)
import jax
print(len(jax.devices()), os.environ["XLA_FLAGS"])
"""
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"3 {flags}".strip()
