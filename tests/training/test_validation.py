"""Tests of the validation against sums by hand."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from piperjax.planner.plan import Plan
from piperjax.training.config import DataConfig, LogConfig, TrainConfig
from piperjax.training.data import load_dataset
from piperjax.training.state import init_state, make_evaluate
from piperjax.training.validation import validate


@pytest.fixture
def config(bigram, tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    plan = Plan(
        pipe=1,
        data=2,
        expert=1,
        expert_factors=(1, 1, 1),
        schedule="gpipe",
        num_microbatches=2,
        layers_per_stage=(4,),
        batch_size=8,
        seq_len=32,
    )
    data = DataConfig(path=str(tmp_path / "a.txt"), seq_len=32, batch_size=8, validation_fraction=0.1)
    return TrainConfig(
        model=bigram.model(vocab_size=257), plan=plan, data=data, log=LogConfig(validation_batches=100)
    )


def dataset_of(config, tmp_path, **changes):
    data = dataclasses.replace(config.data, **changes)
    return load_dataset(
        data.path, seq_len=32, cache_dir=tmp_path / "cache", validation_fraction=data.validation_fraction
    )


def run(config, bigram, dataset):
    executor = bigram.executor(config.model)
    state = init_state(executor, 0)
    record = validate(config, executor, make_evaluate(executor), dataset=dataset, state=state, step=3)
    return record, jax.device_get(state.params)


def test_loss_is_the_mean_over_all_held_out_targets(config, bigram, tmp_path):
    dataset = dataset_of(config, tmp_path)
    record, params = run(config, bigram, dataset)
    total = count = 0.0
    for index in range(len(dataset.validation)):
        sequence = dataset.validation[index]
        logits = params["embedding"][sequence["tokens"]] @ params["head"].T
        entropy = np.log(np.exp(logits).sum(-1)) - logits[np.arange(32), sequence["targets"]]
        total += (entropy * sequence["weights"]).sum()
        count += sequence["weights"].sum()
    assert record["validation_tokens"] == count == dataset.validation_targets
    assert record["validation_loss"] == pytest.approx(total / count, rel=1e-5)
    assert record["bits_per_byte"] == pytest.approx(total / math.log(2) / dataset.validation_bytes, rel=1e-5)
    assert record["unigram_entropy"] == dataset.unigram_entropy and record["step"] == 3


def test_at_most_the_wished_batches_are_read(config, bigram, tmp_path):
    dataset = dataset_of(config, tmp_path)
    assert len(dataset.validation) > 8
    config = dataclasses.replace(config, log=LogConfig(validation_batches=1))
    record, _ = run(config, bigram, dataset)
    weights = sum(dataset.validation[index]["weights"].sum() for index in range(8))
    assert record["validation_tokens"] == weights


def test_without_held_out_text_there_is_nothing_to_say(config, bigram, tmp_path):
    record, _ = run(config, bigram, dataset_of(config, tmp_path, validation_fraction=0.0))
    assert record is None
