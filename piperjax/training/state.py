"""This file is the state of a run on its devices, and the compiled step that advances it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.config import ModelConfig, MoEFFN
from piperjax.runtime import placement as placements
from piperjax.training import optimizer
from piperjax.training.config import OptimizerConfig, TrainConfig
from piperjax.training.optimizer import Moments


class Executor(Protocol):
    """What training needs of an executor (`piperjax.runtime.executor.Executor`)."""

    config: ModelConfig
    mesh: jax.sharding.Mesh
    abstract_params: Any
    abstract_logical: Any
    batch_sharding: NamedSharding
    compiler_options: dict[str, str]

    def init_params(self, seed: int) -> Any:
        """Returns initial parameters on their devices."""

    def gradients(
        self, params: Any, router_bias: jax.Array, batch: dict, placement: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Returns gradients like `params`, and StepStats."""

    def evaluate(
        self, params: Any, router_bias: jax.Array, batch: dict, placement: jax.Array | None = None
    ) -> Any:
        """Returns StepStats."""

    def to_logical(self, tree: Any, placement: jax.Array | None = None) -> Any:
        """Returns a params-like tree in the layout which knows no mesh."""

    def from_logical(self, tree: Any, placement: jax.Array | None = None) -> Any:
        """Returns the inverse of `to_logical`."""

    def move_experts(self, tree: Any, source: jax.Array) -> Any:
        """Returns a params-like tree whose physical expert e of a layer is expert source[layer, e] of the given one."""


class TrainState(NamedTuple):
    """Everything that changes from step to step, on devices.

    Attributes:
      step: int32 scalar, steps done.
      params: master parameters, float32, in device layout.
      moments: of AdamW, sharded as `params`.
      router_bias: `[num_moe_layers, E]` float32, replicated; zero unless a router balances by bias.
      placement: `[num_moe_layers, E]` int32, replicated: the physical expert of every logical one
        (`piperjax.runtime.placement`). None if they are the same, and then nothing is looked up.
    """

    step: jax.Array
    params: Any
    moments: Moments
    router_bias: jax.Array
    placement: jax.Array | None = None


class StepMetrics(NamedTuple):
    """What a training step reports, the same on every device.

    Attributes:
      loss: cross entropy, nats per token, without auxiliary losses.
      aux_loss: auxiliary losses of the routers.
      grad_norm: global norm before clipping.
      learning_rate: the rate that was applied.
      num_tokens: positions that counted in the loss.
      load: `[num_moe_layers, E]` rows routed to each expert.
      overflow: rows beyond the limit of a capacity factor.
      stop: 1 if any process was asked to stop, else 0.
    """

    loss: jax.Array
    aux_loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    num_tokens: jax.Array
    load: jax.Array
    overflow: jax.Array
    stop: jax.Array


def replicated(executor: Executor) -> NamedSharding:
    """The sharding of scalars and small tables."""
    return NamedSharding(executor.mesh, P())


def state_shardings(executor: Executor) -> TrainState:
    """Returns the sharding of every leaf of a TrainState without placement; moments are sharded as their parameters."""
    params = jax.tree.map(lambda leaf: leaf.sharding, executor.abstract_params)
    everywhere = replicated(executor)
    return TrainState(step=everywhere, params=params, moments=Moments(params, params), router_bias=everywhere)


def init_state(executor: Executor, seed: int) -> TrainState:
    """Returns the state before the first step; its logical values depend on the seed only, never on the mesh."""
    params = executor.init_params(seed)
    shardings = state_shardings(executor)
    table = router_bias_shape(executor.config)

    def rest(params):
        return jnp.zeros((), jnp.int32), optimizer.init_moments(params), jnp.zeros(table, jnp.float32)

    out = (shardings.step, shardings.moments, shardings.router_bias)
    step, moments, router_bias = jax.jit(rest, out_shardings=out)(params)
    return TrainState(step=step, params=params, moments=moments, router_bias=router_bias)


def place_experts(executor: Executor, state: TrainState, placement: np.ndarray) -> TrainState:
    """Returns the same state with its experts where a placement [num_moe_layers, E] says: weights and both moments.

    The function that is computed does not change. A step compiled for a state without placement is not for this one;
    from one placement to another nothing is compiled again.

    Raises:
      ValueError: if that is no placement of the model's experts.
    """
    placements.check(placement, executor.config)
    placement = jax.device_put(np.asarray(placement, np.int32), replicated(executor))
    source = placements.inverse(placement)
    if state.placement is not None:
        source = jnp.take_along_axis(state.placement, source, axis=1)
    params, first, second = (executor.move_experts(tree, source) for tree in (state.params, *state.moments))
    return state._replace(params=params, moments=Moments(first, second), placement=placement)


def router_bias_shape(model: ModelConfig) -> tuple[int, int]:
    """Rows are MoE layers in layer order, columns logical experts."""
    return len(model.moe_layers), model.num_experts


def bias_rates(model: ModelConfig) -> jax.Array:
    """Returns `[num_moe_layers, 1]`: how far one step moves the balancing bias; 0 where a layer has none."""
    ffns = [layer.ffn for layer in model.layers if isinstance(layer.ffn, MoEFFN)]
    rates = [ffn.router.bias_update_rate if ffn.router.balance == "bias" else 0.0 for ffn in ffns]
    return jnp.asarray(rates, jnp.float32).reshape(-1, 1)


def updated_bias(router_bias: jax.Array, load: jax.Array, rates: jax.Array) -> jax.Array:
    """Returns the bias after a step: up by the rate for experts below the mean load, down above it.

    Loss-free balancing, arXiv:2408.15664 algorithm 1; `[num_moe_layers, E]` throughout.
    """
    mean = load.mean(axis=-1, keepdims=True) if load.size else load
    return router_bias + rates * jnp.sign(mean - load)


def make_train_step(executor: Executor, config: TrainConfig) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Returns the jitted step (state, batch, stop) -> (state, metrics); the old state is donated.

    `stop` is an int32 array to which every process contributes (`distributed.stop_flags`); its maximum returns
    in the metrics, so all processes learn in the same step that one of them was asked to stop.
    """
    rates = bias_rates(executor.config)

    def train_step(state: TrainState, batch: dict, stop: jax.Array) -> tuple[TrainState, StepMetrics]:
        grads, stats = executor.gradients(state.params, state.router_bias, batch, state.placement)
        update = _apply(config.optimizer, config.steps, state, grads)
        metrics = StepMetrics(
            loss=stats.loss,
            aux_loss=stats.aux_loss,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            num_tokens=stats.num_tokens,
            load=stats.load,
            overflow=stats.overflow,
            stop=stop.max(),
        )
        state = TrainState(
            step=state.step + 1,
            params=update.params,
            moments=update.moments,
            router_bias=updated_bias(state.router_bias, stats.load, rates),
            placement=state.placement,
        )
        return state, metrics

    everywhere = replicated(executor)
    out_shardings = (state_shardings(executor)._replace(placement=everywhere), everywhere)
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=out_shardings,
        compiler_options=executor.compiler_options,
    )


def _apply(config: OptimizerConfig, num_steps: int, state: TrainState, grads: Any) -> optimizer.Update:
    return optimizer.apply(
        config, num_steps, step=state.step, params=state.params, moments=state.moments, grads=grads
    )


def make_evaluate(executor: Executor) -> Callable[..., Any]:
    """Returns the jitted (params, router_bias, batch, placement) -> StepStats."""
    return jax.jit(executor.evaluate, out_shardings=replicated(executor))
