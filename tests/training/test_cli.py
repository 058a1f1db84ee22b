"""Tests of the command line: flags to configuration, axis sizes to plans, resuming, and the help."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from meshes.platform import load_platform
from models.presets import preset
from piperjax.training import cli
from piperjax.training.config import TrainConfig
from piperjax.training.overrides import parse_assignments
from piperjax.training.planning import make_plan
from piperjax.training.run_file import write_run_file

ROOT = Path(__file__).parents[2]
CPU8 = load_platform("cpu8")


def configured(*argv):
    args = cli.parse_arguments(argv)
    return cli.configuration(args, parse_assignments(args.set))


def planned(*argv, num_devices=8):
    args = cli.parse_arguments(argv)
    tree = parse_assignments(args.set)
    changes = tree.pop("plan", {})
    config = cli.configuration(args, tree)
    return make_plan(args, config, CPU8, num_devices, changes=changes).plan


def test_without_flags_everything_has_a_default():
    assert configured() == TrainConfig(model=preset("tiny"), out="runs/tiny")


def test_every_flag_reaches_its_field():
    flags = (
        "--model small --batch 32 --seq 64 --steps 7 --data text.md --tokenizer t.json --out there "
        "--seed 5 --dtype bfloat16 --platform frontier --log-every 3 --set optimizer.clip_norm=0"
    )
    config = configured(*flags.split())
    assert config.model == preset("small")
    assert (config.data.batch_size, config.data.seq_len, config.steps) == (32, 64, 7)
    assert (config.data.path, config.data.tokenizer, config.out) == ("text.md", "t.json", "there")
    assert (config.seed, config.data.seed, config.dtype, config.platform) == (5, 5, "bfloat16", "frontier")
    assert (config.log.log_every, config.optimizer.clip_norm) == (3, 0.0)


def test_a_model_can_come_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dataclasses.replace(preset("tiny"), name="mine").to_dict()))
    config = configured("--model", str(path))
    assert config.model.name == "mine" and config.out == "runs/mine"


@pytest.fixture
def begun(tmp_path):
    """A run directory as `--pipe 2 --expert 4 --schedule gpipe --seed 4` leaves it."""
    config = configured("--out", str(tmp_path), "--seed", "4", "--steps", "50")
    plan = planned("--pipe", "2", "--expert", "4", "--schedule", "gpipe", "--set", "plan.memory_mode=stage")
    config = dataclasses.replace(config, plan=plan)
    write_run_file(config, platform={}, devices={})
    return tmp_path, config


def test_resume_reads_the_configuration_and_flags_change_it(begun):
    directory, config = begun
    assert configured("--resume", str(directory)) == config
    changed = configured("--resume", str(directory), "--steps", "90", "--set", "optimizer.weight_decay=0.0")
    assert changed.steps == 90 and changed.optimizer.weight_decay == 0.0 and changed.seed == 4


def test_resume_follows_a_directory_that_was_moved(begun, tmp_path):
    directory, _ = begun
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (directory / "run.json").rename(moved / "run.json")
    assert configured("--resume", str(moved)).out == str(moved)


def test_help_names_every_flag_and_starts_no_jax():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('jax', 'flax', 'optax', 'orbax', 'grain')));"
        "from piperjax.training.cli import main; main(['--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    flags = (
        "--model --mesh --plan --pipe --expert --data-parallel --schedule --microbatches --batch --seq --steps --data "
        "--tokenizer --out --resume --seed --dtype --platform --devices --log-every --set --coordinator "
        "--processes --process-id"
    )
    for flag in flags.split():
        assert f"  {flag} " in result.stdout
    for heading in ("what is trained:", "where it runs:", "how it runs:", "several processes", "examples:"):
        assert heading in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def ends_with(monkeypatch, capsys, error):
    def run(args):
        raise error

    monkeypatch.setattr(cli, "run", run)
    return cli.main([]), capsys.readouterr().err


def test_running_out_of_memory_is_explained(monkeypatch, capsys):
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\n more")
    code, message = ends_with(monkeypatch, capsys, error)
    assert code == 2 and message.count("\n") == 1
    assert message.startswith("train.py: error: the devices ran out of memory; use more --microbatches")


def test_errors_of_the_system_are_explained(monkeypatch, capsys):
    error = OSError(28, "No space left on device", "runs/tiny/metrics.jsonl")
    code, message = ends_with(monkeypatch, capsys, error)
    assert code == 2
    assert (
        message == "train.py: error: cannot read or write runs/tiny/metrics.jsonl: No space left on device\n"
    )


def test_other_errors_are_not_hidden(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="a bug"):
        ends_with(monkeypatch, capsys, RuntimeError("a bug"))


def test_ctrl_c_before_the_first_step(monkeypatch, capsys):
    assert ends_with(monkeypatch, capsys, KeyboardInterrupt()) == (130, "\nstopped before the first step\n")
