"""Tests of the train state and step with a small executor: learning, shardings, bias balancing, stopping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piperjax.training.config import OptimizerConfig, TrainConfig
from piperjax.training.state import (
    bias_rates,
    init_state,
    make_evaluate,
    make_train_step,
    state_shardings,
    updated_bias,
)


def make_config(model, **changes):
    optimizer = OptimizerConfig(peak_lr=0.05, warmup_steps=2, weight_decay=0.0)
    return TrainConfig(model=model, optimizer=optimizer, steps=30, **changes)


def test_loss_falls_and_metrics_are_complete(executor, bigram):
    config = make_config(executor.config)
    step = make_train_step(executor, config)
    state, losses = init_state(executor, seed=0), []
    for number in range(30):
        state, metrics = step(state, bigram.batch(executor.config, number), np.int32(0))
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(33), rel=0.05) and losses[-1] < 0.6 * losses[0]
    assert int(state.step) == 30 and int(metrics.stop) == 0
    assert metrics.load.shape == (4, 4) and (np.asarray(metrics.load).sum(axis=1) == 2 * 4 * 16).all()
    assert float(metrics.num_tokens) == 128 and 0 < float(metrics.grad_norm) < 10


def test_shardings_of_state_survive_a_step(executor, bigram):
    step = make_train_step(executor, make_config(executor.config))
    state = init_state(executor, seed=0)
    wanted = state_shardings(executor)
    before = jax.tree.map(
        lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), state, wanted
    )
    state, _ = step(state, bigram.batch(executor.config, 0), np.int32(0))
    after = jax.tree.map(
        lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), state, wanted
    )
    assert all(jax.tree.leaves(before)) and all(jax.tree.leaves(after))
    first = state.moments.first["embedding"].addressable_shards[0].data.shape
    assert first == state.params["embedding"].addressable_shards[0].data.shape == (33, 4)


def test_state_is_donated(executor, bigram):
    step = make_train_step(executor, make_config(executor.config))
    state = init_state(executor, seed=0)
    old = state.params["embedding"]
    step(state, bigram.batch(executor.config, 0), np.int32(0))
    assert old.is_deleted()


def test_seed_decides_and_layout_does_not(bigram):
    model = bigram.model()
    logical = [
        jax.device_get(executor.to_logical(init_state(executor, seed).params))
        for executor, seed in (
            (bigram.executor(model), 0),
            (bigram.executor(model, pipe=2, num_devices=1), 0),
            (bigram.executor(model), 1),
        )
    ]
    np.testing.assert_allclose(logical[0]["embedding"], logical[1]["embedding"], rtol=1e-6)
    assert (logical[0]["embedding"] != logical[2]["embedding"]).any()


def test_bias_rises_for_idle_experts_and_falls_for_busy_ones():
    load = jnp.array([[10.0, 0.0, 5.0, 5.0], [9.0, 1.0, 1.0, 1.0]])
    bias = updated_bias(jnp.zeros((2, 4)), load, jnp.array([[0.1], [0.0]]))
    np.testing.assert_allclose(bias, [[-0.1, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], atol=1e-7)


def test_bias_moves_only_where_the_router_balances_by_bias(bigram):
    model = bigram.model(balance="bias")
    np.testing.assert_allclose(bias_rates(model), np.full((4, 1), 0.05))
    assert (bias_rates(bigram.model(balance="aux_loss")) == 0).all()
    executor = bigram.executor(model)
    step = make_train_step(executor, make_config(model))
    state, first = step(init_state(executor, 0), bigram.batch(model, 0), np.int32(0))
    np.testing.assert_allclose(
        state.router_bias,
        0.05 * np.sign(np.asarray(first.load).mean(1, keepdims=True) - first.load),
        atol=1e-7,
    )
    for number in range(1, 30):
        state, last = step(state, bigram.batch(model, number), np.int32(0))
    imbalance = [np.asarray(m.load).max(1) / np.asarray(m.load).mean(1) for m in (first, last)]
    assert imbalance[1].mean() < imbalance[0].mean()


def test_any_wish_to_stop_is_heard(executor, bigram):
    step = make_train_step(executor, make_config(executor.config))
    flags = np.array([0, 1, 0], np.int32)
    _, metrics = step(init_state(executor, 0), bigram.batch(executor.config, 0), flags)
    assert int(metrics.stop) == 1


def test_evaluation_equals_the_training_loss(executor, bigram):
    state, batch = init_state(executor, 0), bigram.batch(executor.config, 3)
    evaluated = make_evaluate(executor)(state.params, state.router_bias, batch)
    _, metrics = make_train_step(executor, make_config(executor.config))(state, batch, np.int32(0))
    assert float(evaluated.loss) == pytest.approx(float(metrics.loss), rel=1e-6)
