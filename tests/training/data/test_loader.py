"""The laws of the order of sequences: random access, resumption, epochs, and any division into processes."""

import json

import numpy as np
import pytest

from piperjax.training.data import TrainBatches, ValidationBatches, load_dataset
from piperjax.training.data.packing import LEAVES

S = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    lines = (json.dumps({"text": f"{number}: " + "ab" * (number % 30)}) for number in range(120))
    (directory / "a.jsonl").write_text("\n".join(lines))
    return load_dataset(
        str(directory / "a.jsonl"),
        seq_len=S,
        cache_dir=directory,
        validation_fraction=0.1,
        report=pytest.fail,
    )


def assert_equal(left, right):
    assert left.keys() == right.keys() == LEAVES.keys()
    for name in LEAVES:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def concatenate(batches):
    return {name: np.concatenate([batch[name] for batch in batches], axis=1) for name in LEAVES}


def test_a_batch_is_the_sequences_at_its_positions(dataset):
    batches = TrainBatches(dataset.train, batch_size=12, num_microbatches=3, seed=5)
    batch = batches.batch(7)
    for name, dtype in LEAVES.items():
        assert batch[name].shape == (3, 4, S)
        assert batch[name].dtype == dtype
    for microbatch in range(3):
        for row in range(4):
            index = batches.sequence_index(7 * 12 + microbatch * 4 + row)
            for name in LEAVES:
                np.testing.assert_array_equal(batch[name][microbatch, row], dataset.train[index][name])


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("step", [0, 11, 60])
def test_processes_read_the_same_global_batch(dataset, num_processes, step):
    settings = {"batch_size": 16, "num_microbatches": 2, "seed": 1}
    whole = TrainBatches(dataset.train, **settings).batch(step)
    share = 8 // num_processes
    slices = [slice(share * process, share * (process + 1)) for process in range(num_processes)]
    parts = [TrainBatches(dataset.train, rows=rows, **settings).batch(step) for rows in slices]
    assert_equal(concatenate(parts), whole)
    scattered = [list(range(process, 8, num_processes)) for process in range(num_processes)]
    parts = [TrainBatches(dataset.train, rows=rows, **settings).batch(step) for rows in scattered]
    order = np.argsort(np.concatenate(scattered))
    assert_equal({name: leaf[:, order] for name, leaf in concatenate(parts).items()}, whole)


def test_microbatches_do_not_change_the_batch(dataset):
    one, four = (TrainBatches(dataset.train, batch_size=8, num_microbatches=m).batch(3) for m in (1, 4))
    assert_equal({name: leaf.reshape(4, 2, S) for name, leaf in one.items()}, four)


def test_iteration_equals_random_access(dataset):
    batches = TrainBatches(dataset.train, batch_size=8, seed=2)
    for step, batch in zip(range(100), batches.iterate(), strict=False):
        assert_equal(batch, batches.batch(step))


def test_resuming_equals_going_on(dataset):
    def iterate(first_step):
        return TrainBatches(dataset.train, batch_size=8, seed=2).iterate(first_step)

    uninterrupted = iterate(0)
    before = [next(uninterrupted) for _ in range(20)]
    after = [next(uninterrupted) for _ in range(60)]
    for first_step, expected in ((0, before), (20, after)):
        resumed = iterate(first_step)
        for batch in expected:
            assert_equal(next(resumed), batch)


def test_every_epoch_reads_every_sequence_in_another_order(dataset):
    count = len(dataset.train)
    batches = TrainBatches(dataset.train, batch_size=1, seed=3)
    epochs = [[batches.sequence_index(epoch * count + i) for i in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches.epoch(count * 3) == 3.0


def test_neighbouring_seeds_share_no_epoch(dataset):
    count = len(dataset.train)
    orders = {
        tuple(batches.sequence_index(epoch * count + i) for i in range(count))
        for batches in (TrainBatches(dataset.train, batch_size=1, seed=seed) for seed in (0, 1, 2**40))
        for epoch in range(2)
    }
    assert len(orders) == 6


def test_the_order_is_fixed_for_ever():
    """A change of the shuffle, by us or by a new version of grain, would spoil every resumed run."""
    batches = TrainBatches(range(1000), batch_size=1, seed=0)
    positions = [0, 1, 2, 999, 1000, 1001]
    assert [batches.sequence_index(position) for position in positions] == [942, 994, 873, 495, 221, 523]


def test_validation_reads_everything_once_and_pads(dataset):
    batches = ValidationBatches(dataset.validation, batch_size=4, num_microbatches=2)
    assert len(batches) == -(-len(dataset.validation) // 4)
    assert len(dataset.validation) % 4, "the last batch must need padding for this test to mean something"
    rows = {name: np.concatenate([batch[name].reshape(4, S) for batch in batches]) for name in LEAVES}
    for index in range(len(dataset.validation)):
        for name in LEAVES:
            np.testing.assert_array_equal(rows[name][index], dataset.validation[index][name])
    assert rows["weights"].sum() == dataset.validation_targets
    assert not rows["segment_ids"][len(dataset.validation) :].any()
    assert (rows["tokens"][len(dataset.validation) :] == dataset.tokenizer.end_of_document).all()


def test_validation_by_processes(dataset):
    whole = ValidationBatches(dataset.validation, batch_size=8, num_microbatches=2)
    parts = [
        ValidationBatches(dataset.validation, batch_size=8, num_microbatches=2, rows=rows)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    for index in range(len(whole)):
        assert_equal(concatenate([part[index] for part in parts]), whole[index])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"batch_size": 0},
            "must be a positive multiple of num_microbatches, got 0 sequences in 1 microbatches",
        ),
        ({"batch_size": 8, "num_microbatches": 3}, "got 8 sequences in 3 microbatches"),
        ({"batch_size": 8, "num_microbatches": 0}, "got 8 sequences in 0 microbatches"),
        ({"batch_size": 8, "rows": [0, 8]}, "rows must lie in 0..7, got 0..8"),
        ({"batch_size": 8, "rows": slice(8, 9)}, "select none of the 8 rows of a microbatch"),
        ({"batch_size": 8, "rows": []}, "select none of the 8 rows"),
    ],
)
def test_errors(dataset, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainBatches(dataset.train, **settings)
    with pytest.raises(ValueError, match=sentence):
        ValidationBatches(dataset.validation, **settings)


def test_steps_and_batches_outside(dataset):
    with pytest.raises(ValueError, match="steps count from 0, got -1"):
        TrainBatches(dataset.train, batch_size=1).batch(-1)
    with pytest.raises(IndexError, match="validation batch 10000 of"):
        ValidationBatches(dataset.validation, batch_size=1)[10000]


def test_nothing_to_train_on():
    with pytest.raises(ValueError, match="there is no sequence to train on; give more text"):
        TrainBatches([], batch_size=1)
