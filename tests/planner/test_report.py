"""Reports: every number of the table is that of the plan, bars and shares add up, JSON is complete."""

import json
from functools import lru_cache

import pytest

from meshes.platform import load_platform
from models.presets import preset
from piperjax.planner import report
from piperjax.planner.explain import explain, variations
from piperjax.planner.plan import Plan
from piperjax.planner.search import search


@lru_cache(maxsize=1)
def found():
    return search(preset("mixtral_8x7b"), load_platform("frontier"), 64, batch_size=256, seq_len=4096)


@lru_cache(maxsize=1)
def deepseek():
    return search(preset("deepseek_v3"), load_platform("frontier"), 1536, batch_size=6144, seq_len=4096)


def test_the_headline_says_what_was_asked():
    lines = report.headline(found().question).split("\n")
    assert lines[0].startswith(
        "mixtral_8x7b (46.7B parameters, 12.9B active) on 64 devices of frontier: Frontier"
    )
    assert lines[1] == "256 sequences x 4,096 = 1.05M tokens per step, bfloat16, expert load 1 x even"


def test_the_table_has_a_row_per_mesh():
    head, *rows = report.table(found(), top=3).split("\n")
    assert len(rows) == 3
    for name in (
        "pipe",
        "expert",
        "schedule",
        "memory",
        "GiB of 64",
        "step s",
        "MFU",
        "bubble",
        "a2a",
        "slower by",
    ):
        assert name in head
    best = found().best
    assert f" {best.plan.capacity_factor or 'all'} " in rows[0] and head.index("places") < head.index(
        "vocab."
    )
    assert f"{best.time.step_seconds:.4g}" in rows[0] and f"{best.time.mfu:.1%}" in rows[0]
    assert rows[0].endswith(" -") and rows[1].endswith(f"{found().ranked[1].margin:.1%}")


def test_details_add_up():
    text = report.details(found().best, found().question)
    memory, time = text.split("time of a step")
    assert f"memory of a device: {found().best.peak_bytes / 2**30:.1f} GiB of 64.0" in memory
    for part in (memory, time):
        shares = [
            float(line.split("%")[0].split()[-1]) for line in part.splitlines() if line.startswith("  ")
        ]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        points = {line.index(".") for line in part.splitlines() if line.startswith("  ")}
        assert len(points) == 1, "points of numbers below each other"


def test_choices_rejections_and_reasons_are_printed():
    text = report.choices(variations(found()))
    assert "memory mode" in text and "does not fit" in text
    text = report.explained(explain(found(), {"pipe": 16, "expert": 4}))
    assert text.startswith("pipe=16, expert=4: its best plan takes") and "difference" in text
    text = report.rejected(found())
    assert " plans on 21 meshes were priced" in text and "the expert axis must divide the 8 experts" in text


def test_every_plan_that_was_priced_fits_or_is_among_those_left_out():
    # Mixtral gets smaller buffers because they are quicker, DeepSeek because nothing fits otherwise.
    for result in (found(), deepseek()):
        (left,) = [one for one in result.rejected if one.reason == "a device must have room for the plan"]
        assert result.num_plans == result.num_fit + left.count


def test_notes_name_the_source_of_every_rate_and_what_was_given_up():
    notes = "\n".join(report.notes(found()))
    for name in ("package", "cabinet", "matmul", "attention"):
        assert name in notes
    notes = "\n".join(report.notes(deepseek()))
    assert "nothing fits with buffers for any routing, hence capacity factor 1.5" in notes
    assert "more travel in later passes" in notes
    assert "latent attention, which is priced but not yet a layer that trains" in notes
    assert "share the cores" not in notes
    simulated = search(preset("tiny"), load_platform("cpu8"), 8, batch_size=8, seq_len=64, wished={"pipe": 2})
    assert "devices of cpu8 are simulated and share the cores of one host" in "\n".join(
        report.notes(simulated)
    )


def test_json_holds_plans_that_can_be_read_again():
    explanations = [explain(found(), {"pipe": 1, "expert": 1}), explain(found(), {"pipe": 16, "expert": 4})]
    content = json.loads(json.dumps(report.to_dict(found(), explanations, variations(found()))))
    plan = Plan.from_dict(content["ranked"][0]["plan"])
    assert plan == found().best.plan
    assert sum(content["ranked"][0]["time"]["parts"].values()) == pytest.approx(
        found().best.time.step_seconds
    )
    assert sum(content["ranked"][0]["memory_bytes"].values()) == pytest.approx(found().best.peak_bytes)
    assert content["explained"][0]["plan"] is None and content["explained"][0]["parts"] == []
    parts, slower = content["explained"][1]["parts"], content["explained"][1]["plan"]["time"]["step_seconds"]
    assert sum(part["seconds"] for part in parts) == pytest.approx(slower)
    assert {one["choice"] for one in content["choices"]} >= {
        "schedule",
        "microbatches",
        "memory mode",
        "gradients",
    }
    assert content["num_meshes"] == 21 and content["given_up"] == []
    assert len(content["pareto"]) == len(found().pareto)


def test_differences_have_a_sign_unless_there_are_none():
    assert report.difference(1.0, 1.5) == "+0.5 s" and report.difference(1.5, 1.0) == "-0.5 s"
    assert report.difference(0.0, 0.0) == report.difference(1.0, 1.0 + 1e-12) == "0 s"


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (1050, "1.05k"), (16.8e6, "16.8M"), (671e9, "671B"), (1.7e12, "1.7T")]
)
def test_numbers_are_short(number, text):
    assert report.short(number) == text
