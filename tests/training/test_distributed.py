"""Tests of several processes: the flags, the rows each one reads, and a run of two on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from models.config import DenseFFN, GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN
from piperjax.training import distributed
from piperjax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]


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


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """Starts the processes of a run, each with two devices, in a directory with a model and a text."""
    attention = GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8)
    layers = (
        LayerConfig(attention=attention, ffn=DenseFFN(d_ff=16)),
        LayerConfig(attention=attention, ffn=MoEFFN(num_experts=4, experts_per_token=2, d_ff=16)),
    )
    model = ModelConfig(name="micro", d_model=16, vocab_size=257, layers=layers)
    (tmp_path / "micro.json").write_text(json.dumps(model.to_dict()))
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 200)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    processes = []

    def run(num_processes, *flags):
        port = free_port()
        command = [sys.executable, str(ROOT / "train.py"), "--model", "micro.json", "--data", "text.txt"]
        command += ["--seq", "32", "--batch", "8", "--microbatches", "2", "--log-every", "1", *flags]
        command += ["--set", "data.cache_dir=cache", "--devices", str(4 // num_processes)]
        for number in range(num_processes):
            group = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(num_processes)]
            group = [*group, "--process-id", str(number)] if num_processes > 1 else []
            processes.append(
                subprocess.Popen(
                    [*command, *group],
                    cwd=tmp_path,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return processes[-num_processes:]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def finish(processes):
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_together(start, tmp_path):
    mesh = ["--pipe", "2", "--data-parallel", "2", "--expert", "1"]
    codes, outputs = finish(start(2, *mesh, "--steps", "6", "--out", "two"))
    assert codes == [0, 0], outputs
    assert "step 6/6" in outputs[0] and "step 1/6" not in outputs[1]
    two = read_metrics(tmp_path / "two")
    assert [record["step"] for record in two if "loss" in record] == list(range(1, 7))

    codes, outputs = finish(start(1, *mesh, "--steps", "6", "--out", "one"))
    assert codes == [0], outputs
    one = read_metrics(tmp_path / "one")
    for name in ("loss", "grad_norm", "load_imbalance"):
        values = [[record[name] for record in records if name in record] for records in (one, two)]
        np.testing.assert_allclose(*values, rtol=1e-5)

    # A signal to one process stops both after the same step; the checkpoint serves a single process.
    both = start(2, *mesh, "--steps", "100000", "--out", "two")
    deadline = time.monotonic() + 300
    while (
        max(record["step"] for record in read_metrics(tmp_path / "two")) < 9 and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    both[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(both)
    assert codes == [143, 143], outputs
    step = max(record["step"] for record in read_metrics(tmp_path / "two"))
    assert f"SIGTERM: saved step {step} in two" in outputs[0]
    codes, outputs = finish(start(1, *mesh, "--steps", str(step + 1), "--out", "two"))
    assert codes == [0] and f"resumed   from step {step}" in outputs[0], outputs
