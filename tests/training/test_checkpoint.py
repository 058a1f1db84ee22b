"""Tests of checkpoints: bit-equal return, other layouts, retention, and every kind of damage."""

import json
import shutil

import jax
import numpy as np
import pytest

from piperjax.training.checkpoint import Checkpoints
from piperjax.training.config import CheckpointConfig, OptimizerConfig, TrainConfig
from piperjax.training.state import init_state, make_train_step

KEEP_ALL = CheckpointConfig(keep=100)


def make_step(executor):
    optimizer = OptimizerConfig(peak_lr=0.05, warmup_steps=2)
    return make_train_step(executor, TrainConfig(model=executor.config, optimizer=optimizer, steps=20))


def train(executor, bigram, state, steps):
    step = make_step(executor)
    for number in steps:
        state, _ = step(state, bigram.batch(executor.config, number), np.int32(0))
    return state


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def saved_run(tmp_path, executor, bigram, steps=(2, 4)):
    """Saves at the given steps, training on at once after each save."""
    checkpoints = Checkpoints(tmp_path, KEEP_ALL)
    state, done, snapshots = init_state(executor, 0), 0, {}
    for step in steps:
        state = train(executor, bigram, state, range(done, step))
        snapshots[step] = jax.device_get(state)
        checkpoints.save(
            step, executor, state, description={"note": f"at {step}"}, validation_loss=10.0 - step
        )
        done = step
    train(executor, bigram, state, range(done, done + 3))  # donates the state while it is written
    checkpoints.wait()
    checkpoints.close()
    return snapshots


def test_state_returns_bit_equal_and_training_goes_on_bit_equal(tmp_path, executor, bigram):
    snapshots = saved_run(tmp_path, executor, bigram)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == (2, 4) and checkpoints.latest_step == 4
    state = checkpoints.restore(2, executor)
    assert_equal(state, snapshots[2])
    state = train(executor, bigram, state, range(2, 4))
    assert_equal(state, snapshots[4])


@pytest.mark.parametrize(("pipe", "num_devices"), [(1, 1), (2, 4), (4, 2)])
def test_state_moves_to_another_layout(tmp_path, executor, bigram, pipe, num_devices):
    snapshots = saved_run(tmp_path, executor, bigram)
    other = bigram.executor(executor.config, pipe=pipe, num_devices=num_devices)
    state = Checkpoints(tmp_path).restore(4, other)
    assert_equal(other.to_logical(state.params), executor.to_logical(snapshots[4].params))
    assert_equal(other.to_logical(state.moments.second), executor.to_logical(snapshots[4].moments.second))
    assert_equal(state.router_bias, snapshots[4].router_bias)
    assert int(state.step) == 4


def test_description_comes_back(tmp_path, executor, bigram):
    saved_run(tmp_path, executor, bigram)
    description = Checkpoints(tmp_path).describe(4)
    assert (description["note"], description["step"], description["format"]) == ("at 4", 4, 1)


def test_parameters_alone_can_be_read(tmp_path, executor, bigram):
    snapshots = saved_run(tmp_path, executor, bigram)
    bias = jax.ShapeDtypeStruct((4, 4), np.float32, sharding=init_state(executor, 0).step.sharding)
    params, router_bias = Checkpoints(tmp_path).restore_params(4, (executor.abstract_logical, bias))
    assert_equal(params, executor.to_logical(snapshots[4].params))
    assert_equal(router_bias, snapshots[4].router_bias)


def test_newest_and_best_are_kept(tmp_path, executor):
    state = init_state(executor, 0)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_best=1))
    for step, loss in [(1, 3.0), (2, 1.5), (3, 2.0), (4, None)]:
        checkpoints.save(step, executor, state, description={}, validation_loss=loss)
    checkpoints.wait()
    assert checkpoints.steps == (2, 3, 4) and checkpoints.best_step == 2
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=1))
    for step, loss in [(5, 1.9), (6, None)]:
        checkpoints.save(step, executor, state, description={}, validation_loss=loss)
    checkpoints.wait()
    assert checkpoints.steps == (2, 6) and checkpoints.best_step == 2


def test_a_saved_step_is_never_written_again(tmp_path, executor, bigram):
    saved_run(tmp_path, executor, bigram)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "checkpoints/4").rglob("*"))
    checkpoints = Checkpoints(tmp_path, KEEP_ALL)
    checkpoints.save(4, executor, init_state(executor, 1), description={})
    checkpoints.wait()
    assert (
        sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "checkpoints/4").rglob("*")) == before
    )


def test_leftovers_of_a_crash_are_ignored(tmp_path, executor, bigram):
    saved_run(tmp_path, executor, bigram)
    shutil.copytree(tmp_path / "checkpoints/4", tmp_path / "checkpoints/9.orbax-checkpoint-tmp-1")
    assert Checkpoints(tmp_path).latest_step == 4


def data_files(directory):
    """The files that hold array values, largest first."""
    return sorted((p for p in (directory / "arrays").rglob("d/*")), key=lambda p: -p.stat().st_size)


def truncate(directory):
    for path in data_files(directory):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(directory):
    path = data_files(directory)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def remove_arrays(directory):
    shutil.rmtree(directory / "arrays")


def remove_description(directory):
    shutil.rmtree(directory / "description")


def truncate_description(directory):
    path = next(path for path in (directory / "description").iterdir())
    path.write_text(path.read_text()[:20])


def empty_description(directory):
    next(path for path in (directory / "description").iterdir()).write_text("{}")


def drop_everything(directory):
    shutil.rmtree(directory)
    directory.mkdir()


DAMAGE = [
    truncate,
    flip,
    remove_arrays,
    remove_description,
    truncate_description,
    empty_description,
    drop_everything,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_the_way_out_named(tmp_path, executor, bigram, damage):
    saved_run(tmp_path, executor, bigram)
    damage(tmp_path / "checkpoints/4")
    with pytest.raises(ValueError) as caught:
        Checkpoints(tmp_path).restore(4, executor)
    message = str(caught.value)
    assert f"{tmp_path}/checkpoints/4 is damaged" in message and "\n" not in message
    assert "delete that directory to resume from step 2" in message
    assert int(Checkpoints(tmp_path).restore(2, executor).step) == 2


def test_other_formats_are_refused(tmp_path, executor, bigram):
    saved_run(tmp_path, executor, bigram)
    path = next(path for path in (tmp_path / "checkpoints/4/description").iterdir())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    with pytest.raises(ValueError, match="has format 7, but this version reads format 1; resume it with"):
        Checkpoints(tmp_path).restore(4, executor)


@pytest.mark.parametrize("changes", [{"vocab_size": 40}, {"num_layers": 3}])
def test_other_models_are_refused(tmp_path, executor, bigram, changes):
    saved_run(tmp_path, executor, bigram)
    other = bigram.executor(bigram.model(**changes))
    with pytest.raises(
        ValueError, match=r"belongs to another model: first_moment/.* is \[.*\] there and \[.*\] here"
    ):
        Checkpoints(tmp_path).restore(4, other)


def test_reading_where_nothing_was_saved(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint in .*; train there first"):
        Checkpoints(tmp_path)
