"""Tests of models/config.py: what it accepts, the sentences with which it refuses, and its JSON."""

import json

import pytest

from models.config import (
    DenseFFN,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    ModelConfig,
    MoEFFN,
    Router,
)

ATTENTION = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="head", bias="qkv")
LATENT = LatentAttention(num_heads=4, q_rank=0, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=8)
DENSE = LayerConfig(attention=ATTENTION, ffn=DenseFFN(d_ff=64))
SIGMOID = Router(score="sigmoid", balance="bias", scaling_factor=2.5)
MOE = LayerConfig(
    attention=ATTENTION, ffn=MoEFFN(num_experts=8, experts_per_token=2, d_ff=16, router=SIGMOID)
)
WIDE = LayerConfig(attention=LATENT, ffn=MoEFFN(num_experts=8, experts_per_token=2, d_ff=32, shared_d_ff=16))


def model(*layers: LayerConfig, **changes) -> ModelConfig:
    return ModelConfig(**{"name": "m", "d_model": 32, "vocab_size": 100, "layers": layers} | changes)


def test_kinds_are_named_in_order_of_first_use():
    config = model(DENSE, MOE, WIDE, MOE)
    assert config.kinds == {"dense": DENSE, "moe": MOE, "moe_2": WIDE}
    assert config.kind_of_layer == ("dense", "moe", "moe_2", "moe")
    assert config.layers_of_kind("moe") == (1, 3)
    assert config.moe_layers == (1, 2, 3)
    assert (config.num_layers, config.num_experts, config.experts_per_token) == (4, 8, 2)


def test_model_without_experts():
    config = model(DENSE, DENSE)
    assert (config.num_experts, config.experts_per_token, config.moe_layers) == (0, 0, ())


def test_json_round_trip_is_exact():
    config = model(DENSE, MOE, MOE, WIDE, embeddings="tied", prediction_layers=1, norm_eps=1e-6)
    text = json.dumps(config.to_dict())
    assert ModelConfig.from_dict(json.loads(text)) == config
    assert [run["repeat"] for run in config.to_dict()["layers"]] == [1, 2, 1]


def test_equal_configurations_are_equal_keys():
    assert {model(DENSE, MOE): 1}[model(DENSE, MOE)] == 1


def attention(**changes):
    return GroupedQueryAttention(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | changes)


def moe(**changes):
    return MoEFFN(**{"num_experts": 4, "experts_per_token": 2, "d_ff": 8} | changes)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: attention(num_kv_heads=3), "must divide num_heads, got 3 key-value heads for 4 heads"),
        (lambda: attention(head_dim=7), "head_dim must be even .* got 7; use 8"),
        (
            lambda: attention(num_heads=0),
            "num_heads of a GroupedQueryAttention must be a whole number of at least 1",
        ),
        (lambda: attention(num_heads=True), "must be a whole number of at least 1, got True"),
        (lambda: attention(rope_theta=float("inf")), "rope_theta .* must be a positive number, got inf"),
        (lambda: attention(qk_norm="heads"), "qk_norm .* must be one of 'none', 'head', 'full', got 'heads'"),
        (lambda: DenseFFN(d_ff=8, num_matrices=4), "num_matrices of a DenseFFN must be one of 2, 3, got 4"),
        (lambda: DenseFFN(d_ff=8.0), "d_ff of a DenseFFN must be a whole number of at least 1, got 8.0"),
        (lambda: Router(score="tanh"), "score of a Router must be one of 'softmax', 'sigmoid', got 'tanh'"),
        (
            lambda: Router(z_loss_coefficient=-1.0),
            "z_loss_coefficient .* must be a number of at least 0, got -1.0",
        ),
        (lambda: Router(scaling_factor=0), "scaling_factor of a Router must be a positive number, got 0"),
        (lambda: moe(experts_per_token=5), "must not exceed num_experts, got 5 of 4 experts"),
        (
            lambda: moe(shared_gate="sigmoid"),
            "shared_gate 'sigmoid' needs a shared expert, got shared_d_ff 0",
        ),
        (lambda: Router(num_groups=2, groups_per_token=3), "must not exceed num_groups, got 3 of 2 groups"),
        (lambda: moe(router=Router(num_groups=3)), "num_groups must divide the 4 experts, got 3 groups"),
        (
            lambda: moe(router=Router(num_groups=4, groups_per_token=2)),
            "a group needs the 2 experts that its score is made of, got 1",
        ),
        (
            lambda: moe(experts_per_token=3, router=Router(num_groups=2)),
            "the 3 experts of a token must be in its 1 groups of 2, which is too few; raise groups_per_token",
        ),
        (lambda: moe(router="softmax"), "router of a MoEFFN must be a Router, got 'softmax'"),
        (lambda: LayerConfig(attention=DENSE, ffn=moe()), "attention of a LayerConfig must be a Grouped"),
        (model, r"layers must be a non-empty tuple of LayerConfig, got \(\)"),
        (lambda: model(DENSE, ATTENTION), "layers must hold LayerConfig only, got Grouped.* at layer 1"),
        (lambda: model(DENSE, name=""), "name of a ModelConfig must be a non-empty string"),
        (lambda: model(DENSE, embeddings="shared"), "embeddings .* must be one of 'tied', 'untied'"),
        (
            lambda: model(MOE, LayerConfig(attention=ATTENTION, ffn=moe())),
            r"all MoE layers must agree on num_experts, got \[4, 8\]",
        ),
        (lambda: model(DENSE).layers_of_kind("moe"), "model 'm' has no layers of kind 'moe'; it has dense"),
    ],
)
def test_refusals(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


def edited(path: str, value) -> dict:
    """Returns the dictionary of a model with one entry replaced; the path is written with dots."""
    result = json.loads(json.dumps(model(DENSE, MOE).to_dict()))
    *parents, last = path.split(".")
    node = result
    for name in parents:
        node = node[int(name)] if name.isdigit() else node[name]
    node[last] = value
    return result


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (edited("hidden_size", 4), "model has no field 'hidden_size'; did you mean"),
        (
            edited("layers.0.attention.num_head", 4),
            r"layers\[0\].attention has no field 'num_head'; did you mean 'num_heads'",
        ),
        (
            edited("layers.1.ffn.router.scores", 1),
            r"layers\[1\].ffn.router has no field 'scores'; did you mean 'score'",
        ),
        (
            edited("layers.1.ffn.type", "sparse"),
            r"layers\[1\].ffn.type must be one of dense, moe, got 'sparse'",
        ),
        (edited("layers.1.ffn", {}), r"layers\[1\].ffn must be an object with a 'type'"),
        (edited("layers.1.ffn", {"type": "dense"}), r"layers\[1\].ffn needs the field 'd_ff'; it has none"),
        (edited("layers.1.repeat", 0), r"layers\[1\].repeat must be a whole number of at least 1, got 0"),
        (edited("layers", 3), "model.layers must be a list of layers, got 3"),
        (
            edited("layers.0.ffn.d_ff", "64"),
            "d_ff of a DenseFFN must be a whole number of at least 1, got '64'",
        ),
        ({"name": "m"}, "model needs the field 'd_model'; it has name"),
        ([], r"model must be an object, got \[\]"),
    ],
)
def test_refusals_of_from_dict(value, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelConfig.from_dict(value)
