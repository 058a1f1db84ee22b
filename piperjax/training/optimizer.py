"""This file is the optimizer: AdamW with warm-up, cosine decay, clipping by global norm and a decay mask."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from piperjax.training.config import OptimizerConfig


class Moments(NamedTuple):
    """What AdamW remembers, shaped and sharded as the parameters.

    Attributes:
      first: decayed mean of the gradients, float32.
      second: decayed mean of their squares, float32.
    """

    first: Any
    second: Any


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns step -> learning rate: linear from 0 over warmup_steps, then cosine down to the final fraction.

    Step 0 already moves: it has the rate of the first of `warmup_steps` equal rises. The last of `num_steps`
    steps has `peak_lr * final_lr_fraction`; later steps keep it.
    """
    decay_steps = max(num_steps - 1 - config.warmup_steps, 1)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = (step + 1) / max(config.warmup_steps, 1)
        progress = jnp.clip((step - config.warmup_steps) / decay_steps, 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        decayed = config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine
        return config.peak_lr * jnp.where(step < config.warmup_steps, warmup, decayed)

    return rate


def decay_mask(params: Any) -> Any:
    """Returns a tree of booleans: True where weight decay applies, which is everything but norms and biases."""

    def decays(path: tuple[Any, ...], _leaf: Any) -> bool:
        name = str(path[-1].key)
        return not name.endswith(("norm", "bias"))

    return jax.tree_util.tree_map_with_path(decays, params)


def init_moments(params: Any) -> Moments:
    """Returns zero moments in float32 or wider (traceable)."""

    def zeros(leaf: jax.Array) -> jax.Array:
        return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))

    return Moments(jax.tree.map(zeros, params), jax.tree.map(zeros, params))


class Update(NamedTuple):
    """Result of one optimizer step.

    Attributes:
      params: the new parameters.
      moments: the new moments.
      grad_norm: global norm of the gradients before clipping, over every device.
      learning_rate: the rate that was applied.
    """

    params: Any
    moments: Moments
    grad_norm: jax.Array
    learning_rate: jax.Array


def apply(
    config: OptimizerConfig, num_steps: int, *, step: jax.Array, params: Any, moments: Moments, grads: Any
) -> Update:
    """Returns the parameters and moments after step number `step`, counted from 0 (traceable).

    Gradients are global arrays under jit, so the norm is over the whole mesh; padded rows have zero
    gradients and neither count nor move. Those of fewer bits than moments are widened before anything else.
    """
    grads = jax.tree.map(lambda leaf, moment: leaf.astype(moment.dtype), grads, moments.first)
    grad_norm = optax.tree.norm(grads)
    if config.clip_norm > 0:
        scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(grad_norm, 1e-12))
        grads = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), grads)
    rate = learning_rate(config, num_steps)(step)
    adam = optax.scale_by_adam(b1=config.betas[0], b2=config.betas[1], eps=config.eps)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask)
    state = optax.ScaleByAdamState(count=step, mu=moments.first, nu=moments.second)
    updates, state = adam.update(grads, state, params)
    updates, _ = decay.update(updates, decay.init(params), params)
    updates = jax.tree.map(lambda leaf: leaf * -rate.astype(leaf.dtype), updates)
    return Update(optax.apply_updates(params, updates), Moments(state.mu, state.nu), grad_norm, rate)
