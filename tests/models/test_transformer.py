"""Tests of models/transformer.py: the whole against numpy in float64, initialisation, who influences whom."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import (
    DenseFFN,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    ModelConfig,
    MoEFFN,
    Router,
)
from models.initial import normal
from models.transformer import (
    cast_params,
    forward,
    layer_function,
    masked_grouped_matmul,
    reference_context,
    reference_loss,
    reference_step,
)

D, V, E = 16, 40, 4


def model(*, attention=None, moe=None, embeddings="untied", num_moe=1) -> ModelConfig:
    heads = GroupedQueryAttention(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | (attention or {}))
    experts = MoEFFN(**{"num_experts": E, "experts_per_token": 2, "d_ff": 12} | (moe or {}))
    dense = LayerConfig(attention=heads, ffn=DenseFFN(d_ff=24, num_matrices=experts.num_matrices))
    layers = (dense,) + (LayerConfig(attention=heads, ffn=experts),) * num_moe
    return ModelConfig(name="m", d_model=D, vocab_size=V, layers=layers, embeddings=embeddings, init_std=0.3)


def batch(M=1, B=2, S=10, seed=0) -> dict:
    """Returns microbatches of two documents per sequence; the last two positions carry no loss."""
    rng = np.random.default_rng(seed)
    first = S // 2 - 1
    segments = np.repeat([0, 1], [first, S - first]).astype(np.int32)
    positions = np.concatenate([np.arange(first), np.arange(S - first)]).astype(np.int32)
    return {
        "tokens": rng.integers(0, V, (M, B, S), np.int32),
        "targets": rng.integers(0, V, (M, B, S), np.int32),
        "positions": np.broadcast_to(positions, (M, B, S)),
        "segment_ids": np.broadcast_to(segments, (M, B, S)),
        "weights": np.broadcast_to((np.arange(S) < S - 2).astype(np.float32), (M, B, S)),
    }


def router_bias(config: ModelConfig) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(len(config.moe_layers), E)).astype(np.float32)


class NumpyModel:
    """The same model once more in numpy, loops over tokens, heads and chosen experts."""

    def __init__(self, config, params, bias):
        self.config, self.params, self.bias = config, params, bias

    def norm(self, x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self.config.norm_eps) * scale

    def rotate(self, x, positions, theta):
        half = x.shape[-1] // 2
        angles = positions[:, None, None] * theta ** (-np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def attention(self, a, p, x, positions, segments):
        q, k, v = (np.einsum("sd,dnh->snh", x, p[name]) for name in ("query", "key", "value"))
        if a.bias != "none":
            q, k, v = q + p["query_bias"], k + p["key_bias"], v + p["value_bias"]
        if a.qk_norm == "head":
            q, k = self.norm(q, p["query_norm"]), self.norm(k, p["key_norm"])
        if a.qk_norm == "full":
            q, k = (
                self.norm(heads.reshape(len(x), -1), scale).reshape(heads.shape)
                for heads, scale in ((q, p["query_norm"]), (k, p["key_norm"]))
            )
        q, k = self.rotate(q, positions, a.rope_theta), self.rotate(k, positions, a.rope_theta)
        y = np.zeros_like(x)
        for s, n in np.ndindex(len(x), a.num_heads):
            kv = n // (a.num_heads // a.num_kv_heads)
            seen = [t for t in range(s + 1) if segments[t] == segments[s]]
            weights = np.exp(k[seen, kv] @ q[s, n] / np.sqrt(a.head_dim))
            y[s] += (weights / weights.sum()) @ v[seen, kv] @ p["output"][n]
        return y + p.get("output_bias", 0)

    def dense(self, p, x):
        if "up" in p:
            h = x @ p["up"]
            h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        else:
            gate, up = np.split(x @ p["gate_up"], 2, axis=-1)
            h = gate / (1 + np.exp(-gate)) * up
        return h @ p["down"]

    def moe(self, f, p, x, bias):
        r, k = f.router, f.experts_per_token
        logits = x @ p["router"]
        exps = np.exp(logits)
        scores = exps / exps.sum(1, keepdims=True) if r.score == "softmax" else 1 / (1 + 1 / exps)
        select = scores + bias if r.balance == "bias" else scores
        y, load = np.zeros_like(x), np.zeros(E)
        for t in range(len(x)):
            chosen = np.argsort(-select[t])[:k]
            gates = scores[t, chosen]
            gates = r.scaling_factor * (gates / gates.sum() if r.gates == "normalized" else gates)
            for expert, gate in zip(chosen, gates, strict=True):
                y[t] += gate * self.dense({name: w[expert] for name, w in p["experts"].items()}, x[t])
                load[expert] += 1
        if "shared" in p:
            gate = 1 / (1 + np.exp(-(x @ p["shared_gate"])))[:, None] if "shared_gate" in p else 1.0
            y += gate * self.dense(p["shared"], x)
        probability = scores / scores.sum(1, keepdims=True)
        aux = r.aux_loss_coefficient * E * np.sum(load / (len(x) * k) * probability.mean(0))
        aux = aux if r.balance == "aux_loss" else 0.0
        return y, aux + r.z_loss_coefficient * np.mean(np.log(exps.sum(1)) ** 2), load

    def microbatch(self, rows):
        """Returns the sum of weighted cross entropy, the auxiliary loss and the loads."""
        shape = rows["tokens"].shape
        x, aux, loads = self.params["embedding"][rows["tokens"]], 0.0, []
        for index, kind in enumerate(self.config.kind_of_layer):
            row = self.config.layers_of_kind(kind).index(index)
            p = jax.tree.map(lambda leaf, row=row: leaf[row], self.params["layers"][kind])
            layer = self.config.layers[index]
            x = x + np.stack(
                [
                    self.attention(layer.attention, p["attention"], *sequence)
                    for sequence in zip(
                        self.norm(x, p["attention_norm"]), rows["positions"], rows["segment_ids"], strict=True
                    )
                ]
            )
            normed = self.norm(x, p["ffn_norm"]).reshape(-1, D)
            if isinstance(layer.ffn, MoEFFN):
                y, share, load = self.moe(layer.ffn, p["ffn"], normed, self.bias[len(loads)])
                aux, loads = aux + share, [*loads, load]
            else:
                y = self.dense(p["ffn"], normed)
            if "dense_residual" in p:
                y += self.dense(p["dense_residual"], self.norm(x, p["dense_residual_norm"]).reshape(-1, D))
            x = x + y.reshape(*shape, D)
        logits = self.norm(x, self.params["final_norm"]) @ self.params.get("head", self.params["embedding"]).T
        log_sum = np.log(np.exp(logits).sum(-1))
        picked = np.take_along_axis(logits, rows["targets"][..., None], axis=-1)[..., 0]
        return np.sum((log_sum - picked) * rows["weights"]), aux, np.stack(loads)


VARIANTS = {
    "plain": {},
    "two matrices, biases, raw gates": {
        "attention": {"bias": "all"},
        "moe": {"num_matrices": 2, "router": Router(gates="raw", z_loss_coefficient=0.01)},
    },
    "norm per head, gated shared expert": {
        "attention": {"qk_norm": "head", "rope_theta": 100.0},
        "moe": {"shared_d_ff": 20, "shared_gate": "sigmoid"},
    },
    "norm over heads, sigmoid router with bias": {
        "attention": {"qk_norm": "full"},
        "moe": {"router": Router(score="sigmoid", balance="bias", scaling_factor=2.5), "shared_d_ff": 4},
    },
    "tied, dense residual, two MoE layers": {
        "attention": {"bias": "qkv"},
        "moe": {"dense_residual_d_ff": 8, "router": Router(score="sigmoid")},
        "embeddings": "tied",
        "num_moe": 2,
    },
}


def random_params(config: ModelConfig, dtype: str = "float32") -> dict:
    """Returns parameters with norms and biases away from 1 and 0, where mistakes would not show."""
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key.endswith("norm") else 0.0
        return (mean + 0.3 * rng.normal(size=leaf.shape)).astype(dtype)

    declared = jax.eval_shape(lambda: transformer.init_params(config, 0))
    return jax.tree_util.tree_map_with_path(draw, declared)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_loss_equals_numpy_in_float64(variant):
    """To 1e-12: nothing on the way falls back to float32."""
    config = model(**VARIANTS[variant])
    data, bias = batch(M=2), router_bias(config)
    params = random_params(config, "float64")
    numpy_model = NumpyModel(config, params, bias)
    terms = [numpy_model.microbatch({name: a[m] for name, a in data.items()}) for m in range(2)]
    cross_entropy, aux, load = (sum(term) for term in zip(*terms, strict=True))
    with jax.enable_x64(True):
        found = reference_step(config, jax.tree.map(jnp.asarray, params), bias, data)
        assert found.loss.dtype == jnp.float64
    num_tokens = data["weights"].sum()
    np.testing.assert_allclose(found.cross_entropy, cross_entropy / num_tokens, rtol=1e-12)
    np.testing.assert_allclose(found.aux_loss, aux / 2, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.loss, cross_entropy / num_tokens + aux / 2, rtol=1e-12)
    np.testing.assert_array_equal(found.load, load)
    assert found.num_tokens == num_tokens


def test_gradient_of_the_reference_loss_is_its_slope():
    config = model(moe={"shared_d_ff": 4})
    data, bias = batch(), router_bias(config)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, random_params(config, "float64"))
        loss = functools.partial(reference_loss, config, router_bias=bias, batch=data)
        gradient = jax.grad(loss)(params)
        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        ahead, behind = (
            loss(jax.tree.map(lambda leaf, step, sign=sign: leaf + sign * 1e-6 * step, params, direction))
            for sign in (1, -1)
        )
        parts = jax.tree.map(lambda slope, step: jnp.sum(slope * step), gradient, direction)
        np.testing.assert_allclose(sum(jax.tree.leaves(parts)), (ahead - behind) / 2e-6, rtol=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_no_token_influences_an_earlier_one_or_another_document():
    config = model(num_moe=2)
    params, bias = random_params(config), router_bias(config)
    rows = {name: array[0] for name, array in batch().items()}
    reader = 6  # second document of each sequence, which starts at position 4

    def read(embedded):
        identity = {"embedding": embedded.reshape(-1, D)}
        tokens = jnp.arange(20).reshape(2, 10)
        output = forward(config, params | identity, tokens, rows["positions"], rows["segment_ids"], bias)
        return jnp.sum(output.logits[0, reader] ** 2)

    gradient = jax.jit(jax.grad(read))(jnp.asarray(params["embedding"][rows["tokens"]]))
    touched = np.abs(gradient).max(axis=-1) > 0
    expected = np.zeros((2, 10), bool)
    expected[0, 4 : reader + 1] = True
    np.testing.assert_array_equal(touched, expected)


@functools.cache
def initial_layers(layer_ids: tuple[int, ...] | int, seed: int = 7, num_experts: int = E) -> dict:
    config = model(moe={"num_experts": num_experts}, attention={"qk_norm": "head", "bias": "all"})
    return _init_layers(config, "moe", np.array(layer_ids), seed)


_init_layers = jax.jit(transformer.init_layers, static_argnums=(0, 1))
MANY_LAYERS = tuple(range(60, 0, -1))


def test_initial_values_do_not_depend_on_stacking():
    stacked, alone = initial_layers(MANY_LAYERS), initial_layers(3)
    jax.tree.map(lambda rows, row: np.testing.assert_array_equal(rows[57], row), stacked, alone)


def test_initial_values_of_an_expert_do_not_depend_on_their_number():
    few, many = (initial_layers(3, num_experts=count)["ffn"]["experts"] for count in (4, 8))
    for name in ("gate_up", "down"):
        np.testing.assert_array_equal(few[name], many[name][:4])
        assert len(np.unique(np.asarray(many[name][:, 0, 0]))) == 8


def test_initial_values_differ_between_seeds_layers_and_names():
    layers, other_seed = initial_layers(3), initial_layers(3, seed=8)
    leaves = [layers["attention"]["query"], other_seed["attention"]["query"]]
    leaves += [layers["attention"]["output"], initial_layers(MANY_LAYERS)["attention"]["query"][0]]
    assert len({float(np.ravel(leaf)[0] / np.std(leaf)) for leaf in leaves}) == len(leaves)


def test_initial_spread():
    layers = initial_layers(MANY_LAYERS)  # of a model of two layers whose init_std is 0.3
    for leaf, std in (
        (layers["attention"]["query"], 0.3),
        (layers["attention"]["output"], 0.3 / 2),
        (layers["ffn"]["router"], 0.3),
        (layers["ffn"]["experts"]["gate_up"], 0.3),
        (layers["ffn"]["experts"]["down"], 0.3 / 2),
    ):
        np.testing.assert_allclose(np.std(leaf), std, rtol=0.05)
        assert abs(np.mean(leaf)) < 0.05 * std
    for norm in (layers["attention_norm"], layers["ffn_norm"], layers["attention"]["key_norm"]):
        assert np.all(norm == 1)
    assert np.all(layers["attention"]["key_bias"] == 0)


def test_names_of_initial_values():
    experts = initial_layers(3)["ffn"]["experts"]
    expected = normal("layers/ffn/experts/down", (12, D), seed=7, layer=3, expert=2, std=0.3 / 2)
    np.testing.assert_array_equal(experts["down"][2], expected)


def test_outer_parameters():
    tied, untied = (transformer.init_outer(model(embeddings=kind), 0) for kind in ("tied", "untied"))
    assert set(tied) == {"embedding", "final_norm"}
    assert untied["head"].shape == untied["embedding"].shape == (V, D)
    assert not np.array_equal(untied["head"], untied["embedding"])
    np.testing.assert_array_equal(tied["embedding"], untied["embedding"])
    assert np.all(tied["final_norm"] == 1)


def test_cast_keeps_router_and_norms():
    params = random_params(model(attention={"qk_norm": "head", "bias": "all"}))
    low = cast_params(params, "bfloat16")
    paths = jax.tree_util.tree_flatten_with_path(low)[0]
    kept = {str(path[-1].key) for path, leaf in paths if leaf.dtype == jnp.float32}
    assert kept == {"attention_norm", "ffn_norm", "final_norm", "query_norm", "key_norm", "router"}
    with jax.enable_x64(True):
        wide = cast_params(params, "float64")
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(wide))


def test_bfloat16_layers_stay_bfloat16_and_losses_float32():
    config = model(attention={"qk_norm": "full", "bias": "all"}, moe={"shared_d_ff": 8})
    params = cast_params(random_params(config), "bfloat16")
    rows = {name: array[0] for name, array in batch().items()}
    context = reference_context(rows["positions"], rows["segment_ids"], jnp.zeros(E))
    x = jnp.ones((2, 10, D), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for kind in ("dense", "moe"):
            one_layer = jax.tree.map(lambda leaf: leaf[0], params["layers"][kind])
            layer = functools.partial(layer_function(config, kind), context=context)
            y, aux, stats = jax.eval_shape(layer, one_layer, x)
            assert (y.dtype, aux.dtype, stats["load"].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
            assert stats["load"].shape == (E,) and stats["overflow"].shape == ()
    low = reference_step(config, params, router_bias(config), batch())
    full = reference_step(config, random_params(config), router_bias(config), batch())
    assert low.loss.dtype == jnp.float32
    np.testing.assert_allclose(low.loss, full.loss, rtol=0.02)


def test_layer_in_shard_map_with_branches():
    """Parameters varying over the mesh, layer and its vjp in a branch: the types that the executor needs."""
    config = model()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    rows = {name: array[0] for name, array in batch().items()}
    params = jax.tree.map(lambda leaf: leaf[0], random_params(config)["layers"]["moe"])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10, D)), jnp.float32)

    def vary(tree):
        return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), tree)

    def loss(params, x, positions, segment_ids):
        context = reference_context(positions, segment_ids, jnp.zeros(E))
        y, aux, _ = layer_function(config, "moe")(params, x, context)
        return jnp.sum(y**2) + aux

    def per_device(params, x, positions, segment_ids):
        params = vary(params)
        gradient = jax.lax.cond(
            jax.lax.axis_index("data") == 0,
            lambda: jax.grad(loss)(params, x, positions, segment_ids),
            lambda: jax.tree.map(jnp.zeros_like, params),
        )
        return jax.lax.psum(gradient, "data")

    arguments = (x, rows["positions"], rows["segment_ids"])
    mapped = jax.shard_map(
        per_device, mesh=mesh, in_specs=(jax.P(), *[jax.P("data")] * 3), out_specs=jax.P(), check_vma=True
    )
    found, expected = jax.jit(mapped)(params, *arguments), jax.jit(jax.grad(loss))(params, *arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("sizes", [[3, 0, 5], [4, 4, 4], [0, 0, 0]])
@pytest.mark.parametrize("known", ["traced", "numpy"])
def test_masked_grouped_matmul(sizes, known):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(12, 5)).astype(np.float32), rng.normal(size=(3, 5, 7)).astype(np.float32)
    group_sizes = np.array(sizes, np.int32)
    y = masked_grouped_matmul(x, w, group_sizes if known == "numpy" else jnp.asarray(group_sizes))
    expert_of_row = np.repeat(np.arange(3), sizes)
    expected = np.zeros((12, 7))
    for row, expert in enumerate(expert_of_row):
        expected[row] = x[row] @ w[expert]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_latent_attention_is_refused_with_a_sentence():
    layer = LayerConfig(
        attention=LatentAttention(num_heads=2, q_rank=0, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=4),
        ffn=DenseFFN(d_ff=8),
    )
    config = ModelConfig(name="latent", d_model=8, vocab_size=8, layers=(layer,))
    with pytest.raises(ValueError, match="uses LatentAttention, which can be planned but not yet trained"):
        layer_function(config, "dense")
    with pytest.raises(ValueError, match="model 'latent' has no layers of kind 'moe'; it has dense"):
        layer_function(config, "moe")


def test_prediction_layers_are_refused_with_a_sentence():
    config = dataclasses.replace(model(), prediction_layers=1)
    with pytest.raises(ValueError, match="has 1 prediction_layers, which can be planned but not yet trained"):
        layer_function(config, "dense")
