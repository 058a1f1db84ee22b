"""Tests of the training loop with a small executor: learning, stopping, resuming, and keeping what was saved."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from piperjax.planner.plan import Plan
from piperjax.training import loop
from piperjax.training.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig
from piperjax.training.metrics import read_metrics
from piperjax.training.run_directory import RunLock
from piperjax.training.run_file import read_run_file


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A directory with a text that a bigram model can learn."""
    directory = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    words = ["alpha ", "beta ", "gamma ", "delta ", "epsilon "]
    for number in range(40):
        content = "".join(words[index] for index in generator.integers(0, 5, 120))
        (directory / f"{number}.txt").write_text(content)
    return directory


@pytest.fixture
def train(monkeypatch, bigram, text, tmp_path):
    """Trains the small executor; keyword arguments replace fields of the configuration."""

    def build(model, plan, mesh, dtype):
        return bigram.executor(model, pipe=plan.pipe, num_devices=plan.data * plan.expert)

    monkeypatch.setattr(loop, "Executor", build)
    # Nothing is predicted of the small executor.
    monkeypatch.setattr(loop, "compare", lambda *_, **__: None)
    monkeypatch.setattr(loop, "compiled_lines", lambda _: "compiled  as predicted")

    def run(*, pipe=1, replicas=1, on_record=None, stream=None, **changes):
        plan = Plan(
            pipe=pipe,
            data=replicas,
            expert=1,
            expert_factors=(1, 1, 1),
            schedule="one_f_one_b",
            num_microbatches=2,
            layers_per_stage=(4 // pipe,) * pipe,
            batch_size=8,
            seq_len=32,
        )
        config = TrainConfig(
            model=bigram.model(vocab_size=257),
            plan=plan,
            optimizer=OptimizerConfig(peak_lr=0.05, warmup_steps=2),
            data=DataConfig(
                path=str(text),
                seq_len=32,
                batch_size=8,
                validation_fraction=0.1,
                cache_dir=str(tmp_path / "cache"),
            ),
            checkpoint=CheckpointConfig(every_steps=4),
            log=LogConfig(log_every=5, validate_every=8, validation_batches=3, progress="plain"),
            out=str(tmp_path / "run"),
            steps=12,
        )
        config = dataclasses.replace(config, **changes)
        devices = jax.devices()[: plan.num_devices]
        return loop.train(config, devices=devices, on_record=on_record, stream=stream or io.StringIO())

    return run


def interrupt_at(step, number):
    def hook(record):
        if record["step"] == step and "loss" in record:
            os.kill(os.getpid(), number)

    return hook


def steps_of(records):
    return [record["step"] for record in records if "loss" in record]


def logical_params(result):
    return jax.device_get(result.executor.to_logical(result.state.params))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_learns_and_leaves_everything_behind(train, tmp_path):
    stream = io.StringIO()
    result = train(stream=stream, steps=30, replicas=2)
    losses = [record["loss"] for record in result.records if "loss" in record]
    assert losses[-1] < losses[0] - 1 and result.exit_code == 0 and result.stopped_by == ""
    assert result.validation["step"] == 30
    assert result.validation["validation_loss"] < result.validation["unigram_entropy"]
    assert steps_of(result.records) == list(range(1, 31))
    assert [r["step"] for r in result.records if "validation_loss" in r] == [8, 16, 24, 30]
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "checkpoints", "metrics.jsonl", "run.json"]
    output = stream.getvalue()
    assert "model     bigram: 4 layers, 4 experts, 1 per token" in output
    assert "mesh      pipe 1 x data 2 x expert 1 = 2 devices" in output
    printed = [line.split()[1] for line in output.splitlines() if line.startswith("step") and "|" in line]
    assert printed == ["1/30", "5/30", "10/30", "15/30", "20/30", "25/30", "30/30"]
    assert "\ntime      a step took " in output and " predicted, give or take " in output
    assert "unigram entropy" in output and output.endswith(
        f"saved     step 30; for text: python -m piperjax sample --run {tmp_path}/run\n"
    )


def test_run_file_resolves_the_configuration(train, tmp_path):
    result = train(steps=2)
    content = json.loads((tmp_path / "run/run.json").read_text())
    assert read_run_file(tmp_path / "run") == result.config
    assert content["config"]["plan"]["num_microbatches"] == 2
    assert content["prediction"]["step_seconds"] == result.records[0]["predicted_step_seconds"] > 0
    assert content["prediction"]["memory_bytes"]["parameters"] > 0
    assert content["devices"] == {"backend": "cpu", "kind": "cpu", "num_devices": 1, "num_processes": 1}
    assert {"jax", "optax", "python"} <= content["versions"].keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_is_told(train, tmp_path, number):
    stream = io.StringIO()
    first = train(on_record=interrupt_at(3, number), stream=stream)
    assert first.exit_code == 128 + number and 3 <= first.step < 12
    assert sorted(map(int, os.listdir(tmp_path / "run/checkpoints")))[-1] == first.step
    assert (
        f"{number.name}: saved step {first.step} in {tmp_path}/run; the same command resumes"
        in stream.getvalue()
    )


def test_an_interrupted_run_goes_on_bit_equal(train, tmp_path):
    through = train(out=str(tmp_path / "through"))
    first = train(on_record=interrupt_at(5, signal.SIGTERM))
    stream = io.StringIO()
    second = train(stream=stream)
    assert f"resumed   from step {first.step}" in stream.getvalue()
    assert second.step == 12 and steps_of(second.records) == list(range(1, 13))
    assert_equal(logical_params(second), logical_params(through))
    for field in ("loss", "grad_norm", "learning_rate", "load_imbalance"):
        assert [r[field] for r in second.records if field in r] == [
            r[field] for r in through.records if field in r
        ]


@pytest.mark.parametrize("mesh", [{"pipe": 2}, {"pipe": 4, "replicas": 2}])
def test_a_run_moves_to_another_mesh(train, tmp_path, mesh):
    through = train(out=str(tmp_path / "through"))
    train(on_record=interrupt_at(6, signal.SIGTERM))
    second = train(**mesh)
    assert second.step == 12
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        logical_params(second),
        logical_params(through),
    )


def test_a_finished_run_says_so_and_more_steps_go_on(train):
    train(steps=4)
    stream = io.StringIO()
    again = train(steps=4, stream=stream)
    assert again.step == 4 and "already at step 4 of 4; give more --steps" in stream.getvalue()
    stream = io.StringIO()
    assert train(steps=6, stream=stream).step == 6
    assert "resumed   from step 4" in stream.getvalue() and "steps 4 -> 6" in stream.getvalue()


def test_records_after_the_checkpoint_are_replaced(train, tmp_path):
    train(steps=6)  # checkpoints at 4 and 6
    with (tmp_path / "run/metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')  # a crash in the middle of a line
    result = train(steps=8)
    assert steps_of(result.records) == list(range(1, 9)) and result.records[-1]["step"] == 8


def test_another_run_in_the_same_directory_is_refused_and_nothing_touched(train, tmp_path):
    done = train(steps=4).config
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for changes, sentence in [
        ({"seed": 1}, "holds a run in which seed was 0, but now it is 1; choose another --out"),
        ({"data": dataclasses.replace(done.data, seed=3)}, "in which data.seed was 0, but now it is 3"),
        (
            {"model": dataclasses.replace(done.model, norm_eps=0.1)},
            "model.norm_eps was 1e-05, but now it is 0.1",
        ),
    ]:
        with pytest.raises(ValueError) as caught:
            train(**changes)
        assert sentence in str(caught.value)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


def test_an_overflow_stops_the_run_and_keeps_the_checkpoint(train, tmp_path):
    train(steps=4)
    overflow = OptimizerConfig(peak_lr=1e38, warmup_steps=0, clip_norm=0.0)
    with pytest.raises(ValueError) as caught:
        train(steps=8, optimizer=overflow)
    message = str(caught.value)
    assert "so training stops; the checkpoint of step 4 is kept; lower optimizer.peak_lr" in message
    assert os.listdir(tmp_path / "run/checkpoints") == ["4"]
    assert train(steps=8).step == 8


def test_two_runs_cannot_share_a_directory(train, tmp_path):
    train(steps=2)
    code = (
        "import sys, time; from piperjax.training.run_directory import RunLock;"
        "lock = RunLock(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(
            ValueError, match=f"is in use by process {holder.pid} on .*; wait for it, or choose"
        ):
            RunLock(tmp_path / "run")
        with pytest.raises(ValueError, match="is in use by process"):
            train(steps=4)
    finally:
        holder.kill()
        holder.communicate()
    assert train(steps=4).step == 4


def test_a_wrong_number_of_devices_is_explained(train):
    with pytest.raises(ValueError, match=r"needs pipe 1 x data 1 x expert 1 = 1 devices, but there are 8"):
        loop.train(train(steps=1).config)


def test_a_vocabulary_that_is_too_small_is_explained(train, bigram):
    with pytest.raises(
        ValueError, match=r"'bytes' has 257 tokens but model bigram .*--set model.vocab_size=257"
    ):
        train(model=bigram.model(vocab_size=100))


def test_without_held_out_text_nothing_is_validated(train, tmp_path):
    data = train(steps=1).config.data
    data = dataclasses.replace(data, validation_fraction=0.0)
    result = train(steps=4, data=data, out=str(tmp_path / "other"))
    assert result.validation is None and result.step == 4


def test_hooks_receive_every_record(train):
    seen = []
    result = train(steps=4, on_record=seen.append)
    assert seen == result.records == read_metrics(result.config.out)
