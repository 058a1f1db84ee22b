"""Published rows of dense models and of DeepSeek-V3's cluster: what they ran, how well it is predicted, mistakes."""

from pathlib import Path

import pytest

import benchmarks
from benchmarks import records_dense
from benchmarks.record import UnknownRowError
from benchmarks.records import read
from benchmarks.validate import GOLDEN, MEDIAN_ERROR, RANK_CORRELATION, evaluate, load, summarise
from models import cost

DENSE = Path(benchmarks.__file__).parent / "published_dense.jsonl"
ROWS = [line.row for line in load(DENSE)]
BUBBLES = [line.row for line in load(GOLDEN) if "2401.10241" in line.row.get("src", "")]
FOUNDRY = next(row for row in ROWS if row["model"] == "mpt-7b")
MEGATRON = next(row for row in ROWS if row["model"] == "megatron-175b")


def test_dense_models_are_predicted_within_the_bar():
    results = evaluate(ROWS)
    assert {name: len(pairs) for name, pairs in results.measured.items()} == {"a100_pod": 69, "h100_pod": 52}
    assert not results.left_out
    for pairs in results.measured.values():
        error, correlation = summarise(pairs)
        assert error <= MEDIAN_ERROR
        assert correlation >= RANK_CORRELATION


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt-6.2b", 6.2),
        ("gpt-14.6b", 14.6),
        ("gpt-28.3b", 28.3),
        ("mpt-7b", 6.66),
        ("mpt-70b", 64.9),
        ("megatron-1t", 1008),
    ],
)
def test_models_are_as_large_as_published(name, billions):
    """With one matrix for words, which head and embedding share; MPT has positions of its own besides."""
    model = records_dense.gpt(name)
    counted = cost.parameters(model)
    once = counted.total - counted.head
    assert once / 1e9 == pytest.approx(billions, rel=0.03)


def test_zero_bubble_has_a_stage_a_layer_with_embedding_and_head():
    row = next(row for row in BUBBLES if row["model"] == "gpt-28.3B" and row["schedule"] == "1F1B-I")
    run = read(row).run
    assert (run.pipe, run.virtual, run.num_microbatches, run.tokens) == (32, 2, row["microbatches"], 1024)
    assert run.pipe * run.virtual == run.model.num_layers + 2


def test_less_waits_in_the_order_that_was_measured():
    by_schedule = {
        row["schedule"]: evaluate([row]).measured["a100_pod"][0][1]
        for row in BUBBLES
        if row["model"] == "gpt-14.6B" and row["microbatches"] == 48
    }
    assert by_schedule["ZB-2p"] > by_schedule["ZB-1p"] > by_schedule["1F1B-I"] > by_schedule["1F1B"]


def test_recomputation_and_degrees_of_megatron():
    run = read(MEGATRON).run
    assert (run.tensor, run.pipe, run.virtual, run.num_microbatches) == (8, 8, 3, 64)
    assert run.memory_mode == "layer"
    assert read({**MEGATRON, "recompute": "attention"}).run.memory_mode == "products"


def test_rates_of_a_row_by_hand():
    """Tokens of a step over its seconds and devices."""
    assert read(MEGATRON).published == pytest.approx(64 * 2048 / 64 / MEGATRON["step_s"])
    row = BUBBLES[0]
    assert read(row).published == pytest.approx(1024 * row["samples_per_gpu_s"])


@pytest.mark.parametrize(
    ("row", "changes", "reason"),
    [
        (FOUNDRY, {"model": "mpt-8b"}, "no model named 'mpt-8b'"),
        (FOUNDRY, {"recompute": "some"}, "recompute must be one of none, layers, attention"),
        (FOUNDRY, {"hw": "H200"}, "attention of llm-foundry on h200_pod"),
        (FOUNDRY, {"tok_s_gpu": 0}, "must be a positive number"),
        (MEGATRON, {"step_s": "fast"}, "must be a positive number"),
        (BUBBLES[0], {"schedule": "chimera"}, "schedule 'chimera' is not one of 1F1B"),
        (BUBBLES[0], {"hw": "V100"}, "no platform file describes 'V100'"),
        (BUBBLES[0], {"par": "PP9"}, "do not divide by"),
        (BUBBLES[0], {"model": "mpt-7b"}, "a microbatch of 'mpt-7b'"),
    ],
)
def test_rows_that_cannot_be_priced_say_why(row, changes, reason):
    with pytest.raises(UnknownRowError, match=reason):
        read({**row, **changes})
