"""Tests of sampling: against the model's own logits, reproducible, and from the step that was asked for."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from models.config import GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN
from models.transformer import forward, init_params
from piperjax.training import sample
from piperjax.training.checkpoint import Checkpoints
from piperjax.training.config import CheckpointConfig, DataConfig, TrainConfig
from piperjax.training.optimizer import init_moments
from piperjax.training.run_file import write_run_file
from piperjax.training.state import TrainState

MODEL = ModelConfig(
    name="micro",
    d_model=16,
    vocab_size=260,
    init_std=0.5,
    layers=(
        LayerConfig(
            attention=GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8),
            ffn=MoEFFN(num_experts=4, experts_per_token=2, d_ff=16),
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """An executor whose device layout is the logical one."""

    config: ModelConfig

    @property
    def mesh(self):
        return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    @property
    def abstract_logical(self):
        shapes = jax.eval_shape(lambda: init_params(self.config, 0))
        here = NamedSharding(self.mesh, P())
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)

    def to_logical(self, tree, placement=None):
        del placement
        return tree


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with checkpoints of steps 1 and 2, which differ, and the parameters of step 2."""
    directory = tmp_path_factory.mktemp("run")
    config = TrainConfig(model=MODEL, out=str(directory), data=DataConfig(seq_len=16))
    write_run_file(config, platform={}, devices={})
    checkpoints = Checkpoints(directory, CheckpointConfig())
    here = NamedSharding(OneDevice(MODEL).mesh, P())
    for step in (1, 2):
        params = jax.device_put(init_params(MODEL, step), here)
        state = TrainState(
            step=jnp.int32(step), params=params, moments=init_moments(params), router_bias=jnp.zeros((1, 4))
        )
        checkpoints.save(step, OneDevice(MODEL), state, description={})
    checkpoints.wait()
    checkpoints.close()
    return str(directory), params


@jax.jit
def all_logits(params, tokens):
    positions = jnp.arange(tokens.shape[1])[None]
    return forward(MODEL, params, tokens, positions, jnp.ones_like(tokens), jnp.zeros((1, 4))).logits


def greedy(params, prompt, num_tokens):
    """Argmax by argmax, the window as in training: 16 tokens, the first one an end of document."""
    context = [256, *prompt.encode()]
    for _ in range(num_tokens):
        window = context[-16:]
        logits = all_logits(params, jnp.asarray([window + [0] * (16 - len(window))], jnp.int32))
        context.append(int(np.asarray(logits)[0, len(window) - 1, :257].argmax()))
        if context[-1] == 256:
            return context[1:-1]
    return context[1:]


def test_temperature_0_takes_the_likeliest_token(run):
    directory, params = run
    text = sample.sample(directory, "ab", num_tokens=20, temperature=0.0)
    expected = bytes(greedy(params, "ab", 20)).decode(errors="replace")
    assert text == expected and text.startswith("ab")
    assert sample.sample(directory, "ab", num_tokens=20, temperature=2.0, top_k=1) == text


def test_the_seed_decides(run):
    directory, _ = run
    texts = [sample.sample(directory, "ab", num_tokens=12, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_the_step_decides(run):
    directory, _ = run
    texts = [
        sample.sample(directory, "ab", num_tokens=12, temperature=0.0, step=step) for step in (1, 2, None)
    ]
    assert texts[1] == texts[2] != texts[0]


def test_an_empty_prompt_begins_a_document(run):
    directory, params = run
    text = sample.sample(directory, "", num_tokens=3, temperature=0.0)
    assert text == bytes(greedy(params, "", 3)).decode(errors="replace")


def test_command_line(run, capsys):
    directory, _ = run
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    args = parser.parse_args(["--run", directory, "--prompt", "x", "--tokens", "4", "--temperature", "0"])
    assert sample.main(args) == 0
    assert capsys.readouterr().out == sample.sample(directory, "x", num_tokens=4, temperature=0.0) + "\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_tokens": 0}, "--tokens must be at least 1, got 0"),
        ({"temperature": float("nan")}, "--temperature must be 0 or positive"),
        ({"top_k": -1}, "--top-k must be 0"),
        ({"seed": -1}, "--seed must be 0 or positive"),
        ({"step": 7}, "there is no checkpoint of step 7 in .*; there are 1, 2"),
    ],
)
def test_mistakes_are_explained(run, changes, words):
    directory, _ = run
    with pytest.raises(ValueError, match=words):
        sample.sample(directory, "ab", **changes)


def test_a_run_without_checkpoint_is_explained(tmp_path):
    write_run_file(TrainConfig(model=MODEL, out=str(tmp_path)), platform={}, devices={})
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        sample.sample(str(tmp_path), "ab")
