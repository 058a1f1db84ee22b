"""The executor: interprets any tick table as one `lax.scan` inside one `shard_map`.

A tick, on every device:

    exchange   activations go to the next stage's rank, gradients to the previous one's
    embedding  if some rank starts a microbatch                   [all pipe ranks together]
    F          if this rank's row says so
    head       if some rank ended the forward of a microbatch     [all pipe ranks together]
    B          if this rank's row says so
    embedding gradient, likewise                                  [all pipe ranks together]

Both exchanges stand at the very start: placed between F and B they would make the backward of one rank wait
for the forward of its neighbour. Branches depend on the pipe rank only, so collectives over data and expert
inside them always meet their partners. Nothing differentiates through the scan: memory follows the
schedule's slots, not the number of microbatches.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from meshes.axes import AXES, BATCH, EXPERT, PIPE
from models import transformer
from models.config import ModelConfig
from models.moe import LayerContext
from piperjax.planner.plan import Plan
from piperjax.runtime import layout as layouts
from piperjax.runtime import slots
from piperjax.runtime.dispatch import make_experts
from piperjax.runtime.grouped_matmul import grouped_matmul
from piperjax.runtime.stage import LayerTable, Stage, Totals
from piperjax.runtime.varying import vary
from piperjax.runtime.vocabulary import add_embedding_gradient, embed, from_owner, head_loss
from piperjax.schedules.classic import forward_only
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
      dropped: rows dropped by a capacity limit.
    """

    loss: jax.Array
    aux_loss: jax.Array
    num_tokens: jax.Array
    load: jax.Array
    dropped: jax.Array


class _Carry(NamedTuple):
    """Per device: state between ticks. Absent parts are None.

    Attributes:
      y, g: activation and gradient that leave at the next exchange, [B, S, D].
      inputs, gradients, stash: slot buffers.
      grads: gradient accumulators in device layout, without the pipe dimension.
      loss: this device's share of the loss.
      totals: what forwards add up.
    """

    y: jax.Array
    g: jax.Array | None
    inputs: jax.Array | None
    gradients: jax.Array | None
    stash: jax.Array | None
    grads: dict | None
    loss: jax.Array
    totals: Totals


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

    def init_params(self, seed: int) -> dict:
        """Initial parameters on their devices; the same logical values on every mesh."""
        return jax.jit(self._initial, out_shardings=self.param_shardings)(np.uint32(seed))

    def to_logical(self, tree: dict) -> dict:
        """Device layout to logical, mesh-independent arrays."""
        out = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_logical)
        return jax.jit(self._to_logical, out_shardings=out)(tree)

    def from_logical(self, tree: dict) -> dict:
        """Logical arrays to device layout."""
        return jax.jit(self._from_logical, out_shardings=self.param_shardings)(tree)

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

    def _to_logical(self, tree: dict) -> dict:
        return layouts.logical_from_device(self.config, self.layout, tree)

    def _from_logical(self, tree: dict) -> dict:
        return layouts.device_from_logical(self.config, self.layout, self.plan.pipe, tree)

    # Steps

    def gradients(self, params: dict, router_bias: jax.Array, batch: dict) -> tuple[dict, StepStats]:
        """Gradients of a step's loss and its statistics (traceable; call inside jit).

        Args:
          params: as `abstract_params`.
          router_bias: `[num_moe_layers, E]` float32.
          batch: `BATCH_FIELDS`, each [M, B, S]; weights float32, the others int32.
        """
        specs = jax.tree.map(lambda leaf: leaf.spec, self.leaf_shardings, is_leaf=_is_leaf_sharding)
        return self._run(self.lowered, params, router_bias, batch, grad_specs=specs)

    def evaluate(self, params: dict, router_bias: jax.Array, batch: dict) -> StepStats:
        """Loss and statistics of a batch without gradients (traceable; call inside jit)."""
        microbatches = batch["tokens"].shape[0]
        lowered = lower(pack(forward_only(self.plan.pipe, microbatches)))
        return self._run(lowered, params, router_bias, batch, grad_specs={})[1]

    def _run(self, lowered: LoweredSchedule, params, router_bias, batch, *, grad_specs):
        param_specs = jax.tree.map(lambda leaf: leaf.spec, self.leaf_shardings, is_leaf=_is_leaf_sharding)
        table = LayerTable(self.layout.kind, self.layout.index, self.layout.moe_index)
        columns = (lowered.rank_columns.__dict__, lowered.tick_columns.__dict__)

        def body(params, router_bias, batch, table, columns):
            return _Step(self, lowered).run(params, router_bias, batch, table, columns)

        stats_specs = (P(), P(), P(), P(PIPE), P())
        grads, (loss, aux, num_tokens, load, dropped) = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(param_specs, P(), P(None, BATCH, None), P(PIPE), (P(None, PIPE), P())),
            out_specs=(grad_specs, stats_specs),
            check_vma=True,
        )(params, router_bias, {name: batch[name] for name in BATCH_FIELDS}, table, columns)
        load = load.reshape(self.layout.layer.size, self.config.num_experts)[self._moe_places]
        return grads, StepStats(loss, aux / batch["tokens"].shape[0], num_tokens, load, dropped)

    @cached_property
    def _moe_places(self) -> np.ndarray:
        """Flat [pipe, chunk, position] index of every MoE layer, in layer order."""
        place = {int(layer): at for at, layer in enumerate(self.layout.layer.ravel())}
        return np.array([place[layer] for layer in self.config.moe_layers], np.int32)


class _Step:
    """Per device: one run over a lowered schedule, at trace time."""

    def __init__(self, executor: Executor, lowered: LoweredSchedule):
        self.executor, self.lowered = executor, lowered
        self.config, self.plan = executor.config, executor.plan
        functions = executor.layer_functions or {
            kind: transformer.layer_function(self.config, kind) for kind in self.config.kinds
        }
        self.stage = Stage(layout=executor.layout, functions=functions, memory_mode=self.plan.memory_mode)
        self.experts = make_experts(self.plan.dispatch, EXPERT, self.plan.capacity_factor)

    def run(self, params, router_bias, batch, table, columns):
        self.params = self._compute_copy(params)
        self.router_bias, self.batch = vary(router_bias), vary(batch)
        self.table = LayerTable(*(column[0] for column in table))
        num_tokens = lax.psum(batch["weights"].sum(), BATCH)
        # An all-padding batch has no loss and must not divide by zero.
        wide = jnp.promote_types(self.executor.dtype, jnp.float32)
        self.loss_scale = vary(1.0 / jnp.maximum(num_tokens.astype(wide), 1.0))
        self.aux_scale = vary(jnp.asarray(1.0 / batch["tokens"].shape[0], wide))
        rank_columns = {name: column[:, 0] for name, column in columns[0].items()}
        carry, _ = lax.scan(self._tick, self._initial_carry(), (rank_columns, columns[1]))
        grads = self._reduced(carry.grads) if self.lowered.has_backward else {}
        sums = [lax.psum(value, AXES) for value in (carry.loss, carry.totals.aux, carry.totals.dropped)]
        load = lax.psum(carry.totals.load, BATCH)[None]
        return grads, (sums[0], sums[1], num_tokens, load, sums[2])

    # Before and after the scan

    def _compute_copy(self, params: dict) -> dict:
        """Parameters cast to the compute dtype, gathered from their split at rest, without the pipe dimension."""

        def gather(leaf, sharding):
            if sharding.gather_axes:
                leaf = lax.all_gather(leaf, sharding.gather_axes, axis=sharding.gather_dimension, tiled=True)
            return vary(leaf)

        gathered = _map_shardings(gather, transformer.cast_params(params, self.executor.dtype), self.executor)
        return {**gathered, "layers": jax.tree.map(lambda leaf: leaf[0], gathered["layers"])}

    def _reduced(self, grads: dict) -> dict:
        """Gradients summed over the devices that hold copies, split as the parameters are at rest."""

        def reduce(leaf, sharding):
            if sharding.gather_axes:
                return lax.psum_scatter(
                    leaf, sharding.gather_axes, scatter_dimension=sharding.gather_dimension, tiled=True
                )
            return lax.psum(leaf, sharding.reduce_axes)

        grads = {**grads, "layers": jax.tree.map(lambda leaf: leaf[None], grads["layers"])}
        return _map_shardings(reduce, grads, self.executor)

    def _initial_carry(self) -> _Carry:
        lowered, dtype = self.lowered, jnp.dtype(self.executor.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        hidden = (*self.batch["tokens"].shape[1:], self.config.d_model)
        trains, chunks = lowered.has_backward, lowered.table.schedule.num_chunks

        def buffer(slots, *shape):
            return jnp.full((slots, *shape, *hidden), self.executor.buffer_fill, dtype)

        def accumulator(leaf):
            return jnp.zeros(leaf.shape, jnp.promote_types(self.executor.master_dtype, jnp.float32))

        load = (chunks, self.stage.layout.positions, self.config.num_experts)
        return vary(
            _Carry(
                y=jnp.full(hidden, self.executor.buffer_fill, dtype),
                g=jnp.full(hidden, self.executor.buffer_fill, dtype) if trains else None,
                inputs=buffer(lowered.num_input_slots + 1) if lowered.num_input_slots else None,
                gradients=buffer(lowered.num_gradient_slots + 1) if trains else None,
                stash=buffer(lowered.num_stash_slots, self.stage.stash_positions) if trains else None,
                grads=jax.tree.map(accumulator, self.params) if trains else None,
                loss=jnp.zeros((), wide),
                totals=Totals(jnp.zeros((), wide), jnp.zeros(load, jnp.float32), jnp.zeros((), jnp.float32)),
            )
        )

    # One tick

    def _tick(self, carry: _Carry, columns) -> tuple[_Carry, None]:
        rank, tick = columns
        carry = self._exchange(carry, rank)
        embedded = self._embedding(carry, tick)
        carry = self._forward(carry, rank, embedded)
        carry = self._head(carry, rank, tick)
        if self.lowered.has_backward:
            carry = self._backward(carry, rank)
            carry = self._embedding_gradient(carry, rank, tick)
        return carry, None

    def _exchange(self, carry: _Carry, rank: dict) -> _Carry:
        inputs, gradients = carry.inputs, carry.gradients
        for channel, shift in enumerate(self.lowered.forward_channels):
            arrived = _shifted(carry.y, shift, self.plan.pipe)
            inputs = slots.write(inputs, arrived, rank["input_arrival"][channel])
        for channel, shift in enumerate(self.lowered.backward_channels):
            arrived = _shifted(carry.g, shift, self.plan.pipe)
            gradients = slots.write(gradients, arrived, rank["gradient_arrival"][channel])
        return carry._replace(inputs=inputs, gradients=gradients)

    def _embedding(self, carry: _Carry, tick: dict) -> jax.Array:
        def look_up():
            tokens = slots.read(self.batch["tokens"], tick["embedding_microbatch"])
            return embed(self.params["embedding"], tokens)

        return lax.cond(tick["embedding_on"] == 1, look_up, lambda: vary(jnp.zeros_like(carry.y)))

    def _forward(self, carry: _Carry, rank: dict, embedded: jax.Array) -> _Carry:
        def run(carry):
            x = embedded
            if self.lowered.num_input_slots:
                arrived = slots.read(carry.inputs, rank["forward_input"])
                x = jnp.where(rank["forward_is_first"] == 1, embedded, arrived)
            keep = (None, None)
            if self.lowered.has_backward:

                def write(stash, position, x):
                    return slots.write(stash, x, rank["forward_stash"], position)

                keep = (write, carry.stash)
            y, totals, stash = self.stage.forward(
                self.params["layers"],
                self.table,
                rank["forward_chunk"],
                x,
                self._context_of(rank["forward_microbatch"]),
                carry.totals,
                keep,
            )
            return carry._replace(y=y, totals=totals, stash=stash)

        return lax.cond(rank["forward_on"] == 1, run, lambda carry: carry, carry)

    def _head(self, carry: _Carry, rank: dict, tick: dict) -> _Carry:
        trains = self.lowered.has_backward
        head_name = "head" if "head" in self.params else "embedding"

        def run(carry):
            microbatch = tick["head_microbatch"]
            is_owner = (rank["forward_is_last"] == 1) & (rank["forward_on"] == 1)
            result = head_loss(
                from_owner(carry.y, is_owner),
                slots.read(self.batch["targets"], microbatch),
                slots.read(self.batch["weights"], microbatch),
                head=self.params[head_name],
                final_norm=self.params["final_norm"],
                norm_eps=self.config.norm_eps,
                vocab_size=self.config.vocab_size,
                scale=self.loss_scale,
                with_gradient=trains,
            )
            loss = result.loss if trains else result
            carry = carry._replace(loss=carry.loss + jnp.where(is_owner, loss, jnp.zeros((), loss.dtype)))
            if not trains:
                return carry
            grads = dict(carry.grads)
            grads[head_name] = grads[head_name] + result.head.astype(grads[head_name].dtype)
            grads["final_norm"] = grads["final_norm"] + result.final_norm.astype(grads["final_norm"].dtype)
            gradients = slots.write(carry.gradients, result.hidden, rank["head_gradient"])
            return carry._replace(grads=grads, gradients=gradients)

        return lax.cond(tick["head_on"] == 1, run, lambda carry: carry, carry)

    def _backward(self, carry: _Carry, rank: dict) -> _Carry:
        def run(carry):
            def read(position):
                return slots.read(carry.stash, rank["backward_stash"], position)

            g, layers = self.stage.backward(
                self.params["layers"],
                self.table,
                rank["backward_chunk"],
                read,
                slots.read(carry.gradients, rank["backward_gradient"]),
                context_of=self._context_of(rank["backward_microbatch"]),
                scale=self.aux_scale,
                grads=carry.grads["layers"],
            )
            return carry._replace(g=g, grads={**carry.grads, "layers": layers})

        return lax.cond(rank["backward_on"] == 1, run, lambda carry: carry, carry)

    def _embedding_gradient(self, carry: _Carry, rank: dict, tick: dict) -> _Carry:
        def run(carry):
            is_owner = (rank["backward_is_first"] == 1) & (rank["backward_on"] == 1)
            tokens = slots.read(self.batch["tokens"], tick["embedding_gradient_microbatch"])
            total = add_embedding_gradient(carry.grads["embedding"], tokens, from_owner(carry.g, is_owner))
            return carry._replace(grads={**carry.grads, "embedding": total})

        return lax.cond(tick["embedding_gradient_on"] == 1, run, lambda carry: carry, carry)

    def _context_of(self, microbatch: jax.Array):
        """Layer context of a microbatch, as a function of the index among MoE layers."""
        positions, segment_ids = (
            slots.read(self.batch[name], microbatch) for name in ("positions", "segment_ids")
        )

        def context(moe_index):
            return LayerContext(
                positions=positions,
                segment_ids=segment_ids,
                router_bias=slots.read(self.router_bias, moe_index)
                if self.config.moe_layers
                else self.router_bias,
                experts=self.experts,
                grouped_matmul=grouped_matmul,
                all_sum=_sum_over_batch,
                num_shards=self.plan.data * self.plan.expert,
            )

        return context


def _sum_over_batch(x: jax.Array) -> jax.Array:
    return vary(lax.psum(x, BATCH))


def _shifted(x: jax.Array, shift: int, size: int) -> jax.Array:
    if shift == 0:
        return x
    return lax.ppermute(x, PIPE, [(rank, (rank + shift) % size) for rank in range(size)])


def _masked(leaf: jax.Array, held: np.ndarray) -> jax.Array:
    mask = held.reshape(*held.shape, *(1,) * (leaf.ndim - held.ndim))
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def _is_leaf_sharding(x: object) -> bool:
    return isinstance(x, layouts.LeafSharding)


def _map_shardings(function, tree: dict, executor: Executor) -> dict:
    return jax.tree.map(lambda sharding, leaf: function(leaf, sharding), executor.leaf_shardings, tree,
                        is_leaf=_is_leaf_sharding)  # fmt: skip


def _abstract(shapes: dict, named: dict) -> dict:
    return jax.tree.map(lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), shapes, named)
