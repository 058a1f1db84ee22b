"""Tests of the run configuration: round trip and the sentence of every refused value."""

import dataclasses
import json
import subprocess
import sys

import pytest

from benchmarks.cases import make_plan
from models.config import DenseFFN, GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN
from piperjax.training.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
)

ATTENTION = GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8)
MODEL = ModelConfig(
    name="test",
    d_model=16,
    vocab_size=260,
    layers=(
        LayerConfig(attention=ATTENTION, ffn=DenseFFN(d_ff=32)),
        LayerConfig(attention=ATTENTION, ffn=MoEFFN(num_experts=4, experts_per_token=2, d_ff=16)),
    ),
)


def plan_for(**changes):
    options = dict(pipe=2, expert=2, num_microbatches=4, batch_size=16, seq_len=128) | changes
    return make_plan(MODEL, **options)


@pytest.mark.parametrize("plan", [None, plan_for()])
def test_configuration_survives_json(plan):
    config = TrainConfig(
        model=MODEL,
        plan=plan,
        optimizer=OptimizerConfig(betas=(0.8, 0.99), clip_norm=0.0),
        data=DataConfig(path="text/*.md", seed=3),
        checkpoint=CheckpointConfig(every_steps=0),
        log=LogConfig(progress="plain"),
        steps=7,
        dtype="bfloat16",
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("cls", "values", "sentence"),
    [
        (OptimizerConfig, {"peak_lr": 0.0}, "optimizer.peak_lr must be a number above 0, got 0.0"),
        (OptimizerConfig, {"peak_lr": float("nan")}, "optimizer.peak_lr must be a number above 0, got nan"),
        (
            OptimizerConfig,
            {"warmup_steps": -1},
            "optimizer.warmup_steps must be a whole number of at least 0",
        ),
        (OptimizerConfig, {"final_lr_fraction": 2}, "of at least 0 and of at most 1, got 2"),
        (OptimizerConfig, {"betas": (0.9,)}, "optimizer.betas must be two numbers"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, "from 0 to below 1"),
        (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay must be a number of at least 0"),
        (DataConfig, {"path": ""}, "data.path must be a non-empty string"),
        (DataConfig, {"batch_size": 0}, "data.batch_size must be a whole number of at least 1, got 0"),
        (DataConfig, {"batch_size": 2.5}, "data.batch_size must be a whole number of at least 1, got 2.5"),
        (DataConfig, {"seq_len": 1}, "data.seq_len must be a whole number of at least 2"),
        (
            DataConfig,
            {"validation_fraction": 1.0},
            "data.validation_fraction must be a number from 0 to below 1, got 1.0",
        ),
        (CheckpointConfig, {"keep": 0}, "checkpoint.keep must be a whole number of at least 1"),
        (LogConfig, {"log_every": True}, "log.log_every must be a whole number of at least 1, got True"),
        (LogConfig, {"progress": "fancy"}, "log.progress must be one of auto, bar, plain, none, got 'fancy'"),
    ],
)
def test_impossible_values_are_refused(cls, values, sentence):
    with pytest.raises(ValueError) as caught:
        cls(**values)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"out": ""}, "out must be a non-empty string"),
        ({"plan": plan_for(seq_len=64)}, "plan.seq_len and data.seq_len must agree, got 64 and 128"),
        ({"plan": plan_for(layers_per_stage=(1, 2))}, "holds 3 layers but model test has 2"),
        (
            {"plan": plan_for(expert=8, expert_factors=(1, 2, 4), num_microbatches=2)},
            "must divide the 4 experts of model test, got plan.expert = 8",
        ),
    ],
)
def test_parts_must_fit_together(values, sentence):
    with pytest.raises(ValueError) as caught:
        TrainConfig(model=MODEL, **values)
    assert sentence in str(caught.value)


def test_reading_names_what_is_unknown():
    values = TrainConfig(model=MODEL).to_dict()
    values["optimizer"]["learning_rate"] = 1.0
    with pytest.raises(ValueError, match="optimizer has no field 'learning_rate'; its fields are betas"):
        TrainConfig.from_dict(values)
    with pytest.raises(ValueError, match="a configuration needs the field 'model'"):
        TrainConfig.from_dict({})


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig(model=MODEL).steps = 3


def test_configuration_needs_no_jax():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('jax', 'flax', 'optax', 'orbax')));"
        "import piperjax.training.config, piperjax.training.overrides"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
