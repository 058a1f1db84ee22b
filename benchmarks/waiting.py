"""Layers that only wait: the executor then shows its schedule, on any number of cores."""

import time

import jax
import jax.numpy as jnp

from models import transformer
from models.config import ModelConfig
from piperjax.runtime.varying import vary
from piperjax.schedules.timeline import ActionCosts


def waiting_layer(forward_seconds: float, input_seconds: float, weight_seconds: float):
    """A layer `(params, x, context) -> (x, 0, stats)` whose forward, input and weight gradient sleep.

    For memory mode "stash": a mode that recomputes would wait for the forward again.
    """

    def wait(seconds, x):
        def sleep(value):
            time.sleep(seconds)
            return value

        probe = x.ravel()[:1]
        slept = vary(jax.pure_callback(sleep, jax.ShapeDtypeStruct(probe.shape, probe.dtype), probe))
        return x + 0 * slept[0]

    @jax.custom_vjp
    def layer(x, weight):
        del weight  # Only its gradient is waited for.
        return wait(forward_seconds, x)

    def forward(x, weight):
        return wait(forward_seconds, x), weight

    def backward(weight, gradient):
        x_grad = wait(input_seconds, gradient)
        # Follows the input gradient, so that the two never sleep side by side.
        return x_grad, wait(weight_seconds, jnp.zeros_like(weight) + 0 * x_grad.ravel()[0])

    layer.defvjp(forward, backward)

    def function(params, x, context):
        del context
        leaves = jax.tree_util.tree_leaves_with_path(params)
        weight = next(leaf for path, leaf in leaves if not transformer.is_small_parameter(path))
        stats = {"load": jnp.zeros(0, jnp.float32), "dropped": jnp.zeros((), jnp.float32)}
        return layer(x, weight), jnp.zeros((), x.dtype), stats

    return function


def waiting_layers(config: ModelConfig, costs: ActionCosts) -> dict:
    """Layer functions of a model with one layer per stage that takes as long as `costs` says."""
    layer = waiting_layer(costs.forward, costs.input_gradient, costs.weight_gradient)
    return dict.fromkeys(config.kinds, layer)


def stage_costs(forward: float, input_gradient: float, weight_gradient: float, *, num_chunks: int = 1):
    """Costs of one of `num_chunks` stages of a rank whose whole work takes these seconds."""
    return ActionCosts(
        forward=forward / num_chunks,
        backward=(input_gradient + weight_gradient) / num_chunks,
        input_gradient=input_gradient / num_chunks,
        weight_gradient=weight_gradient / num_chunks,
    )
