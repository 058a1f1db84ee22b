"""Scores: the quick price of a candidate is the full one, with stages divided by FLOP."""

import numpy as np
import pytest

from meshes.platform import load_platform
from models.presets import preset
from piperjax.planner.candidates import Question, Rejections, meshes
from piperjax.planner.cells import layers_by_flop, memory_backend
from piperjax.planner.memory import peak_memory
from piperjax.planner.network import DISPATCHERS
from piperjax.planner.scoring import capacity_bytes, score
from piperjax.planner.timing import estimate_time

CASES = {
    "mixtral": dict(model="mixtral_8x7b", platform="frontier", num_devices=64, batch_size=256, seq_len=4096),
    "dense prologue": dict(
        model="deepseek_v3",
        platform="h200_pod",
        num_devices=512,
        batch_size=2048,
        seq_len=4096,
        wished={"capacity_factor": 1.25},
        dispatchers=tuple(DISPATCHERS),
        imbalance=1.2,
    ),
    "shared cores": dict(
        model="small", platform="cpu8", num_devices=8, batch_size=32, seq_len=64, dtype="float32"
    ),
}


def scored(name):
    case = dict(CASES[name])
    case["model"], case["platform"] = preset(case["model"]), load_platform(case["platform"])
    question, rejections = Question(**case), Rejections()
    return score(question, meshes(question, rejections), rejections), rejections


@pytest.mark.parametrize("case", CASES)
def test_scores_are_the_full_price(case):
    scores, _ = scored(case)
    question = scores.question
    rows = np.random.default_rng(0).choice(len(scores.seconds), 60, replace=False)
    for row in rows:
        plan = scores.plan(int(row))
        time = estimate_time(question.model, plan, question.platform, question.conditions, clock="profile")
        assert scores.seconds[row] == pytest.approx(time.step_seconds, rel=1e-3)
        needed = peak_memory(
            question.model,
            plan,
            dtype=question.dtype,
            backend=memory_backend(question),
            reserve_bytes=question.platform.device.reserve_bytes,
        )
        # Slots of large schedules are extended, and rounded up in the full price.
        (num_bytes,) = scores.all_bytes([row])
        assert num_bytes == pytest.approx(needed, rel=0.01)
        if scores.is_least[row]:
            assert capacity_bytes(question) < scores.num_bytes[row] < needed
        else:
            assert scores.num_bytes[row] == num_bytes


def test_what_does_not_fit_is_counted():
    scores, rejections = scored("mixtral")
    (unfit,) = [r for r in rejections.listed() if r.reason == "a device must have room for the plan"]
    assert unfit.count == (~scores.fits).sum() > 0
    assert capacity_bytes(scores.question) == 64 * 2**30
    # The example is the one that lacks least.
    assert scores.is_least.sum() > 0
    least = scores.all_bytes(np.flatnonzero(~scores.fits)).min() / 2**30
    assert f"{least:.1f} of 64.0 GiB" in unfit.example


def test_every_plan_of_a_row_is_valid_and_rows_differ():
    scores, _ = scored("shared cores")
    plans = {repr(scores.plan(row)) for row in range(len(scores.seconds))}
    assert len(plans) == len(scores.seconds)
    assert not any(
        p.overlap and p.memory_mode == "stage" for p in map(scores.plan, range(len(scores.seconds)))
    )


def test_layers_are_divided_by_flop():
    model = preset("deepseek_v3")
    assert sum(layers_by_flop(model, 4096, 16)) == 61
    assert layers_by_flop(model, 4096, 61) == (1,) * 61
    # Three dense layers are cheaper than three of experts.
    assert layers_by_flop(model, 4096, 2)[0] >= 31
