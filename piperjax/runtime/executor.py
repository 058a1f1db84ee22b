"""The executor: interprets any tick table as one `lax.scan` inside one `shard_map`.

This file is what the rest of the program sees: parameters in device layout, gradients, evaluation. What runs on a
device in every tick is in `step.py`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from meshes.axes import AXES, BATCH, EXPERT, PIPE
from models import transformer
from models.config import ModelConfig
from piperjax.planner.plan import Plan
from piperjax.runtime import layout as layouts
from piperjax.runtime import placement as placements
from piperjax.runtime.backend import compiler_options
from piperjax.runtime.stage import LayerTable
from piperjax.runtime.step import Step
from piperjax.schedules.classic import forward_only_like
from piperjax.schedules.lower import LoweredSchedule, lower
from piperjax.schedules.ticks import pack

BATCH_FIELDS = ("tokens", "targets", "weights", "positions", "segment_ids")


class StepStats(NamedTuple):
    """What a step or an evaluation reports, the same on every device.

    Attributes:
      loss: cross entropy in nats per token.
      aux_loss: auxiliary losses, mean over microbatches of the sum over layers.
      num_tokens: weight of all positions that count in the loss.
      load: `[num_moe_layers, E]` rows routed to each expert.
      overflow: rows beyond the limit of a capacity factor.
    """

    loss: jax.Array
    aux_loss: jax.Array
    num_tokens: jax.Array
    load: jax.Array
    overflow: jax.Array


@dataclass(frozen=True)
class Executor:
    """Runs the steps of one model under one plan on one mesh.

    Attributes:
      config: the model.
      plan: how it is laid out.
      mesh: devices over the axes of `meshes.axes`.
      dtype: of the computation; parameters and gradients are kept in `master_dtype`.
      master_dtype: of parameters at rest and gradient accumulators.
      buffer_fill: what slot buffers start with. Results do not depend on it; tests use NaN.
      layer_functions: replaces the model's layers, by kind (for measurements of the executor itself).
    """

    config: ModelConfig
    plan: Plan
    mesh: Mesh
    dtype: str = "float32"
    master_dtype: str = "float32"
    buffer_fill: float = 0.0
    layer_functions: dict[str, Any] | None = None

    def __post_init__(self):
        sizes = {PIPE: self.plan.pipe, "data": self.plan.data}
        sizes |= dict(zip(EXPERT, self.plan.expert_factors, strict=True))
        found = {axis: self.mesh.shape.get(axis) for axis in AXES}
        if found != {axis: sizes[axis] for axis in AXES}:
            raise ValueError(
                f"the mesh must have the plan's axes {sizes}, but it has {dict(self.mesh.shape)}"
            )
        experts = self.config.num_experts
        if experts % self.plan.expert:
            raise ValueError(
                f"the expert axis must divide the {experts} experts of {self.config.name}, got expert = "
                f"{self.plan.expert}; divisors are {[d for d in range(1, experts + 1) if experts % d == 0]}"
            )
        _ = self.layout  # Raises if the stages do not hold the model's layers.

    # Layout and parameters

    @cached_property
    def lowered(self) -> LoweredSchedule:
        """The training schedule as the columns that are scanned over."""
        return lower(self.plan.tick_table())

    @cached_property
    def layout(self) -> layouts.LayerLayout:
        """Which layer is on which device."""
        return layouts.layer_layout(self.config, self.plan.build_schedule(), self.plan.layers_per_stage)

    @cached_property
    def _shapes(self) -> dict:
        return jax.eval_shape(lambda: self._initial(jnp.uint32(0)))

    @cached_property
    def leaf_shardings(self) -> dict:
        """`LeafSharding` of every parameter."""
        return layouts.shardings(self._shapes, self.mesh)

    @cached_property
    def param_shardings(self) -> dict:
        """`NamedSharding` at rest of every parameter."""
        return layouts.named_shardings(self.leaf_shardings, self.mesh)

    @cached_property
    def abstract_params(self) -> dict:
        """Shapes, dtypes and shardings of the parameters at rest, in device layout."""
        return _abstract(self._shapes, self.param_shardings)

    @cached_property
    def abstract_logical(self) -> dict:
        """Shapes, dtypes and shardings of the parameters in logical layout."""
        shapes = jax.eval_shape(self._to_logical, self._shapes)
        return _abstract(shapes, layouts.logical_shardings(self.config, self.layout, self._shapes, self.mesh))

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of batch leaves [M, B, S]."""
        return NamedSharding(self.mesh, P(None, BATCH, None))

    @property
    def compiler_options(self) -> dict[str, str]:
        """What XLA is told for programs that run the plan, by name."""
        return compiler_options(self.mesh, chunks=self.plan.dispatch_chunks)

    def init_params(self, seed: int) -> dict:
        """Initial parameters on their devices; the same logical values on every mesh."""
        return jax.jit(self._initial, out_shardings=self.param_shardings)(np.uint32(seed))

    def to_logical(self, tree: dict, placement: jax.Array | None = None) -> dict:
        """Device layout, experts where the placement says, to logical, mesh-independent arrays."""
        out = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_logical)
        return jax.jit(self._to_logical, out_shardings=out)(tree, placement)

    def from_logical(self, tree: dict, placement: jax.Array | None = None) -> dict:
        """Logical arrays to device layout, experts where the placement says."""
        return jax.jit(self._from_logical, out_shardings=self.param_shardings)(tree, placement)

    def move_experts(self, tree: dict, source: jax.Array) -> dict:
        """A tree in device layout, its physical expert e of a layer that at `source` [layer, e] in the given one."""
        return jax.jit(self._move_experts, out_shardings=self.param_shardings)(tree, source)

    def _initial(self, seed: jax.Array) -> dict:
        outer = transformer.init_outer(self.config, seed)
        layers = {}
        for kind, ids in self.layout.layer_ids.items():
            stack = transformer.init_layers(self.config, kind, jnp.maximum(jnp.asarray(ids), 0), seed)
            held = ids != layouts.NO_LAYER
            if not held.all():
                stack = jax.tree.map(lambda leaf, held=held: _masked(leaf, held), stack)
            layers[kind] = stack
        pad = layouts.padded_vocabulary(self.config.vocab_size, self.plan.pipe) - self.config.vocab_size
        padded = {k: v if k == "final_norm" else jnp.pad(v, ((0, pad), (0, 0))) for k, v in outer.items()}
        return jax.tree.map(lambda leaf: leaf.astype(self.master_dtype), {**padded, "layers": layers})

    def _to_logical(self, tree: dict, placement: jax.Array | None = None) -> dict:
        if placement is not None:
            tree = self._move_experts(tree, placement)
        return layouts.logical_from_device(self.config, self.layout, tree)

    def _from_logical(self, tree: dict, placement: jax.Array | None = None) -> dict:
        tree = layouts.device_from_logical(self.config, self.layout, self.plan.pipe, tree)
        return tree if placement is None else self._move_experts(tree, placements.inverse(placement))

    def _move_experts(self, tree: dict, source: jax.Array) -> dict:
        return placements.moved_experts(
            self.config, self.layout, self.leaf_shardings, self.mesh, tree, source
        )

    # Steps

    def gradients(
        self, params: dict, router_bias: jax.Array, batch: dict, placement: jax.Array | None = None
    ) -> tuple[dict, StepStats]:
        """Gradients of a step's loss and its statistics (traceable; call inside jit).

        Args:
          params: as `abstract_params`.
          router_bias: `[num_moe_layers, E]` float32.
          batch: `BATCH_FIELDS`, each [M, B, S]; weights float32, the others int32.
          placement: `[num_moe_layers, E]` int32, the physical expert of every logical one; None if they are the same.
        """
        specs = jax.tree.map(lambda leaf: leaf.gradient_spec, self.leaf_shardings)
        return self._run(self.lowered, params, (router_bias, placement), batch, grad_specs=specs)

    def evaluate(
        self, params: dict, router_bias: jax.Array, batch: dict, placement: jax.Array | None = None
    ) -> StepStats:
        """Loss and statistics of a batch without gradients (traceable; call inside jit)."""
        microbatches = batch["tokens"].shape[0]
        lowered = lower(pack(forward_only_like(self.plan.build_schedule(), microbatches)))
        return self._run(lowered, params, (router_bias, placement), batch, grad_specs={})[1]

    def _run(self, lowered: LoweredSchedule, params, by_layer: tuple, batch, *, grad_specs):
        param_specs = jax.tree.map(lambda leaf: leaf.spec, self.leaf_shardings)
        runs = self.layout.runs
        table = LayerTable(self.layout.index, self.layout.moe_index, runs.first, runs.count, runs.last)
        columns = (lowered.rank_columns.__dict__, lowered.tick_columns.__dict__)

        step = Step(
            config=self.config,
            plan=self.plan,
            layout=self.layout,
            leaf_shardings=self.leaf_shardings,
            lowered=lowered,
            dtype=self.dtype,
            master_dtype=self.master_dtype,
            buffer_fill=self.buffer_fill,
            layer_functions=self.layer_functions,
        )

        def body(params, by_layer, batch, table, columns):
            return step.run(params, by_layer, batch, table, columns)

        stats_specs = (P(), P(), P(), P(PIPE), P())
        grads, (loss, aux, num_tokens, load, overflow) = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(param_specs, P(), P(None, BATCH, None), P(PIPE), (P(None, PIPE), P())),
            out_specs=(grad_specs, stats_specs),
            check_vma=True,
        )(params, by_layer, {name: batch[name] for name in BATCH_FIELDS}, table, columns)
        load = load.reshape(self.layout.layer.size, self.config.num_experts)[self._moe_places]
        return grads, StepStats(loss, aux / batch["tokens"].shape[0], num_tokens, load, overflow)

    @cached_property
    def _moe_places(self) -> np.ndarray:
        """Flat [pipe, chunk, position] index of every MoE layer, in layer order."""
        place = {int(layer): at for at, layer in enumerate(self.layout.layer.ravel())}
        return np.array([place[layer] for layer in self.config.moe_layers], np.int32)


def _masked(leaf: jax.Array, held: np.ndarray) -> jax.Array:
    mask = held.reshape(*held.shape, *(1,) * (leaf.ndim - held.ndim))
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def _abstract(shapes: dict, named: dict) -> dict:
    return jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), shapes, named)
