"""Tests of several processes: the flags, SLURM, and the rows each one reads."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from piperjax.training import distributed


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("pipe", "data"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])


def test_a_group_needs_all_three_flags():
    assert distributed.process_group(None, None, None) is None
    group = distributed.process_group("node1:1234", 4, 3)
    assert (group.coordinator, group.num_processes, group.process_id) == ("node1:1234", 4, 3)
    for flags in [("node1:1234", None, None), (None, 4, 0), ("node1:1234", 4, None)]:
        with pytest.raises(
            ValueError, match="--coordinator, --processes and --process-id go together; .* is missing"
        ):
            distributed.process_group(*flags)


def test_slurm_steps_are_recognised_and_lone_tasks_are_not():
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "8",
    }
    assert distributed.is_slurm_step(step)
    assert not distributed.is_slurm_step({})
    assert not distributed.is_slurm_step(step | {"SLURM_STEP_NUM_TASKS": "1"})
    assert not distributed.is_slurm_step({name: step[name] for name in step if name != "SLURM_STEP_NODELIST"})


def test_a_lone_process_joins_nobody():
    distributed.initialize(None)
    assert jax.process_count() == 1 and distributed.is_writer()


def test_one_process_reads_all_rows_and_places_them(mesh):
    sharding = NamedSharding(mesh, P(None, "data", None))
    rows = distributed.local_rows(sharding, (2, 8, 3))
    assert rows == list(range(8))
    batch = {"tokens": np.arange(48, dtype=np.int32).reshape(2, 8, 3)}
    placed = distributed.place_batch(batch, sharding, rows=rows, num_rows=8)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
    assert placed["tokens"].sharding.is_equivalent_to(sharding, 3)


class HalfSharding:
    """The view of a process that owns some of the devices of a sharding."""

    def __init__(self, sharding, owned):
        self.sharding, self.owned = sharding, owned

    def addressable_devices_indices_map(self, shape):
        indices = self.sharding.devices_indices_map(shape)
        return {device: index for device, index in indices.items() if device in self.owned}


@pytest.mark.parametrize(
    ("spec", "owned", "expected"),
    [
        (P(None, "data", None), [0, 1, 4, 5], [0, 1, 2, 3]),  # half of the data axis
        (P(None, "data", None), [0, 1, 2, 3], list(range(8))),  # one pipe rank
        (P(None, ("pipe", "data"), None), [0, 3, 6], [0, 3, 6]),  # rows that are not neighbours
    ],
)
def test_a_process_reads_the_rows_of_its_devices_only(mesh, spec, owned, expected):
    devices = [mesh.devices.flat[number] for number in owned]
    sharding = HalfSharding(NamedSharding(mesh, spec), devices)
    assert distributed.local_rows(sharding, (2, 8, 3)) == expected


def test_stop_flags_of_one_process_are_a_scalar(mesh):
    assert distributed.stop_flags(mesh, is_asked=True) == 1
    assert np.shape(distributed.stop_flags(mesh, is_asked=False)) == ()


def test_the_first_devices_of_each_process():
    assert distributed.first_devices(None) == jax.devices()
    assert distributed.first_devices(3) == jax.devices()[:3]
    with pytest.raises(ValueError, match="--devices 9 asks for more than the 8 cpu devices there are"):
        distributed.first_devices(9)
