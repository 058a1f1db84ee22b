"""Tests of several processes on one machine: they train as one does, one of them writes, and a signal ends all."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from models.config import GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN
from piperjax.training.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Only what hangs gets this far. JAX's own limits are longer, or there are none.
LIMIT_SECONDS = 400


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended; lists are by process."""

    directory: Path
    exit_codes: list[int]
    printed: list[str]
    errors: list[str]

    @property
    def steps(self):
        return [record for record in read_metrics(self.directory) if "loss" in record]

    def values(self, name):
        return np.array([record[name] for record in self.steps])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model and a text so small that starting Python takes longer than training."""
    directory = tmp_path_factory.mktemp("inputs")
    attention = GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8)
    layer = LayerConfig(attention=attention, ffn=MoEFFN(num_experts=4, experts_per_token=2, d_ff=16))
    model = ModelConfig(name="pair", d_model=16, vocab_size=257, layers=(layer, layer))
    (directory / "model.json").write_text(json.dumps(model.to_dict()))
    words = np.random.default_rng(0).choice(["alpha ", "beta ", "gamma ", "delta "], 4000)
    (directory / "text.txt").write_text("".join(words))
    return directory


@pytest.fixture(scope="module")
def start(inputs):
    """Starts `train.py` in one or two processes of four devices together; whatever happens, all are ended."""
    started = []

    def begin(out, mesh, *, steps, num_processes):
        # The learning rate does not depend on the length of the run, so that runs of different lengths compare.
        # All processes of a pair find no tokens in the cache, and must agree on who writes them.
        flags = f"""
            --model model.json --mesh {mesh} --devices {4 // num_processes} --steps {steps} --out {out}
            --data text.txt --batch 8 --seq 32 --microbatches 2 --set data.cache_dir={out}_tokens
            --set optimizer.warmup_steps=0 --set optimizer.final_lr_fraction=1
            --log-every 1 --set log.validation_batches=2
        """
        command = [sys.executable, str(ROOT / "train.py"), *flags.split()]
        if num_processes > 1:
            command += f"--coordinator 127.0.0.1:{free_port()} --processes {num_processes}".split()
        for process in range(num_processes):
            own = f"--process-id {process}".split() if num_processes > 1 else []
            with open(f"{out}.{process}.out", "w") as output, open(f"{out}.{process}.err", "w") as errors:
                started.append(
                    subprocess.Popen(
                        command + own,
                        cwd=inputs,
                        env=environment(num_processes),
                        stdout=output,
                        stderr=errors,
                    )
                )
        return started[-num_processes:]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def train(start):
    """Trains to the end and returns how."""

    def run(out, mesh, *, steps, num_processes):
        return end_of(start(out, mesh, steps=steps, num_processes=num_processes), out)

    return run


@pytest.fixture(scope="module")
def interrupted(start, tmp_path_factory):
    """Two processes, of which only the second, the one that writes nothing, receives SIGTERM."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    processes = start(out, "pipe=2,expert=2", steps=5000, num_processes=2)
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(read_metrics(out)) < 3:
        assert [process.poll() for process in processes] == [None, None], end_of(processes, out)
        assert time.monotonic() < deadline, "no third step in time"
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    return end_of(processes, out)


def end_of(processes, out):
    """Waits for the processes, and ends those that hang."""
    deadline = time.monotonic() + LIMIT_SECONDS
    try:
        for process in processes:
            process.wait(max(0.1, deadline - time.monotonic()))
    finally:
        # Not SIGTERM: train.py would want to finish its step, which hangs.
        for process in processes:
            process.kill()
    read = {
        kind: [Path(f"{out}.{i}.{kind}").read_text() for i in range(len(processes))]
        for kind in ("out", "err")
    }
    return Ended(Path(out), [process.returncode for process in processes], read["out"], read["err"])


def environment(num_processes):
    # Machine code is not worth optimising that runs for a second.
    given = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    if num_processes > 1:
        # JAX caches what its first process compiled, and gloo gives the others half a minute to catch up with it.
        given.pop("JAX_COMPILATION_CACHE_DIR", None)
    return given


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def own_lines(printed):
    """What we print ourselves; gloo reports its connections on the same stream."""
    return [line for line in printed.splitlines() if line and not line.startswith("[Gloo]")]


def assert_same_steps(run, other):
    """The first steps of two runs, as many as the shorter one has, are the same."""
    count = min(len(run.steps), len(other.steps))
    assert count >= 3
    for name, tolerance in (("loss", 1e-5), ("aux_loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 0)):
        np.testing.assert_allclose(
            run.values(name)[:count], other.values(name)[:count], rtol=tolerance, err_msg=name
        )
    np.testing.assert_array_equal(
        run.values("load_imbalance")[:count], other.values("load_imbalance")[:count]
    )


# Between the processes travel: rows of tokens to experts and back; gradients, each process reading its own half
# of the batch. In the interrupted run it is the activations, from stage to stage.
@pytest.mark.parametrize("mesh", ["expert=4", "data=2,expert=2"])
def test_two_processes_train_as_one(train, tmp_path, mesh):
    two = train(tmp_path / "two", mesh, steps=4, num_processes=2)
    one = train(tmp_path / "one", mesh, steps=4, num_processes=1)
    assert two.exit_codes == [0, 0] and one.exit_codes == [0], (two.errors, one.errors)
    assert_same_steps(two, one)
    validation = [read_metrics(run.directory)[-1] for run in (two, one)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)
    assert validation[0]["validation_tokens"] > 400
    assert json.loads((two.directory / "run.json").read_text())["devices"]["num_processes"] == 2


def test_one_process_writes_and_prints(interrupted):
    numbers = [record["step"] for record in interrupted.steps]
    assert numbers == list(range(1, len(numbers) + 1))
    printed = own_lines(interrupted.printed[0])
    assert any(line.startswith("model     pair: 2 layers, 4 experts, 2 per token") for line in printed)
    assert sum(line.startswith("step ") for line in printed) == len(numbers)
    assert own_lines(interrupted.printed[1]) == []


def test_a_signal_to_one_process_saves_and_ends_both(interrupted):
    assert interrupted.exit_codes == [128 + signal.SIGTERM] * 2, interrupted.errors
    last = interrupted.steps[-1]["step"]
    assert 3 <= last < 5000
    assert f"saved step {last} in {interrupted.directory}; the same command resumes" in interrupted.printed[0]
    assert [path.name for path in (interrupted.directory / "checkpoints").iterdir()] == [str(last)]


def test_one_process_goes_on_where_two_stopped(interrupted, train, tmp_path):
    last = interrupted.steps[-1]["step"]
    shutil.copytree(interrupted.directory, tmp_path / "resumed")
    resumed = train(tmp_path / "resumed", "pipe=2,expert=2", steps=last + 3, num_processes=1)
    through = train(tmp_path / "through", "pipe=2,expert=2", steps=last + 3, num_processes=1)
    assert f"resumed   from step {last} in" in resumed.printed[0], resumed.errors
    assert len(resumed.steps) == len(through.steps) == last + 3
    assert_same_steps(interrupted, through)
    assert_same_steps(resumed, through)
