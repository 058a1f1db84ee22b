"""Tests of the optimizer against optax's own AdamW, and of what must not move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from piperjax.training import optimizer
from piperjax.training.config import OptimizerConfig

CONFIG = OptimizerConfig(peak_lr=1e-2, warmup_steps=4, final_lr_fraction=0.1, weight_decay=0.2, clip_norm=0.5)
STEPS = 12


def make_params(seed=0):
    generator = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    return {
        "embedding": draw(6, 4),
        "final_norm": draw(4),
        "layers": {
            "moe": {"attention": {"query": draw(2, 4, 4), "query_bias": draw(2, 4)}, "ffn_norm": draw(2, 4)}
        },
    }


def test_learning_rate_rises_then_falls_along_a_cosine():
    rate = optimizer.learning_rate(CONFIG, STEPS)
    rates = np.array([rate(step) for step in range(STEPS + 3)])
    np.testing.assert_allclose(rates[:4], [0.0025, 0.005, 0.0075, 0.01], rtol=1e-6)
    cosine = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(8) / 7))
    np.testing.assert_allclose(rates[4:12], 0.01 * cosine, rtol=1e-5)
    np.testing.assert_allclose(rates[11:], 0.001, rtol=1e-5)


@pytest.mark.parametrize(("warmup_steps", "num_steps"), [(0, 1), (0, 5), (20, 5), (1, 2)])
def test_learning_rate_of_short_runs_is_positive_and_bounded(warmup_steps, num_steps):
    config = OptimizerConfig(warmup_steps=warmup_steps)
    rates = [float(optimizer.learning_rate(config, num_steps)(step)) for step in range(num_steps + 1)]
    assert all(0 < rate <= config.peak_lr * (1 + 1e-6) for rate in rates)


def test_decay_spares_norms_and_biases():
    mask = optimizer.decay_mask(make_params())
    assert mask == {
        "embedding": True,
        "final_norm": False,
        "layers": {"moe": {"attention": {"query": True, "query_bias": False}, "ffn_norm": False}},
    }


def test_steps_equal_optax_adamw():
    params = expected = make_params()
    moments = optimizer.init_moments(params)
    reference = optax.chain(
        optax.clip_by_global_norm(CONFIG.clip_norm),
        optax.adamw(
            optimizer.learning_rate(CONFIG, STEPS),
            b1=CONFIG.betas[0],
            b2=CONFIG.betas[1],
            eps=CONFIG.eps,
            weight_decay=CONFIG.weight_decay,
            mask=optimizer.decay_mask,
        ),
    )
    state = reference.init(expected)
    for step in range(STEPS):
        grads = make_params(seed=step + 1)
        update = jax.jit(
            lambda step, params, moments, grads: optimizer.apply(
                CONFIG, STEPS, step=step, params=params, moments=moments, grads=grads
            )
        )(step, params, moments, grads)
        params, moments = update.params, update.moments
        updates, state = reference.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
        assert float(update.grad_norm) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), params, expected)


def test_padding_counts_for_nothing_and_stays_zero():
    params = make_params()
    padded = {**params, "embedding": jnp.pad(params["embedding"], ((0, 2), (0, 0)))}
    grads = make_params(seed=5)
    padded_grads = {**grads, "embedding": jnp.pad(grads["embedding"], ((0, 2), (0, 0)))}
    results = [
        optimizer.apply(
            CONFIG, STEPS, step=jnp.int32(0), params=p, moments=optimizer.init_moments(p), grads=g
        )
        for p, g in ((params, grads), (padded, padded_grads))
    ]
    assert results[0].grad_norm == results[1].grad_norm
    np.testing.assert_array_equal(results[1].params["embedding"][:6], results[0].params["embedding"])
    np.testing.assert_array_equal(results[1].params["embedding"][6:], 0)


def test_clipping_scales_all_gradients_alike():
    params, grads = make_params(), make_params(seed=1)
    clipped = OptimizerConfig(clip_norm=1e-3, weight_decay=0.0, betas=(0.0, 0.0), eps=1.0)
    unclipped = OptimizerConfig(clip_norm=0.0, weight_decay=0.0, betas=(0.0, 0.0), eps=1.0)
    first = [
        optimizer.apply(
            config,
            STEPS,
            step=jnp.int32(0),
            params=params,
            moments=optimizer.init_moments(params),
            grads=grads,
        ).moments.first
        for config in (clipped, unclipped)
    ]
    assert float(optax.tree.norm(first[0])) == pytest.approx(1e-3, rel=1e-5)
    ratio = jax.tree.map(lambda a, b: a / b, *first)
    np.testing.assert_allclose(
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(ratio)]),
        1e-3 / float(optax.tree.norm(first[1])),
        rtol=1e-4,
    )
