"""Tests of models/moe.py: routing and its losses against numpy, and what compiles."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN, Router
from models.moe import balance_loss, route
from models.transformer import init_layers, layer_function, reference_context

RNG = np.random.default_rng(0)
T, E, K = 64, 8, 3
LOGITS = RNG.normal(size=(T, E)).astype(np.float32) * 2
BIAS = RNG.normal(size=E).astype(np.float32)


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def context(num_shards=1, all_sum=lambda array: array):
    nobody = reference_context(jnp.zeros((1, T), jnp.int32), jnp.zeros((1, T), jnp.int32), jnp.zeros(E))
    return dataclasses.replace(nobody, num_shards=num_shards, all_sum=all_sum)


def test_every_token_goes_to_k_distinct_experts_best_first():
    expert_ids, _ = route(jnp.asarray(LOGITS), jnp.zeros(E), k=K, router=Router())
    assert expert_ids.dtype == jnp.int32
    np.testing.assert_array_equal(expert_ids, np.argsort(-LOGITS, axis=1)[:, :K])


def test_ties_go_to_the_lowest_index():
    expert_ids, _ = route(jnp.zeros((2, E)), jnp.zeros(E), k=K, router=Router())
    np.testing.assert_array_equal(expert_ids, [[0, 1, 2]] * 2)


def chosen_by_groups(selection, *, k, groups, chosen, scored):
    """Experts of every token, one token after the other."""
    found = []
    for scores in selection:
        parts = scores.reshape(groups, -1)
        of_group = [np.sum(np.sort(part)[::-1][:scored], dtype=scores.dtype) for part in parts]
        best = np.argsort(-np.array(of_group), kind="stable")[:chosen]
        allowed = np.where(np.isin(np.arange(groups), best)[:, None], parts, -np.inf).ravel()
        found.append(np.argsort(-allowed, kind="stable")[:k])
    return np.array(found)


@pytest.mark.parametrize("balance", ["none", "bias"])
@pytest.mark.parametrize(
    ("groups", "chosen", "scored"), [(4, 2, 2), (4, 2, 1), (8, 3, 2), (2, 1, 2), (4, 4, 2)]
)
def test_experts_are_the_best_of_the_best_groups(groups, chosen, scored, balance):
    logits = RNG.normal(size=(256, 32)).astype(np.float32)
    bias = RNG.normal(size=32).astype(np.float32) - 0.5  # Scores for the choice may be negative.
    router = Router(
        score="sigmoid", balance=balance, num_groups=groups, groups_per_token=chosen, scored_per_group=scored
    )
    expert_ids, gates = jax.jit(lambda x, b: route(x, b, k=4, router=router))(logits, bias)
    scores = np.asarray(jax.nn.sigmoid(logits))
    selection = scores + bias if balance == "bias" else scores
    expected = chosen_by_groups(selection, k=4, groups=groups, chosen=chosen, scored=scored)
    np.testing.assert_array_equal(expert_ids, expected)
    assert max(len(set(row)) for row in np.asarray(expert_ids) // (32 // groups)) <= chosen
    picked = np.take_along_axis(scores, expected, axis=1)
    np.testing.assert_allclose(gates, picked / picked.sum(axis=1, keepdims=True), rtol=1e-5)
    assert gates.dtype == jnp.float32


def test_of_equal_groups_the_first_are_taken():
    router = Router(num_groups=4, groups_per_token=2)
    expert_ids, _ = route(jnp.zeros((2, E)), jnp.zeros(E), k=K, router=router)
    np.testing.assert_array_equal(expert_ids, [[0, 1, 2]] * 2)
    logits = jnp.zeros((1, E)).at[0, 7].set(1.0)
    expert_ids, _ = route(logits, jnp.zeros(E), k=K, router=router)
    np.testing.assert_array_equal(expert_ids, [[7, 0, 1]])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gates", ["raw", "normalized"])
@pytest.mark.parametrize("scaling_factor", [1.0, 2.5])
def test_gates(score, gates, scaling_factor):
    router = Router(score=score, gates=gates, scaling_factor=scaling_factor)
    expert_ids, found = route(jnp.asarray(LOGITS), jnp.zeros(E), k=K, router=router)
    scores = {"softmax": softmax, "sigmoid": sigmoid}[score](LOGITS)
    expected = np.take_along_axis(scores, np.asarray(expert_ids), axis=1)
    if gates == "normalized":
        expected = expected / expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected * scaling_factor, rtol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_moves_the_choice_and_no_gate(score):
    router = Router(score=score, gates="raw", balance="bias")
    plain = {"softmax": softmax, "sigmoid": sigmoid}[score](LOGITS)
    expert_ids, gates = route(jnp.asarray(LOGITS), jnp.asarray(BIAS), k=K, router=router)
    np.testing.assert_array_equal(expert_ids, np.argsort(-(plain + BIAS), axis=1)[:, :K])
    assert not np.array_equal(expert_ids, np.argsort(-plain, axis=1)[:, :K])
    np.testing.assert_allclose(gates, np.take_along_axis(plain, np.asarray(expert_ids), axis=1), rtol=1e-5)


def test_bias_has_no_gradient():
    router = Router(score="sigmoid", balance="bias")
    gradient = jax.grad(lambda bias: jnp.sum(route(jnp.asarray(LOGITS), bias, k=K, router=router)[1] ** 2))
    assert np.all(gradient(jnp.asarray(BIAS)) == 0)


def test_bias_is_ignored_without_bias_balancing():
    found = route(jnp.asarray(LOGITS), jnp.asarray(100 * BIAS), k=K, router=Router(score="sigmoid"))
    expected = route(jnp.asarray(LOGITS), jnp.zeros(E), k=K, router=Router(score="sigmoid"))
    np.testing.assert_array_equal(found[0], expected[0])


def test_gradient_of_gates_is_that_of_the_chosen_scores():
    expert_ids, _ = route(jnp.asarray(LOGITS), jnp.zeros(E), k=K, router=Router())
    weights = jnp.asarray(RNG.normal(size=(T, K)), jnp.float32)

    def ours(logits):
        return jnp.sum(weights * route(logits, jnp.zeros(E), k=K, router=Router(gates="raw"))[1])

    def plain(logits):
        return jnp.sum(weights * jnp.take_along_axis(jax.nn.softmax(logits), expert_ids, axis=1))

    np.testing.assert_allclose(jax.grad(ours)(LOGITS), jax.grad(plain)(LOGITS), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_by_hand(score):
    router = Router(score=score, aux_loss_coefficient=0.03, z_loss_coefficient=0.002)
    chosen = np.argsort(-LOGITS, axis=1)[:, :K]
    load = np.bincount(chosen.ravel(), minlength=E).astype(np.float32)
    scores = {"softmax": softmax, "sigmoid": sigmoid}[score](LOGITS)
    probability = (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)
    z = np.log(np.exp(LOGITS).sum(axis=1))
    expected = 0.03 * E * np.sum(load / (T * K) * probability) + 0.002 * np.mean(z**2)
    found = balance_loss(jnp.asarray(LOGITS), jnp.asarray(load), k=K, router=router, context=context())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_balanced_load_costs_exactly_the_coefficient():
    router = Router(aux_loss_coefficient=0.03)
    load = jnp.full(E, T * K / E)
    found = balance_loss(jnp.zeros((T, E)), load, k=K, router=router, context=context())
    np.testing.assert_allclose(found, 0.03, rtol=1e-6)


@pytest.mark.parametrize("balance", ["bias", "none"])
def test_no_aux_loss_without_aux_balancing(balance):
    router = Router(score="sigmoid", balance=balance)
    load = jnp.zeros(E).at[0].set(T * K)
    assert balance_loss(jnp.asarray(LOGITS), load, k=K, router=router, context=context()) == 0


def test_shares_of_two_devices_add_up():
    router = Router(aux_loss_coefficient=0.03, z_loss_coefficient=0.002)
    halves = np.split(LOGITS, 2)
    loads = [np.bincount(np.argsort(-half, axis=1)[:, :K].ravel(), minlength=E) for half in halves]
    whole_load = jnp.asarray(sum(loads), jnp.float32)
    together = context(num_shards=2, all_sum=lambda load: whole_load)

    def share(logits, load):
        return balance_loss(logits, jnp.asarray(load, jnp.float32), k=K, router=router, context=together)

    def whole(logits):
        return balance_loss(logits, whole_load, k=K, router=router, context=context())

    shares = [jax.jit(jax.value_and_grad(share))(*pair) for pair in zip(halves, loads, strict=True)]
    loss, gradient = jax.jit(jax.value_and_grad(whole))(LOGITS)
    np.testing.assert_allclose(sum(value for value, _ in shares), loss, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([part for _, part in shares]), gradient, rtol=1e-4, atol=1e-9)


def moe_layer(**changes):
    """Returns a layer function, the parameters of one layer and an input."""
    fields = {"num_experts": E, "experts_per_token": K, "d_ff": 16, "router": Router(z_loss_coefficient=0.01)}
    attention = GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8)
    layer = LayerConfig(attention=attention, ffn=MoEFFN(**fields | changes))
    config = ModelConfig(name="m", d_model=32, vocab_size=64, layers=(layer,), init_std=0.2)
    params = init_layers(config, "moe", np.int32(0), 0)
    x = jnp.asarray(RNG.normal(size=(1, T, 32)), jnp.float32)
    return layer_function(config, "moe"), params, x


PARTS = [
    {},
    {"num_matrices": 2},
    {"shared_d_ff": 24},
    {"shared_d_ff": 24, "shared_gate": "sigmoid", "num_matrices": 2},
    {"dense_residual_d_ff": 24},
    {"router": Router(score="sigmoid", balance="bias")},
    {"router": Router(score="sigmoid", num_groups=4, groups_per_token=2)},
]


@pytest.mark.parametrize("changes", PARTS, ids=str)
def test_no_scatter_and_no_gather_forward_or_backward(changes):
    layer, params, x = moe_layer(**changes)

    def loss(params, x):
        y, aux, _ = layer(params, x, context())
        return jnp.sum(y**2) + aux

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).as_text()
    assert "stablehlo.dot_general" in text
    assert not re.findall(r"stablehlo\.\w*(?:scatter|gather)", text)


@pytest.mark.parametrize("changes", PARTS, ids=str)
def test_load_counts_every_row(changes):
    layer, params, x = moe_layer(**changes)
    _, _, stats = jax.jit(lambda params, x: layer(params, x, context()))(params, x)
    assert stats["load"].shape == (E,) and stats["load"].dtype == jnp.float32
    assert np.sum(stats["load"]) == T * K
    assert stats["overflow"] == 0


def test_router_ignores_the_dtype_of_the_activations():
    """In bfloat16 the choice equals that of float32 weights on the same, already rounded, activations."""
    layer, params, x = moe_layer()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    seen = []

    def spy(expert_ffn, x, expert_ids, gates, num_experts):
        seen.append((x, expert_ids, gates))
        return jnp.zeros_like(x), jnp.zeros(())

    low["ffn"]["router"] = params["ffn"]["router"]
    y, aux, _ = layer(low, x.astype(jnp.bfloat16), dataclasses.replace(context(), experts=spy))
    (tokens, expert_ids, gates), router = seen[0], np.asarray(params["ffn"]["router"])
    logits = np.asarray(tokens, np.float32) @ router
    np.testing.assert_array_equal(expert_ids, np.argsort(-logits, axis=1)[:, :K])
    assert (y.dtype, aux.dtype, gates.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
