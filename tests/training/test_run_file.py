"""Tests of run.json and of what a run must keep."""

import dataclasses
import json

import pytest

from models.presets import preset
from piperjax.training.config import DataConfig, OptimizerConfig, TrainConfig
from piperjax.training.run_file import check_same_run, read_run_file, write_run_file


@pytest.fixture
def config(tmp_path):
    return TrainConfig(model=preset("tiny"), out=str(tmp_path))


def test_what_is_written_is_read(config, tmp_path):
    write_run_file(config, platform={"name": "cpu"}, devices={"num_devices": 1})
    assert read_run_file(config.out) == config
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["platform"] == {"name": "cpu"} and content["versions"]["jax"]
    assert {"git_commit", "command", "devices"} <= content.keys()


def test_a_directory_that_moved_is_its_own_out(config, tmp_path):
    write_run_file(dataclasses.replace(config), platform={}, devices={})
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "run.json").rename(moved / "run.json")
    assert read_run_file(moved).out == str(moved)


def saved(config):
    return json.loads(json.dumps(config.to_dict()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2}, "seed was 0, but now it is 2"),
        ({"model": preset("small")}, 'model.name was "tiny", but now it is "small"'),
        ({"data": DataConfig(seq_len=64)}, "data.seq_len was 128, but now it is 64"),
        ({"data": DataConfig(batch_size=8)}, "data.batch_size was 16, but now it is 8"),
        ({"data": DataConfig(path="x.txt")}, 'data.path was "stdlib", but now it is "x.txt"'),
        ({"data": DataConfig(tokenizer="t.json")}, 'data.tokenizer was "bytes", but now it is "t.json"'),
    ],
)
def test_what_must_stay(config, changes, words):
    with pytest.raises(ValueError) as caught:
        check_same_run(saved(config), dataclasses.replace(config, **changes), where="runs/a")
    message = str(caught.value)
    assert message.startswith("runs/a holds a run in which ") and words in message
    assert message.endswith("choose another --out for a new run, or keep the old value to go on")


def test_what_may_change_is_told(config):
    changed = dataclasses.replace(
        config, steps=900, out="elsewhere", dtype="bfloat16", optimizer=OptimizerConfig(betas=(0.9, 0.99))
    )
    assert check_same_run(saved(config), changed, where="runs/a") == [
        "optimizer.betas [0.9, 0.95] -> [0.9, 0.99]",
        "steps 300 -> 900",
        'dtype "float32" -> "bfloat16"',
    ]
    assert check_same_run(saved(config), config, where="runs/a") == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not the directory of a run, it has no run.json"),
        ("{", "is not valid JSON"),
        ("[]", "holds no configuration"),
        ('{"config": {"model": {}}}', "model needs the field 'name'"),
        ('{"config": {"speed": 1}}', "configuration has no field 'speed'"),
    ],
)
def test_what_cannot_be_read(tmp_path, content, words):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_run_file(tmp_path)
