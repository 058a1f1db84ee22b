"""Tests of models/cost.py against published counts, the layers themselves and the compiler."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cost
from models.config import (
    DenseFFN,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    ModelConfig,
    MoEFFN,
    Router,
)
from models.presets import PRESETS, preset
from models.transformer import init_layers, init_params, layer_function, reference_context

GOLDEN = Path(__file__).parent / "golden"
COUNTS = json.loads((GOLDEN / "parameters.json").read_text())["models"]
RATES = json.loads((GOLDEN / "step_flop.json").read_text())["models"]


def dense_model(d_model, num_layers, num_heads, d_ff, vocab_size=128_256):
    attention = GroupedQueryAttention(num_heads=num_heads, num_kv_heads=8, head_dim=128)
    layers = (LayerConfig(attention=attention, ffn=DenseFFN(d_ff=d_ff)),) * num_layers
    return ModelConfig(name="dense", d_model=d_model, vocab_size=vocab_size, layers=layers)


def gpt_oss_120b():
    attention = GroupedQueryAttention(num_heads=64, num_kv_heads=8, head_dim=64, bias="all")
    layer = LayerConfig(attention=attention, ffn=MoEFFN(num_experts=128, experts_per_token=4, d_ff=2880))
    return ModelConfig(name="gpt_oss_120b", d_model=2880, vocab_size=201_088, layers=(layer,) * 36)


def predicting_deepseek_v3():
    return dataclasses.replace(preset("deepseek_v3"), prediction_layers=1)


OTHERS = {
    "deepseek_v3_predicting": predicting_deepseek_v3,
    "llama3_8b": lambda: dense_model(4096, 32, 32, 14336),
    "llama3_70b": lambda: dense_model(8192, 80, 64, 28672),
    "llama3_405b": lambda: dense_model(16384, 126, 128, 53248),
    "gpt_oss_120b": gpt_oss_120b,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_equal_published_counts(name):
    counted = cost.parameters(preset(name))
    assert counted.total == COUNTS[name]["total"]
    if "active" in COUNTS[name]:
        assert counted.active == COUNTS[name]["active"]


@pytest.mark.parametrize("name", RATES)
def test_step_flop_equals_published_rates(name):
    config = OTHERS[name]() if name in OTHERS else preset(name)
    found = cost.flop_per_token(config, RATES[name]["seq_len"]).step
    assert found / 1e9 == pytest.approx(RATES[name]["step_gflop"], rel=0.005)


def test_prediction_layer_counts_what_it_adds():
    """DeepSeek-V3's adds 11.6B parameters beside the embedding and head that it shares."""
    plain, predicting = cost.parameters(preset("deepseek_v3")), cost.parameters(predicting_deepseek_v3())
    assert predicting.total - plain.total == 11_610_068_224
    layer = preset("deepseek_v3").layers[-1]
    expected = cost.layer_flop(preset("deepseek_v3"), layer, 4096).total + 4 * 7168**2 + 2 * 129_280 * 7168
    added = (
        cost.flop_per_token(predicting_deepseek_v3(), 4096).forward
        - cost.flop_per_token(preset("deepseek_v3"), 4096).forward
    )
    assert added == expected


@pytest.mark.parametrize("name", PRESETS)
def test_step_flop_equals_the_closed_formula(name):
    """6 (active - embedding) + 3 L S N (d_qk + d_v), which counts norms as if they were matrices."""
    config, seq_len = preset(name), 2048
    counted = cost.parameters(config)
    attention = config.layers[0].attention
    latent = isinstance(attention, LatentAttention)
    widths = attention.nope_dim + attention.rope_dim + attention.v_dim if latent else 2 * attention.head_dim
    matrices = counted.active - counted.embedding + (counted.embedding if config.embeddings == "tied" else 0)
    expected = 6 * matrices + 3 * config.num_layers * seq_len * attention.num_heads * widths
    assert cost.flop_per_token(config, seq_len).step == pytest.approx(expected, rel=0.005)


def odd_model():
    """Every optional part at once, in three kinds of layers."""
    attention = GroupedQueryAttention(num_heads=6, num_kv_heads=3, head_dim=10, qk_norm="full", bias="all")
    other = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm="head", bias="qkv")
    moe = MoEFFN(
        num_experts=5,
        experts_per_token=3,
        d_ff=7,
        num_matrices=2,
        shared_d_ff=11,
        shared_gate="sigmoid",
        dense_residual_d_ff=13,
        router=Router(score="sigmoid", balance="bias"),
    )
    layers = (
        LayerConfig(attention=attention, ffn=DenseFFN(d_ff=17)),
        LayerConfig(attention=other, ffn=DenseFFN(d_ff=19, num_matrices=2)),
        LayerConfig(attention=other, ffn=moe),
    )
    return ModelConfig(name="odd", d_model=12, vocab_size=23, layers=layers)


@pytest.mark.parametrize(
    "config",
    [preset("tiny"), preset("small"), preset("peers_bench"), preset("mixtral_8x7b"), odd_model()],
    ids=lambda config: config.name,
)
def test_parameters_equal_those_of_the_layers(config):
    counted = cost.parameters(config)
    made = jax.eval_shape(lambda: init_params(config, 0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made)) == counted.trained
    for kind, stacked in made["layers"].items():
        layer = cost.layer_parameters(config, config.kinds[kind])
        count = len(config.layers_of_kind(kind))
        sizes = {
            "attention": stacked["attention"],
            "experts": stacked["ffn"].get("experts", {}),
            "router": stacked["ffn"].get("router", {}),
            "shared": [stacked["ffn"].get(name, {}) for name in ("shared", "shared_gate")],
        }
        for part, leaves in sizes.items():
            assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves)) == count * getattr(
                layer, part
            )


def wide_model(num_matrices, num_layers=1):
    """All experts chosen, so that plain layers do no more than what is counted, and wide, so products are all."""
    attention = GroupedQueryAttention(num_heads=8, num_kv_heads=2, head_dim=128)
    moe = MoEFFN(num_experts=4, experts_per_token=4, d_ff=1024, num_matrices=num_matrices, shared_d_ff=512)
    layers = (LayerConfig(attention=attention, ffn=moe),) * num_layers
    return ModelConfig(name="m", d_model=1024, vocab_size=8192, layers=layers)


def plain_flop(config, S):
    """Forward FLOP per token of plain layers: all pairs scored, and a dense matrix of gates."""
    counted = cost.layer_flop(config, config.layers[0], S)
    return counted.total + counted.attention_scores + 2 * config.num_experts * config.d_model


@pytest.mark.parametrize("num_matrices", [2, 3])
def test_layer_flop_equals_the_compilers_count(num_matrices):
    config, S = wide_model(num_matrices), 256
    params = jax.eval_shape(lambda: init_layers(config, "moe", np.int32(0), 0))
    x = jax.ShapeDtypeStruct((1, S, 1024), jnp.float32)
    context = reference_context(jnp.zeros((1, S), jnp.int32), jnp.zeros((1, S), jnp.int32), jnp.zeros(4))
    forward = jax.jit(lambda params, x: layer_function(config, "moe")(params, x, context)[0])
    found = forward.lower(params, x).cost_analysis()["flops"]
    assert found == pytest.approx(S * plain_flop(config, S), rel=0.01)


def test_step_flop_equals_the_compilers_count():
    """Forward and backward of layers in a scan, which the compiler counts once, and of a head."""
    config, S, L = wide_model(3, num_layers=5), 256, 5
    params = jax.eval_shape(lambda: init_params(config, 0))
    tokens = jax.ShapeDtypeStruct((1, S), jnp.int32)
    context = reference_context(jnp.zeros((1, S), jnp.int32), jnp.zeros((1, S), jnp.int32), jnp.zeros(4))
    layer = layer_function(config, "moe")

    def loss(params, tokens):
        x = params["embedding"][tokens]
        x, _ = jax.lax.scan(lambda x, p: (layer(p, x, context)[0], None), x, params["layers"]["moe"])
        return jax.nn.logsumexp(jnp.einsum("bsd,vd->bsv", x, params["head"]), axis=-1).sum()

    once = jax.jit(jax.grad(loss)).lower(params, tokens).cost_analysis()["flops"]
    found = once + (L - 1) * 3 * S * plain_flop(config, S)
    counted = cost.flop_per_token(config, S)
    extra = L * (plain_flop(config, S) - counted.layers[0].total)
    assert found == pytest.approx(S * (counted.step + 3 * extra), rel=0.01)


def test_layer_flop_by_hand():
    config = preset("tiny")
    moe = cost.layer_flop(config, config.kinds["moe"], 256)
    assert moe == cost.LayerFlop(
        attention_projections=2 * 128 * 32 * (4 + 2 + 2 + 4),
        attention_scores=2 * 256 * 4 * 32,
        router=2 * 128 * 8,
        experts=2 * 2 * 3 * 128 * 256,
    )
    dense = cost.layer_flop(config, config.kinds["dense"], 256)
    assert (dense.dense, dense.experts) == (2 * 3 * 128 * 512, 0)
    assert cost.flop_per_token(config, 256).forward == dense.total + 3 * moe.total + 2 * 257 * 128


def test_activation_bytes_by_hand():
    """Mixtral 8x7B in bfloat16, bytes per token."""
    config = preset("mixtral_8x7b")
    found = cost.layer_activation_bytes(config, config.layers[0], 4096)
    assert found == cost.LayerActivations(
        norms=4 * 2 * 4096,
        attention=2 * (4096 + 1024 + 1024 + 4096) + 4 * 32,
        attention_scores=32 * 4096 * 6,
        router=4 * 8 + 4 * 2 + 8 * 2,
        dispatch=2 * 2 * 4096,
        experts=2 * 2 * 3 * 14336,
        combine=2 * 2 * 4096,
    )


def test_activation_bytes_of_latent_attention():
    """DeepSeek-V3: the up-projected query, key and value are the large part (2 * 128 * 512 bytes of them)."""
    config = preset("deepseek_v3")
    found = cost.layer_activation_bytes(config, config.layers[-1], 4096)
    assert found.attention == 2 * (1536 + 512 + 64 + 128 * (192 + 192 + 128) + 128 * 128) + 4 * 128
    assert found.shared == 2 * 3 * 2048


def test_autodiff_of_a_layer_keeps_up_to_2_2_times_the_activations():
    """Residuals of the vjp of a dense layer, weights excluded."""
    attention = GroupedQueryAttention(num_heads=8, num_kv_heads=8, head_dim=128)
    layer = LayerConfig(attention=attention, ffn=DenseFFN(d_ff=4096))
    config = ModelConfig(name="m", d_model=1024, vocab_size=8, layers=(layer,))
    S = 128
    params = jax.eval_shape(lambda: init_layers(config, "dense", np.int32(0), 0))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    x = jax.ShapeDtypeStruct((1, S, 1024), jnp.bfloat16)
    context = reference_context(jnp.zeros((1, S), jnp.int32), jnp.zeros((1, S), jnp.int32), jnp.zeros(0))

    def residuals(params, x):
        _, pull = jax.vjp(lambda params, x: layer_function(config, "dense")(params, x, context)[0], params, x)
        return pull

    kept = jax.tree.leaves(jax.eval_shape(residuals, params, x))
    weights = [leaf.shape for leaf in jax.tree.leaves(params)]
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape not in weights) / S
    assert 1 <= found / cost.layer_activation_bytes(config, layer, S).total <= 2.2


def test_all_to_all_bytes():
    config = preset("deepseek_v3")
    assert cost.all_to_all_bytes(config, config.layers[-1]) == 8 * 7168 * 2
    assert cost.all_to_all_bytes(config, config.layers[0]) == 0
    assert cost.all_to_all_bytes(config, config.layers[-1], itemsize=1) == 8 * 7168
