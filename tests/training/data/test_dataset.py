"""The split, the figures that losses are compared with, and the default corpus."""

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest

from piperjax.training.data import dataset as dataset_module
from piperjax.training.data import load_dataset, unigram_entropy
from piperjax.training.data.tokenizer import ByteTokenizer


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def load(tmp_path, data, **settings):
    return load_dataset(data, cache_dir=tmp_path / "cache", **({"seq_len": 16} | settings))


def texts_of(sequences):
    """Returns the documents, or parts of documents, of a split."""
    stops = sequences._starts + (sequences._ends - sequences._begins)
    return sorted(
        ByteTokenizer().decode(sequences.store.tokens(np.arange(start, stop)))
        for start, stop in zip(sequences._starts, stops, strict=True)
    )


TEXTS = [f"document {number} says {'word ' * (number % 7)}" for number in range(400)]


def test_whole_documents_are_held_out_and_none_is_lost(tmp_path):
    dataset = load(tmp_path, write(tmp_path / "a.jsonl", TEXTS), validation_fraction=0.1)
    train, validation = texts_of(dataset.train), texts_of(dataset.validation)
    assert sorted(train + validation) == sorted(TEXTS)
    assert 20 <= len(validation) <= 65


def test_a_document_stays_on_its_side(tmp_path):
    some = load(tmp_path, write(tmp_path / "a.jsonl", TEXTS[100:]), validation_fraction=0.1)
    more = load(tmp_path, write(tmp_path / "b.jsonl", [*TEXTS, *TEXTS[:50]]), validation_fraction=0.1)
    assert set(texts_of(some.validation)) <= set(texts_of(more.validation))
    assert not set(texts_of(more.train)) & set(texts_of(more.validation))


def test_the_end_of_a_lone_document_is_held_out(tmp_path):
    text = "".join(map(str, range(1000)))
    (tmp_path / "a.txt").write_text(text)
    dataset = load(tmp_path, str(tmp_path / "a.txt"), validation_fraction=0.1)
    (train,), (validation,) = texts_of(dataset.train), texts_of(dataset.validation)
    assert train + validation == text
    assert len(validation) == pytest.approx(0.1 * len(text), abs=2)
    assert dataset.bytes_per_token == pytest.approx(1.0, rel=0.01)


def test_one_huge_document_among_small_ones_is_cut(tmp_path):
    texts = ["x" * 100_000, *TEXTS[:50]]
    dataset = load(tmp_path, write(tmp_path / "a.jsonl", texts), validation_fraction=0.05)
    held_out = dataset.validation.num_tokens / dataset.store.num_tokens
    assert 0.0125 <= held_out <= 0.2


def test_nothing_held_out(tmp_path):
    dataset = load(tmp_path, write(tmp_path / "a.jsonl", TEXTS), validation_fraction=0.0)
    assert len(dataset.validation) == 0
    assert texts_of(dataset.train) == sorted(TEXTS)
    assert math.isnan(dataset.bytes_per_token)
    with pytest.raises(
        ValueError, match="unigram entropy is measured on held-out text, but none is held out"
    ):
        unigram_entropy(dataset)


def test_unigram_entropy_by_hand(tmp_path):
    (tmp_path / "a.txt").write_text("aaab" * 50)
    dataset = load(tmp_path, str(tmp_path / "a.txt"), validation_fraction=0.5)
    # 201 tokens: the first 101 are trained on (76 a, 25 b), 100 held out. The first of those, an "a", is no
    # target: 73 a, 25 b and the end of the document are. One count is added to each of the 257 tokens.
    assert texts_of(dataset.train) == ["aaab" * 25 + "a"]
    nats = -(73 * math.log(77 / 358) + 25 * math.log(26 / 358) + math.log(1 / 358)) / 99
    assert dataset.unigram_entropy == pytest.approx(nats, rel=1e-12)


def test_unigram_entropy_is_the_loss_of_the_unigram_model(tmp_path):
    """The mean over what the validation batches weigh, not only over what was counted."""
    dataset = load(tmp_path, write(tmp_path / "a.jsonl", TEXTS), validation_fraction=0.2)
    counts = dataset.train.token_counts() + 1.0
    log_p = np.log(counts / counts.sum())
    sequences = [dataset.validation[index] for index in range(len(dataset.validation))]
    loss = -sum((log_p[sequence["targets"]] * sequence["weights"]).sum() for sequence in sequences)
    targets = sum(sequence["weights"].sum() for sequence in sequences)
    assert targets == dataset.validation_targets
    assert dataset.unigram_entropy == pytest.approx(loss / targets, rel=1e-12)


def test_bytes_per_token_counts_what_is_predicted(tmp_path):
    dataset = load(tmp_path, write(tmp_path / "a.jsonl", TEXTS), validation_fraction=0.2)
    assert dataset.bytes_per_token == 1.0


def test_the_description_is_one_line(tmp_path):
    data = write(tmp_path / "a.jsonl", TEXTS)
    line = load(tmp_path, data).describe()
    assert line.startswith(f"{data}: 400 documents, ")
    assert f"validation sequences of 16; cache {tmp_path / 'cache'}/" in line
    assert "\n" not in line


def test_the_fingerprint_tells_content_apart(tmp_path):
    data = write(tmp_path / "a.jsonl", TEXTS)
    fingerprints = {
        load(tmp_path, data).fingerprint,
        load(tmp_path, data, seq_len=32).fingerprint,
        load(tmp_path, data, validation_fraction=0.3).fingerprint,
        load(tmp_path, write(tmp_path / "b.jsonl", TEXTS[1:])).fingerprint,
    }
    assert len(fingerprints) == 4
    assert load(tmp_path, write(tmp_path / "c.jsonl", TEXTS)).fingerprint in fingerprints


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"validation_fraction": 1.0}, "must be at least 0 and less than 1, got 1.0"),
        ({"validation_fraction": -0.1}, "must be at least 0 and less than 1, got -0.1"),
        (
            {"seq_len": 100_000},
            r"has \d+ tokens to train on, too few for one sequence of 100000 and the token",
        ),
        ({"seq_len": 0}, "a sequence must hold at least one token, got seq_len = 0"),
    ],
)
def test_errors(tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path, write(tmp_path / "a.jsonl", TEXTS), **settings)


def test_the_default_corpus_is_ready_in_seconds(tmp_path):
    start = time.perf_counter()
    dataset = load_dataset(seq_len=512, cache_dir=tmp_path)
    dataset.train[0]
    assert time.perf_counter() - start < 10
    assert len(dataset.train) > 4000
    held_out = dataset.validation.num_tokens / dataset.store.num_tokens
    assert dataset_module.VALIDATION_FRACTION / 4 <= held_out <= dataset_module.VALIDATION_FRACTION * 4
    assert 2.5 < dataset.unigram_entropy < math.log(257)


def test_importing_the_package_is_light():
    check = (
        "import sys, piperjax.training.data\n"
        "heavy = {'jax', 'grain', 'pyarrow', 'tokenizers', 'zstandard'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", check], cwd=dataset_module.__file__.split("/piperjax/")[0], check=True
    )
