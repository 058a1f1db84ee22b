"""Tests of the time model against published throughput, and of the command that compares them."""

import json

import pytest

from benchmarks.frameworks import Run, Software, predict
from benchmarks.frontier import SYSTEMS, moe_bytes_per_token
from benchmarks.records import UnknownRowError, bridge_software, degrees, platform_of, read
from benchmarks.validate import (
    GOLDEN,
    MEDIAN_ERROR,
    RANK_CORRELATION,
    evaluate,
    load,
    rank_correlation,
    report,
    summarise,
)
from meshes.platform import load_platform
from models.presets import preset

ROWS = load(GOLDEN)
BRIDGE = next(row for row in ROWS if row.get("platform") == "gb200")


def test_every_platform_is_predicted_within_the_bar():
    results = evaluate(row for row in ROWS if "tflops" not in row and "oom" not in row)
    assert set(results.measured) == {"gb200_nvl72", "gb300_nvl72", "h100_pod", "mi355x_node"}
    assert not results.skipped
    for platform, pairs in results.measured.items():
        error, correlation = summarise(pairs)
        assert error <= MEDIAN_ERROR, platform
        assert correlation >= RANK_CORRELATION, platform


def test_single_layers_and_memory_of_frontier():
    rows = [row for row in ROWS if "oom" in row or "scope" in row or "activation_per_moe_layer_gb" in row]
    results = evaluate(rows)
    assert {outcome.kind for outcome in results.others} == {"fits", "layer", "memory"}
    assert all(outcome.is_met for outcome in results.others)


def test_memory_of_a_layer_is_what_x_moe_publishes():
    """Table 4 of X-MoE in GiB: X-MoE Large, 4,096 tokens."""
    model = preset("xmoe_large")
    kept = {name: 4096 * moe_bytes_per_token(model, system, 4096) / 2**30 for name, system in SYSTEMS.items()}
    assert kept["DeepSpeed-MoE"] == pytest.approx(2.81, abs=0.01)
    assert kept["Tutel"] == pytest.approx(1.95, abs=0.01)
    assert kept["theory"] == pytest.approx(1.125)


def test_without_releases_rows_of_the_same_run_are_alike():
    rows = [row for row in ROWS if row.get("platform") == "gb300" and row["model"] == "qwen3-30b-a3b"]
    one = evaluate([row for row in rows if row["microbatch"] == 8], one_release=True).measured["gb300_nvl72"]
    assert len({value for _, value in one}) == 1
    assert len(one) > 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "gpt-unknown"}, "no model named 'gpt-unknown'"),
        ({"platform": "tpu"}, "no platform file describes 'tpu'"),
        ({"precision": "NVFP4"}, "precision 'NVFP4' is not described"),
        ({"expert": 48}, "do not divide by expert 48"),
        ({"global_batch": 3}, "does not divide into microbatches"),
        ({"devices": "many"}, "devices must be a whole number of at least 1, got 'many'"),
        ({"tokens_per_second_per_device": None}, "must be a positive number, got None"),
    ],
)
def test_rows_that_cannot_be_priced_say_why(changes, reason):
    with pytest.raises(UnknownRowError, match=reason):
        read({**BRIDGE, **changes})
    assert sum(evaluate([{**BRIDGE, **changes}]).skipped.values()) == 1


@pytest.mark.parametrize(
    "row", [[], "text", {}, {"src": "Piper"}, {"src": "X-MoE", "model": "xmoe-small"}, None]
)
def test_anything_else_is_skipped(row):
    results = evaluate([row])
    assert not results.measured and not results.others
    assert sum(results.skipped.values()) == 1


def test_fields_may_be_missing():
    row = {
        key: value for key, value in BRIDGE.items() if key not in ("context", "tensor", "virtual", "variant")
    }
    assert read(row).run.tensor == 1
    with pytest.raises(UnknownRowError, match="no field 'microbatch'"):
        read({key: value for key, value in BRIDGE.items() if key != "microbatch"})


def test_releases_are_the_last_known_before():
    assert bridge_software("26.02", "gb200_nvl72") == bridge_software("26.03", "gb200_nvl72")
    assert bridge_software("27.01", "gb200_nvl72").streams < bridge_software("25.11", "gb200_nvl72").streams
    assert bridge_software("25.01", "gb200_nvl72") == bridge_software("25.11", "gb200_nvl72")
    assert bridge_software("26.08", "h100_pod") == bridge_software("26.04", "h100_pod")


def test_names_in_rows():
    assert degrees("TP2 EP8 PP8 ETP1") == {"TP": 2, "EP": 8, "PP": 8, "ETP": 1}
    assert platform_of("H100-80 SXM, NVLink4, 400G IB").name == "h100_pod"
    assert platform_of("Frontier MI250X GCD 64GB").name == "frontier"


def test_a_run_by_its_laws():
    """The bubble is (P - 1) / (v M) of the work, and twice the tokens are the same rate without a pipeline."""

    def run(**changes):
        options = dict(devices=64, expert=8, global_batch=512, software=Software())
        return Run(model=preset("qwen3_235b_a22b"), platform=load_platform("h100_pod"), **options | changes)

    pipelined = predict(run(pipe=2, virtual=2, global_batch=512))
    M = run(pipe=2, global_batch=512).num_microbatches
    assert pipelined.bubble_fraction == pytest.approx(1 / 2 / (M + 1 / 2), rel=0.05)
    once, twice = (predict(run(global_batch=batch)).tokens_per_second for batch in (512, 1024))
    assert once == pytest.approx(twice, rel=0.01)


def test_experts_divided_by_the_tensor_axis_cost_exchanges():
    """As much to multiply, in thinner products, and every row gathered and summed once more."""

    def run(**changes):
        options = dict(devices=128, tensor=4, pipe=8, expert=4, global_batch=256, software=Software())
        return Run(model=preset("mixtral_8x22b"), platform=load_platform("h100_pod"), **options | changes)

    whole, divided = (predict(run(expert_tensor=shared)).layer for shared in (1, 4))
    assert divided.experts == pytest.approx(whole.experts, rel=0.15)
    assert divided.exchange_forward > 1.5 * whole.exchange_forward
    assert divided.dense == whole.dense


def test_gathered_parameters_cost_what_travels():
    """Three times every microbatch, so that more microbatches of fewer tokens are slower."""

    def run(**changes):
        options = dict(devices=64, expert=8, global_batch=256, software=Software())
        return Run(model=preset("qwen2_57b_a14b"), platform=load_platform("h100_pod"), **options | changes)

    plain, once, often = (
        predict(run(gathers_parameters=gathers, microbatch=size)).tokens_per_second
        for gathers, size in ((False, 4), (True, 4), (True, 1))
    )
    assert plain > once > 1.5 * often


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)


def test_report_prints_every_row(capsys):
    assert report(evaluate([BRIDGE, {**BRIDGE, "model": "m"}]))
    printed = capsys.readouterr().out
    assert (
        "deepseek-v3" in printed
        and "bar 3 gb200_nvl72" in printed
        and "skipped 1: no model named 'm'" in printed
    )


def test_files_that_cannot_be_read_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*nowhere.jsonl"):
        load(tmp_path / "nowhere.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(BRIDGE) + "\nnot json\n")
    with pytest.raises(ValueError, match="broken.jsonl, line 2, is not JSON"):
        load(broken)
