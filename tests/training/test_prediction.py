"""Tests of what is expected of a run, and of the sentence that compares."""

import dataclasses
import json

import pytest

from meshes.platform import Platform, load_platform
from models.presets import preset
from piperjax.planner.memory import RankMemory, estimate_memory
from piperjax.planner.plan import default_plan
from piperjax.planner.timing import estimate_time
from piperjax.runtime.compiled import CompiledMemory, CompiledWork
from piperjax.training.compile_check import Comparison
from piperjax.training.config import TrainConfig
from piperjax.training.prediction import Prediction, compiled_lines, predict, verdict

FRONTIER = load_platform("frontier")


@pytest.fixture
def config():
    model = preset("tiny")
    plan = default_plan(model, FRONTIER, 8, batch_size=16, seq_len=128, pipe=2, expert=4)
    return TrainConfig(model=model, plan=plan, dtype="bfloat16")


def test_it_is_what_the_planner_estimates(config):
    found = predict(config, FRONTIER, backend="gpu")
    memory = estimate_memory(
        config.model, config.plan, dtype="bfloat16", reserve_bytes=FRONTIER.device.reserve_bytes
    )
    assert found.total_bytes == max(rank.total for rank in memory)
    assert found.capacity_bytes == FRONTIER.device.memory_bytes
    time = estimate_time(config.model, config.plan, FRONTIER)
    assert found.step_seconds == time.step_seconds == pytest.approx(sum(found.parts.values()))
    assert found.uncertainty_fraction == time.uncertainty_fraction
    assert json.loads(json.dumps(found.to_dict()))["step_seconds"] == time.step_seconds


def test_without_rates_there_is_memory_but_no_time(config):
    device = dataclasses.replace(FRONTIER.device, matmul=None)
    found = predict(config, dataclasses.replace(FRONTIER, device=device), backend="gpu")
    assert found.total_bytes > 0 and found.step_seconds is None and found.time_line() == ""
    assert verdict(found, [1.0] * 9) is None
    bare = Platform(name="bare", description="no numbers", device=type(device)(), devices_per_node=8)
    assert predict(config, bare, backend="gpu").capacity_bytes is None


def expected(step_seconds=0.5, **changes):
    values = dict(
        memory_bytes={
            "parameters": 2**30,
            "logits": 0.0,
            "stash": 3 * 2**29,
            "gradients": 2**29,
            "taps": 2**20,
        },
        capacity_bytes=16 * 2**30,
        step_seconds=step_seconds,
        uncertainty_fraction=0.2,
        parts={"compute": 0.8 * step_seconds, "bubble": 0.2 * step_seconds, "pipeline_transfer": 0.0},
    )
    return Prediction(**(values | changes))


def test_lines_drawn_out():
    assert expected().memory_line() == (
        "3.0 GiB of 16.0 GiB predicted in all, activations in flight 1.5 GiB, parameters 1.0 GiB, gradients 512.0 MiB"
    )
    assert expected(capacity_bytes=None).memory_line().startswith("3.0 GiB predicted in all")
    assert expected().time_line() == "0.5 s a step predicted, give or take 20%: computation 80%, bubble 20%"
    assert expected(notes=("far out",)).time_line().endswith("bubble 20%; far out")


@pytest.mark.parametrize(("measured", "side"), [([0.55, 9.0, 0.55], "within"), ([0.7, 0.7, 0.7], "outside")])
def test_the_median_step_is_compared_with_what_was_predicted(measured, side):
    text = verdict(expected(), measured)
    assert text.startswith(f"a step took {measured[0]} s, the median of 3, and 0.5 s was predicted: ")
    assert f"{measured[0] / 0.5:.2f} times as long, {side} the 20%" in text


def compared(work=None, reserve=0.0):
    terms = dict.fromkeys(field.name for field in dataclasses.fields(RankMemory)) | {"reserve": reserve}
    terms = {name: float(value or 2**20) for name, value in terms.items()} | {"reserve": reserve}
    return Comparison(
        predicted=RankMemory(**terms),
        memory=CompiledMemory(arguments=3 * 2**20, outputs=2**20, aliased=2**20, temporaries=2**23),
        state_bytes={"parameters": 2**20, "moments": 2**20, "batch": 2**20},
        predicted_flop=1.1e9,
        work=work,
    )


def test_what_was_compiled_stands_beside_what_was_predicted():
    """Eleven terms of 1 MiB, of which three last; reserve is not the compiler's."""
    memory = (
        "compiled  memory per device 11.0 MiB predicted, 11.0 MiB compiled (+0.0%): parameters 1.0 MiB and 1.0 MiB, "
        "moments 1.0 MiB and 1.0 MiB, batch 1.0 MiB and 1.0 MiB, temporaries 8.0 MiB and 8.0 MiB"
    )
    assert compiled_lines(compared(reserve=2.0**30)) == memory
    sent = {("pipe", "collective-permute"): 2.0**10, ("expert", "all-to-all"): 2.0**21}
    lines = compiled_lines(compared(CompiledWork(flop=1e9, sent_bytes=sent))).splitlines()
    assert lines == [
        memory,
        "          FLOP of products 1.1G predicted, 1G compiled (+10.0%)",
        "          sent in a step: expert all-to-all 2.0 MiB, pipe collective-permute 1.0 KiB",
    ]


def test_too_few_steps_say_nothing():
    assert verdict(expected(), [0.5, 0.5]) is None
