"""Tests of what a run prints first."""

import jax
import pytest

from benchmarks.cases import make_plan
from meshes.platform import load_platform
from models.presets import preset
from piperjax.training.banner import banner, bytes_per_device
from piperjax.training.config import DataConfig, TrainConfig
from piperjax.training.prediction import Prediction

EXPECTED = Prediction(memory_bytes={"parameters": 2**30}, capacity_bytes=2**32)


def tiny_run(**changes):
    options = dict(pipe=2, expert=4, num_microbatches=4, layers_per_stage=(3, 1), seq_len=128) | changes
    plan = make_plan(preset("tiny"), **options)
    return TrainConfig(
        model=preset("tiny"), plan=plan, out="runs/tiny", data=DataConfig(batch_size=plan.batch_size)
    )


def test_banner_drawn_out(executor):
    config = tiny_run()
    options = {"prediction": EXPECTED, "notes": ("because of this", "and that")}
    text = banner(config, load_platform("cpu8"), executor.abstract_params, "some text", **options)
    parameters = bytes_per_device(executor.abstract_params) / 1024
    assert text.splitlines() == [
        "model     tiny: 4 layers, 8 experts, 2 per token; 2.82M parameters, 1.05M active per token",
        "mesh      pipe 2 x data 1 x expert 4 = 8 devices, cpu8: eight simulated devices in two nodes of four",
        "schedule  one_f_one_b, 4 microbatches of 4 sequences, flat dispatch, dropless, float32",
        "stages    0: layers 0-2 (1 dense, 2 moe) | 1: layer 3 (1 moe)",
        "plan      because of this",
        "          and that",
        f"memory    per device {parameters:.1f} KiB parameters, {2 * parameters:.1f} KiB optimizer; "
        "1.0 GiB of 4.0 GiB predicted in all, parameters 1.0 GiB",
        "batch     16 sequences x 128 = 2,048 tokens per step; 300 steps = 614k tokens",
        "data      some text",
        "run       runs/tiny",
    ]


def test_one_of_each_is_singular_and_capacity_is_told(executor):
    config = tiny_run(pipe=1, expert=1, num_microbatches=1, layers_per_stage=(4,), capacity_factor=1.25)
    text = banner(config, load_platform("cpu"), executor.abstract_params, "", prediction=EXPECTED)
    assert (
        "= 1 device, cpu" in text
        and "1 microbatch of 1 sequence, flat dispatch, capacity factor 1.25" in text
    )


def test_a_prediction_of_seconds_has_a_line_of_its_own(executor):
    timed = Prediction(memory_bytes={}, step_seconds=0.25, uncertainty_fraction=0.1, parts={"compute": 0.25})
    text = banner(tiny_run(), load_platform("cpu8"), executor.abstract_params, "", prediction=timed)
    assert "\ntime      0.25 s a step predicted, give or take 10%: computation 100%\n" in text


@pytest.mark.parametrize("num_devices", [1, 2])
def test_bytes_per_device_are_those_of_the_shards(bigram, num_devices):
    executor = bigram.executor(bigram.model(), num_devices=num_devices)
    params = executor.init_params(0)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert bytes_per_device(executor.abstract_params) == held
