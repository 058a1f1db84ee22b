"""Tests of checkpoints: bit-equal return, other layouts, retention, and every kind of damage."""

import gc
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where the run that every test copies is kept, and its snapshots."""
    return tmp_path_factory.mktemp("saved"), {}


@pytest.fixture
def run(saved, tmp_path, executor, bigram):
    """A directory with checkpoints of steps 2 and 4, and {step: the state that was saved}."""
    directory, snapshots = saved
    if not snapshots:
        snapshots.update(save_run(directory, executor, bigram))
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    return tmp_path, snapshots


def save_run(directory, executor, bigram, steps=(2, 4)):
    """Saves at the given steps, training on at once after each save."""
    checkpoints = Checkpoints(directory, KEEP_ALL)
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


def test_state_returns_bit_equal_and_training_goes_on_bit_equal(run, executor, bigram):
    tmp_path, snapshots = run
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == (2, 4) and checkpoints.latest_step == 4
    state = checkpoints.restore(2, executor)
    assert_equal(state, snapshots[2])
    state = train(executor, bigram, state, range(2, 4))
    assert_equal(state, snapshots[4])


@pytest.mark.parametrize(("pipe", "num_devices"), [(1, 1), (2, 4), (4, 2)])
def test_state_moves_to_another_layout(run, executor, bigram, pipe, num_devices):
    tmp_path, snapshots = run
    other = bigram.executor(executor.config, pipe=pipe, num_devices=num_devices)
    state = Checkpoints(tmp_path).restore(4, other)
    assert_equal(other.to_logical(state.params), executor.to_logical(snapshots[4].params))
    assert_equal(other.to_logical(state.moments.second), executor.to_logical(snapshots[4].moments.second))
    assert_equal(state.router_bias, snapshots[4].router_bias)
    assert int(state.step) == 4


def test_description_comes_back(run, executor, bigram):
    tmp_path, _ = run
    description = Checkpoints(tmp_path).describe(4)
    assert (description["note"], description["step"], description["format"]) == ("at 4", 4, 1)


def test_parameters_alone_can_be_read(run, executor, bigram):
    tmp_path, snapshots = run
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


def test_a_saved_step_is_never_written_again(run, executor, bigram):
    tmp_path, _ = run
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "checkpoints/4").rglob("*"))
    checkpoints = Checkpoints(tmp_path, KEEP_ALL)
    checkpoints.save(4, executor, init_state(executor, 1), description={})
    checkpoints.wait()
    assert (
        sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "checkpoints/4").rglob("*")) == before
    )


def test_leftovers_of_a_crash_are_ignored(run, executor, bigram):
    tmp_path, _ = run
    shutil.copytree(tmp_path / "checkpoints/4", tmp_path / "checkpoints/9.orbax-checkpoint-tmp-1")
    assert Checkpoints(tmp_path).latest_step == 4


def data_files(directory):
    """The files that hold array values, largest first."""
    return sorted((p for p in (directory / "arrays").rglob("d/*")), key=lambda p: -p.stat().st_size)


def truncate(directory):
    for path in data_files(directory):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(directory):
    # In every file: which of them hold arrays, and which a tree that none refers to, differs from run to run.
    for path in data_files(directory):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)


def remove_arrays(directory):
    shutil.rmtree(directory / "arrays")


def remove_description(directory):
    shutil.rmtree(directory / "description")


def truncate_description(directory):
    path = directory / "description/metadata"
    path.write_text(path.read_text()[:20])


def empty_description(directory):
    (directory / "description/metadata").write_text("{}")


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


# Where one array cannot be read, orbax never awaits the reading of the others.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_the_way_out_named(run, executor, bigram, damage):
    tmp_path, _ = run
    damage(tmp_path / "checkpoints/4")
    with pytest.raises(ValueError) as caught:
        Checkpoints(tmp_path).restore(4, executor)
    message = str(caught.value)
    assert f"{tmp_path}/checkpoints/4 is damaged" in message and "\n" not in message
    assert "delete that directory to resume from step 2" in message
    assert int(Checkpoints(tmp_path).restore(2, executor).step) == 2
    gc.collect()  # what a failed read leaves behind must not complain


def test_other_formats_are_refused(run, executor, bigram):
    tmp_path, _ = run
    path = tmp_path / "checkpoints/4/description/metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    with pytest.raises(ValueError, match="has format 7, but this version reads format 1; resume it with"):
        Checkpoints(tmp_path).restore(4, executor)


@pytest.mark.parametrize("changes", [{"vocab_size": 40}, {"num_layers": 3}])
def test_other_models_are_refused(run, executor, bigram, changes):
    tmp_path, _ = run
    other = bigram.executor(bigram.model(**changes))
    with pytest.raises(
        ValueError, match=r"belongs to another model: first_moment/.* is \[.*\] there and \[.*\] here"
    ):
        Checkpoints(tmp_path).restore(4, other)


def test_reading_where_nothing_was_saved(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint in .*; train there first"):
        Checkpoints(tmp_path)


def test_a_full_disk_is_explained_and_earlier_checkpoints_are_kept(tmp_path, executor, monkeypatch):
    checkpoints = Checkpoints(tmp_path, KEEP_ALL)
    state = init_state(executor, 0)
    checkpoints.save(1, executor, state, description={})
    checkpoints.wait()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(ValueError) as caught:
        checkpoints.save(2, executor, state, description={})
    message = str(caught.value)
    assert (
        "could not write a checkpoint to" in message
        and "(no space left); the earlier ones are kept" in message
    )
    checkpoints.close()
    assert int(Checkpoints(tmp_path).restore(1, executor).step) == 1
