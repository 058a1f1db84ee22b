"""Tests of the time model against published throughput, and of the command that compares them."""

import json
import math
import sys
from dataclasses import replace

import pytest

from benchmarks.frameworks import Run, Software, predict
from benchmarks.frontier import FORWARD, outcomes
from benchmarks.frontier_layers import PARTS, profiled_layer
from benchmarks.frontier_runs import (
    SCRIPTS,
    SYSTEMS,
    counted_flop,
    counted_layer_flop,
    moe_bytes_per_token,
)
from benchmarks.record import UnknownRowError, degrees, platform_of
from benchmarks.records import bridge_software, read
from benchmarks.validate import (
    GOLDEN,
    MEDIAN_ERROR,
    RANK_CORRELATION,
    evaluate,
    load,
    main,
    rank_correlation,
    report,
    summarise,
)
from meshes.platform import load_platform
from models import cost
from models.presets import preset
from piperjax.planner.network import Group, all_gather, all_to_all

ROWS = [line.row for line in load(GOLDEN)]
BRIDGE = next(row for row in ROWS if row.get("platform") == "gb200")


def test_every_platform_is_predicted_within_the_bar():
    results = evaluate(row for row in ROWS if "tflops" not in row and "oom" not in row)
    machines = {"a100", "b200", "b300", "gb200", "gb300", "h100", "h800", "mi355x"}
    assert {platform.split("_")[0] for platform in results.measured} == machines
    assert not results.left_out
    for platform, pairs in results.measured.items():
        error, correlation = summarise(pairs)
        assert error <= MEDIAN_ERROR, platform
        assert len(pairs) == 2 or correlation >= RANK_CORRELATION, platform


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


def test_weak_scaling_loses_what_was_published():
    """Sequences grow with devices, so that the efficiency of Piper on 1,024 of them, over 64, follows: 73 %."""
    rows = {row["gpus"]: row for row in ROWS if str(row.get("model", "")).startswith("piper-weak")}

    def rate(devices):
        found = next(o for o in outcomes(rows[devices]) if o.kind == "best division")
        return found.predicted

    assert rate(1024) / rate(64) == pytest.approx(33.04 / 45.15, abs=0.07)


def test_runs_of_x_moe_are_priced_as_their_scripts_have_them():
    rows = [row for row in ROWS if row.get("strategy") == "X-MoE" and "tflops" in row]
    assert len(rows) == len(SCRIPTS) == 5
    assert all(found.is_met for row in rows for found in outcomes(row) if found.kind == "known plan")
    medium = next(row for row in rows if row["model"] == "xmoe-medium")
    kinds = [o.kind for o in outcomes(medium)]
    assert kinds == ["fits", "known plan", "own, beside"]
    # Elsewhere it may have been divided in any way.
    for other in ({"gpus": 128}, {"seq": 2048}, {"recompute": "full"}):
        assert [o.kind for o in outcomes(medium | other)] == ["fits", "best division", "own planner"]
    # The fuller the busiest device, the longer; nothing was said of rows that say nothing.
    full, even = (
        next(o for o in outcomes({**medium, "cap_factor": factor}) if o.kind == "known plan")
        for factor in (medium["cap_factor"], None)
    )
    assert even.predicted > full.predicted
    run = SCRIPTS["X-MoE", "xmoe-medium", 256].run(preset("xmoe_medium"), medium, SYSTEMS["X-MoE"])
    attention = run.model.layers[0].attention
    assert (attention.num_heads, attention.head_dim, run.model.vocab_size) == (128, 40, 50_304)


def test_flop_of_frontier_are_counted_as_x_moe_does():
    """By hand, Small: 8 D^2 of projections, 4 S D of scores, 4 k D d_ff of experts, 2 V D of the head; no router."""
    model, S, D = preset("xmoe_small"), 2048, 2048
    layer = 8 * D**2 + 4 * S * D + 4 * 6 * D * 1408
    assert counted_layer_flop(model, model.layers[0], S) == layer
    assert counted_flop(model, S) == 3 * (28 * layer + 2 * model.vocab_size * D)


PROFILES = [row for row in ROWS if "forward_ms" in row]


def test_profiles_of_layers_are_predicted_within_the_bar(capsys):
    assert len(PROFILES) == 41
    results = evaluate(PROFILES)
    assert {o.kind for o in results.others} == {FORWARD} and not results.left_out
    error, correlation = summarise([(o, o.predicted) for o in results.others])
    assert error <= MEDIAN_ERROR and correlation >= RANK_CORRELATION
    assert report(results)
    printed = capsys.readouterr().out
    assert "bar 3 frontier forward  41 rows" in printed and "MISSED" not in printed


def test_profiles_that_are_wrong_are_missed(capsys):
    slow = [{**row, "forward_ms": {p: 2 * ms for p, ms in row["forward_ms"].items()}} for row in PROFILES]
    assert not report(evaluate(slow))
    assert "bar 3 frontier forward  41 rows" in capsys.readouterr().out


def test_parts_of_a_profile_by_hand():
    """Medium, one sequence: 2 T 3 D^2 of projections at 0.88 of 0.68 of the peak, smaller by shape."""
    row = next(row for row in PROFILES if row["hp"]["d"] == 5120 and row["microbatch"] == 1)
    profile = profiled_layer(row)
    ratios = dict(
        zip(PARTS, (float(part.rsplit(" ", 1)[1]) for part in profile.note.split(", ")), strict=True)
    )
    T, D = 4096, 5120
    shape = T / (T + 64) * (3 * D / (3 * D + 64)) * (D / (D + 64))
    seconds = 6 * T * D**2 / (0.88 * 0.68 * 191.5e12 * shape)
    expected = 1e3 * seconds / row["forward_ms"]["query_key_value"]
    assert ratios["query_key_value"] == pytest.approx(expected, abs=0.006)
    total = sum(ratios[part] * row["forward_ms"][part] for part in PARTS)
    assert profile.predicted == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hp": {"d": 5120}}, "the row has no field 'ff'"),
        ({"hp": None}, "has its shape in hp"),
        ({"forward_ms": {"experts": 1.0}}, "forward_ms must have query_key_value"),
        ({"gpus": 7}, "do not divide"),
        ({"hw": "TPU"}, "no platform file describes 'TPU'"),
        ({"microbatch": 0}, "microbatch must be a whole number"),
    ],
)
def test_profiles_that_cannot_be_priced_say_why(changes, reason):
    (left,) = evaluate([{**PROFILES[0], **changes}]).left_out
    assert reason in left.reason


def test_products_counts_and_reductions_of_a_framework():
    """Products take 1 / fraction of their time; counts one all-to-all forward; ZeRO-2 as many reductions."""
    options = dict(devices=64, expert=64, global_batch=256, platform=load_platform("frontier"))
    usual = Run(model=preset("xmoe_medium"), software=Software(reduction=1.0), **options)
    half = predict(replace(usual, software=usual.software._replace(products=0.5)))
    products = predict(usual).layer.dense + predict(usual).layer.experts
    more = half.step_seconds - predict(usual).step_seconds
    M = usual.num_microbatches
    assert M * products < more < 1.1 * M * products  # and those of the head
    layer = predict(replace(usual, software=usual.software._replace(counts=True))).layer
    counts = all_to_all(usual.platform, Group(64), 4 * 128).seconds
    assert layer.exchange_forward - predict(usual).layer.exchange_forward == pytest.approx(28 * counts)
    assert layer.exchange_backward == predict(usual).layer.exchange_backward
    once, twice, often = (predict(replace(usual, reductions=n)).step_seconds for n in (1, 2, M))
    assert often - once == pytest.approx((M - 1) * (twice - once))


def test_what_stands_beside_a_known_plan_is_not_judged(capsys):
    row = next(row for row in ROWS if row.get("strategy") == "X-MoE" and row.get("model") == "xmoe-medium")
    assert report(evaluate([row]))  # our own plan is twice as fast
    printed = capsys.readouterr().out
    assert "own, beside" in printed and "MISSED" not in printed
    assert "bar 3 frontier own, beside" not in printed


def test_reduction_that_nothing_hides_is_gathering_twice():
    usual = Run(
        model=preset("xmoe_medium"),
        platform=load_platform("frontier"),
        software=Software(),
        devices=64,
        expert=8,
        global_batch=64,
    )
    seconds = [
        predict(replace(usual, software=Software(reduction=part))).step_seconds for part in (1, 0.5, 0.25)
    ]
    more = 2 * (seconds[0] - seconds[1])
    assert more == pytest.approx(4 * (seconds[1] - seconds[2]))
    # All parameters outside of experts among all devices, a device's experts among every eighth, in 16 bits.
    counted = cost.parameters(usual.model)
    sizes = {Group(64): counted.total - counted.experts, Group(8, 8, 64): counted.experts / 8}
    once = sum(all_gather(usual.platform, group, 2 * size).seconds for group, size in sizes.items())
    assert more == pytest.approx(2 * once)


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
        ({"devices": "many"}, "devices must be a whole number of at least 1"),
        ({"tokens_per_second_per_device": None}, "must be a positive number, got None"),
    ],
)
def test_rows_that_cannot_be_priced_say_why(changes, reason):
    with pytest.raises(UnknownRowError, match=reason):
        read({**BRIDGE, **changes})
    (left,) = evaluate([{**BRIDGE, **changes}]).left_out
    assert reason in left.reason


@pytest.mark.parametrize(
    "row", [[], "text", {}, {"src": "Piper"}, {"src": "X-MoE", "model": "xmoe-small"}, None]
)
def test_anything_else_is_skipped(row):
    results = evaluate([row])
    assert not results.measured and not results.others
    assert len(results.left_out) == 1


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
    assert platform_of("Frontier MI250X GCD 64GB").name == platform_of("MI250X").name == "frontier"
    assert platform_of("LUMI, MI250X").name == "lumi_g"
    assert platform_of("Perlmutter, A100 of 40 GB").name == "perlmutter"


def test_a_run_by_its_laws():
    """The bubble is (P - 1) / (v M) of the work, and twice the tokens are the same rate without a pipeline."""

    def run(**changes):
        options = dict(devices=64, expert=8, global_batch=512, software=Software())
        return Run(model=preset("mixtral_8x22b"), platform=load_platform("h100_pod"), **options | changes)

    pipelined = predict(run(pipe=2, virtual=2, global_batch=512))
    M = run(pipe=2, global_batch=512).num_microbatches
    assert pipelined.bubble_fraction == pytest.approx(1 / 2 / (M + 1 / 2), rel=0.05)
    once, twice = (predict(run(global_batch=batch)).tokens_per_second for batch in (2048, 4096))
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
        and "left out 1 of gb200_nvl72: no model named 'm' is described: row:2" in printed
        and "met; 1 left out: 1 no model named 'm' is described" in printed
    )


def test_files_that_cannot_be_read_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*nowhere.jsonl"):
        load(tmp_path / "nowhere.jsonl")
    text = tmp_path / "text.jsonl"
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read .*text.jsonl: it is not text"):
        load(text)


def test_lines_that_are_not_json_are_left_out(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\ufeff" + json.dumps(BRIDGE) + '\n\nnot json\n{"a": "\u2028"}\n', encoding="utf-8")
    results = evaluate(load(broken))
    assert sum(map(len, results.measured.values())) == 1
    assert [left.place for left in results.left_out] == ["broken.jsonl:3", "broken.jsonl:4"]
    assert results.left_out[0].reason == "not a JSON object"


@pytest.mark.parametrize("text", ["", "\n\n", "[]\n", '{"model": "m"}\n'])
def test_nothing_to_predict_is_status_2(tmp_path, capsys, monkeypatch, text):
    file = tmp_path / "file.jsonl"
    file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["validate", str(file)])
    assert main() == 2
    assert "nothing could be predicted" in capsys.readouterr().err


def test_rows_left_out_are_listed_by_reason(capsys):
    nobody = {**BRIDGE, "model": "m"}
    report(evaluate([BRIDGE, nobody, nobody | {"seq": 1}, nobody | {"seq": 2}, None, nobody | {"seq": 3}, 5]))
    printed = capsys.readouterr().out
    assert "left out 4 of gb200_nvl72: no model named 'm' is described: row:2-4, row:6" in printed
    assert "left out 2 of no known platform: not a JSON object: row:5, row:7" in printed
    assert "no known platform: 2 left out: 2 not a JSON object" in printed


def test_status_says_whether_bars_are_met(tmp_path, capsys, monkeypatch):
    file = tmp_path / "file.jsonl"
    monkeypatch.setattr(sys, "argv", ["validate", str(file)])
    for factor, status in ((1, 0), (5, 1)):
        rate = factor * BRIDGE["tokens_per_second_per_device"]
        file.write_text(json.dumps({**BRIDGE, "tokens_per_second_per_device": rate}))
        assert main() == status


def test_the_same_row_counts_once():
    results = evaluate([BRIDGE, dict(reversed(BRIDGE.items()))])
    assert sum(map(len, results.measured.values())) == 1
    assert [left.reason for left in results.left_out] == ["the same as a row before it"]


FOLDING = next(row for row in ROWS if "mfu" in row)
PRIMUS = next(row for row in ROWS if row.get("variant") == "+sync-free" and "gbs" not in row)
OF_PIPER = next(row for row in ROWS if row.get("scope"))
OF_X_MOE = next(row for row in ROWS if row.get("oom"))


@pytest.mark.parametrize("row", [BRIDGE, FOLDING, PRIMUS, OF_PIPER, OF_X_MOE, PROFILES[0]])
def test_every_field_may_be_anything(row):
    """Missing, null, or of another kind: a row is predicted or left out with a sentence."""
    for name in row:
        for value in (None, "x PP0", -1, 0.5, 7, True, [], {}, float("nan"), 10**30):
            results = evaluate([{**row, name: value}])
            assert len(results.left_out) <= 1
            for left in results.left_out:
                words = ("NoneType", "object", "operand", "instances", "argument")
                assert not any(word in left.reason for word in words), (name, value, left.reason)
            for pairs in results.measured.values():
                assert all(math.isfinite(predicted) for _, predicted in pairs), (name, value)
            assert results.left_out or results.measured or results.others, (name, value)
        missing = evaluate([{key: value for key, value in row.items() if key != name}])
        assert missing.left_out or missing.measured or missing.others


def test_frameworks_and_releases_that_were_not_seen_are_in_the_middle():
    slow, fast = (predict(read({**BRIDGE, "source": f"Bridge, {r}"}).run) for r in ("25.11", "26.06"))
    for source in ("NVIDIA Megatron-Bridge performance pages", "torchtitan, 26.06", ""):
        record = read({**BRIDGE, "source": source})
        assert "no known framework or release" in record.label
        assert slow.tokens_per_second < predict(record.run).tokens_per_second < fast.tokens_per_second
    other = read({**PRIMUS, "src": "MaxText", "mbs": 2, "gbs": 128})
    assert predict(other.run).tokens_per_second < predict(read(PRIMUS).run).tokens_per_second
    assert read({**FOLDING, "src": "another paper"}).published == pytest.approx(read(FOLDING).published)


def test_variants_that_were_not_seen_have_what_they_name():
    named = read({**PRIMUS, "variant": "DeepEP and sync-free on top"}).run.software
    assert named == read(PRIMUS).run.software
    assert (
        read({**PRIMUS, "variant": "tuned"}).run.software
        == read({**PRIMUS, "variant": "baseline"}).run.software
    )
    assert read({**PRIMUS, "model": "mixtral-8x7b"}).run.software == read(PRIMUS).run.software


@pytest.mark.parametrize("platform", ["H200", "MI300X 192GB", "MI355X", "B200", "LUMI-G MI250X", "h100_pod"])
@pytest.mark.parametrize("precision", ["bf16", "FP16", "MXFP8", "fp8", None])
def test_platforms_and_precisions_that_were_not_seen(platform, precision):
    row = {**BRIDGE, "platform": platform, "precision": precision, "model": "qwen3-30b-a3b", "devices": 8}
    row |= {"pipe": 1, "virtual": 1, "expert": 8, "microbatch": 2, "global_batch": 64, "seq": 8192}
    results = evaluate([row])
    if "MI250X" in platform and "8" in str(precision):
        assert results.left_out[0].reason == f"precision {precision!r} is not described for lumi_g"
    else:
        (pairs,) = results.measured.values()
        assert 0 < pairs[0][1] < 1e5


def test_one_device_is_predicted():
    row = {**BRIDGE, "model": "olmoe-1b-7b", "devices": 1, "expert": 1, "pipe": 1, "virtual": 1}
    assert evaluate([row | {"microbatch": 1, "global_batch": 8}]).measured


def test_what_ran_out_of_memory_says_so():
    row = {**BRIDGE, "tokens_per_second_per_device": None, "oom": True}
    assert "it ran out of memory" in evaluate([row]).left_out[0].reason
