"""One step of the executor on one device: the scan over ticks, written at trace time.

A tick, on every device:

    exchange   activations go to the next stage's rank, gradients to the previous one's
    embedding  if some rank starts a microbatch                   [all pipe ranks together]
    F          if this rank's row says so
    head       if some rank ended the forward of a microbatch     [all pipe ranks together]
    B          if this rank's row says so
    W          weight gradients, where backward comes in two parts
    embedding gradient, likewise                                  [all pipe ranks together]

That is with the vocabulary split over the pipe ranks; whole, embedding and head belong to the rank of the first and
of the last stage alone. A table in which no B follows its own F within a tick has the head at the start of the next
tick instead, and a rank that runs W in place of F does so before the head: all ranks meet there, and nobody should
wait.

Both exchanges stand at the very start: placed between F and B they would make the backward of one rank wait
for the forward of its neighbour. Branches depend on the pipe rank only, so collectives over data and expert
inside them always meet their partners. Nothing differentiates through the scan: memory follows the
schedule's slots, not the number of microbatches.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from meshes.axes import AXES, BATCH, EXPERT, PIPE
from models import transformer
from models.config import ModelConfig
from models.layers import LayerContext, rotation
from piperjax.planner.plan import Plan
from piperjax.runtime import slots, step_end
from piperjax.runtime.choice import choose
from piperjax.runtime.dispatch import make_experts
from piperjax.runtime.grouped_matmul import grouped_matmul
from piperjax.runtime.layout import LayerLayout
from piperjax.runtime.passes import MEMORY_MODES, LayerPasses, Surroundings
from piperjax.runtime.stage import Buffers, LayerTable, Place, Stage, Totals
from piperjax.runtime.varying import vary
from piperjax.runtime.vocabulary import add_embedding_gradient, axis_of, embed, from_owner, head_loss
from piperjax.schedules.lower import LoweredSchedule


class _Carry(NamedTuple):
    """Per device: state between ticks. Absent parts are None.

    Attributes:
      y, g: activation and gradient that leave at the next exchange, [B, S, D].
      inputs, gradients: slot buffers of what has arrived.
      stash: slot buffers of what forwards keep for backwards.
      taps: slot buffers of what input gradients leave for weight gradients.
      grads: gradient accumulators in device layout.
      loss: this device's share of the loss.
      totals: what forwards add up.
    """

    y: jax.Array
    g: jax.Array | None
    inputs: jax.Array | None
    gradients: jax.Array | None
    stash: Buffers | None
    taps: Buffers | None
    grads: dict | None
    loss: jax.Array
    totals: Totals


@dataclass(frozen=True, kw_only=True)
class Step:
    """Per device: one run over a lowered schedule, at trace time.

    Attributes:
      config, plan, layout: the model, how it is laid out, and which layer is where.
      leaf_shardings: `LeafSharding` of every parameter.
      lowered: the schedule as columns.
      dtype, master_dtype, buffer_fill, layer_functions: as in `Executor`.
    """

    config: ModelConfig
    plan: Plan
    layout: LayerLayout
    leaf_shardings: dict
    lowered: LoweredSchedule
    dtype: str
    master_dtype: str
    buffer_fill: float
    layer_functions: dict[str, Any] | None

    def run(self, params: dict, by_layer: tuple, batch: dict, table: LayerTable, columns: tuple[dict, dict]):
        """Per device: runs every tick.

        Args:
          params: this device's share at rest.
          by_layer: what `Surroundings` has of every layer with experts, router bias first, `[num_moe_layers, E]` each.
          batch: this device's rows [M, B, S].
          table: layer columns, `[1, chunk, position]`.
          columns: rank columns `[ticks, 1, ...]` and tick columns `[ticks]` of the lowered schedule, by name.

        Returns:
          Gradients at rest (empty without backward), and (loss, aux loss, tokens, load, overflow).
        """
        copy = step_end.compute_copy(params, self.leaf_shardings, self.plan, self.dtype)
        scan = _Scan(self, copy, vary(by_layer), batch, table)
        rank_columns = {name: column[:, 0] for name, column in columns[0].items()}
        carry, _ = lax.scan(scan.tick, scan.initial_carry(), (rank_columns, columns[1]))
        grads = {}
        if self.lowered.has_backward:
            grads = step_end.reduced(carry.grads, self.leaf_shardings, self.plan)
        sums = [lax.psum(value, AXES) for value in (carry.loss, carry.totals.aux, carry.totals.overflow)]
        load = lax.psum(carry.totals.load, BATCH)[None]
        return grads, (sums[0], sums[1], scan.num_tokens, load, sums[2])


class _Scan:
    """Per device: what every tick reads besides its columns, and the tick itself."""

    def __init__(self, step: Step, params: dict, by_layer: tuple, batch: dict, table: LayerTable):
        self.config, self.plan, self.lowered = step.config, step.plan, step.lowered
        self.dtype, self.master_dtype, self.buffer_fill = step.dtype, step.master_dtype, step.buffer_fill
        self.params, self.by_layer, self.batch = params, by_layer, vary(batch)
        wide = jnp.promote_types(step.dtype, jnp.float32)
        self.num_tokens = lax.psum(batch["weights"].sum(), BATCH)
        # An all-padding batch has no loss and must not divide by zero.
        self.loss_scale = vary(1.0 / jnp.maximum(self.num_tokens.astype(wide), 1.0))
        self.aux_scale = vary(jnp.asarray(1.0 / batch["tokens"].shape[0], wide))
        self.splits_vocabulary = self.plan.vocabulary == "split"
        self.vocabulary_axis = axis_of(self.plan.vocabulary)
        # Only then is a backward independent of the forward of its tick.
        self.overlaps = self.plan.overlap and self.lowered.has_backward and self.lowered.head_comes_first
        passes = dict(overflow=self.plan.overflow, splits=self.lowered.num_tap_slots > 0)
        self.experts = make_experts(
            self.plan.dispatch, EXPERT, self.plan.capacity_factor, chunks=self.plan.dispatch_chunks, **passes
        )
        functions = step.layer_functions or {
            kind: transformer.layer_function(self.config, kind) for kind in self.config.kinds
        }
        mode = MEMORY_MODES[self.plan.memory_mode]
        self.x = vary(jnp.zeros((*batch["tokens"].shape[1:], self.config.d_model), self.dtype))
        self.stage = Stage(
            layout=step.layout,
            passes={kind: self._passes(kind, function, mode.policy) for kind, function in functions.items()},
            by_stage=mode.by_stage,
            params=params["layers"],
            table=LayerTable(*(column[0] for column in table)),
            empty=self._empty,
        )

    def _passes(self, kind: str, function, policy) -> LayerPasses:
        weights = jax.tree.map(lambda leaf: leaf[0, 0, 0], self.params["layers"][kind])
        return LayerPasses(
            function,
            policy,
            self._context,
            weights,
            self.x,
            self._surroundings_of(np.int32(0))(np.int32(0)),
            trains=self.lowered.has_backward,
            splits=self.lowered.num_tap_slots > 0,
        )

    def _empty(self, shape: tuple[int, ...], dtype) -> jax.Array:
        """A buffer of what must not be read."""
        if jnp.issubdtype(dtype, jnp.floating):
            return vary(jnp.full(shape, self.buffer_fill, dtype))
        poison = self.buffer_fill != 0 and jnp.issubdtype(dtype, jnp.integer)
        return vary(jnp.full(shape, jnp.iinfo(dtype).max if poison else 0, dtype))

    def initial_carry(self) -> _Carry:
        lowered = self.lowered
        wide = jnp.promote_types(self.dtype, jnp.float32)
        trains, chunks = lowered.has_backward, lowered.table.schedule.num_chunks

        def buffer(*count):
            return self._empty((*count, *self.x.shape), self.x.dtype)

        def accumulators():
            dtypes = dict(master_dtype=self.master_dtype, gradient_dtype=self.plan.gradient_dtype)
            return step_end.accumulators(self.params, **dtypes)

        load = (chunks, self.stage.layout.positions, self.config.num_experts)
        return vary(
            _Carry(
                y=buffer(),
                g=buffer() if trains else None,
                inputs=buffer(lowered.num_input_slots + 1) if lowered.num_input_slots else None,
                gradients=buffer(lowered.num_gradient_slots + 1) if trains else None,
                stash=self.stage.stash_buffers(lowered.num_stash_slots, self.x) if trains else None,
                taps=self.stage.tap_buffers(lowered.num_tap_slots) if lowered.num_tap_slots else None,
                grads=accumulators() if trains else None,
                loss=jnp.zeros((), wide),
                totals=Totals(jnp.zeros((), wide), jnp.zeros(load, jnp.float32), jnp.zeros((), jnp.float32)),
            )
        )

    def tick(self, carry: _Carry, columns) -> tuple[_Carry, None]:
        rank, tick = columns
        carry = self._exchange(carry, rank)
        if self.lowered.head_comes_first:
            carry = self._head(carry, rank, tick)
        embedded = self._embedding(carry, rank, tick)
        if self.overlaps:
            carry = self._forward_and_backward(carry, rank, embedded)
        else:
            forward = partial(self._forward, rank, self._forward_place(rank), embedded)
            carry = self._when(rank, "forward_on", forward, _unchanged, carry)
        for number in range(self.lowered.early_weight_gradients):
            carry = self._weight_gradient(carry, rank, number)
        if not self.lowered.head_comes_first:
            carry = self._head(carry, rank, tick)
        if self.lowered.has_backward:
            if not self.overlaps:
                backward = partial(self._backward, rank, self._backward_place(rank))
                carry = self._when(rank, "backward_on", backward, _unchanged, carry)
            for number in range(self.lowered.early_weight_gradients, self.lowered.weight_gradients_per_tick):
                carry = self._weight_gradient(carry, rank, number)
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

    def _embedding(self, carry: _Carry, rank: dict, tick: dict) -> jax.Array:
        def look_up():
            tokens = slots.read(self.batch["tokens"], tick["embedding_microbatch"])
            return embed(self.params["embedding"], tokens, self.vocabulary_axis)

        column, name = (tick, "embedding_on") if self.splits_vocabulary else (rank, "forward_is_first")
        return self._when(column, name, look_up, lambda: vary(jnp.zeros_like(carry.y)))

    def _forward_and_backward(self, carry: _Carry, rank: dict, embedded: jax.Array) -> _Carry:
        forward_place, backward_place = self._forward_place(rank), self._backward_place(rank)

        def both(carry):
            (y, totals), (g, layers, taps), stash = self.stage.forward_and_backward(
                forward_place,
                self._forward_input(carry, rank, embedded),
                carry.totals,
                backward_place,
                slots.read(carry.gradients, rank["backward_gradient"]),
                scale=self.aux_scale,
                stash=carry.stash,
                grads=carry.grads["layers"],
                taps=carry.taps,
            )
            grads = {**carry.grads, "layers": layers}
            return carry._replace(y=y, totals=totals, g=g, grads=grads, taps=taps, stash=stash)

        # One after the other, though only one is taken: XLA copies everything that passes a choice among four.
        forward = partial(self._forward, rank, forward_place, embedded)
        backward = partial(self._backward, rank, backward_place)
        columns = self.lowered.rank_columns
        for runs, ends, run in ((1, 1, both), (1, 0, forward), (0, 1, backward)):
            possible = (columns.forward_on == runs) & (columns.backward_on == ends)
            if possible.all():
                return run(carry)
            if possible.any():
                forward_on, backward_on = rank["forward_on"], rank["backward_on"]
                on = (forward_on if runs else 1 - forward_on) * (backward_on if ends else 1 - backward_on)
                carry = choose(on, _unchanged, run, carry)
        return carry

    def _forward_input(self, carry: _Carry, rank: dict, embedded: jax.Array) -> jax.Array:
        if not self.lowered.num_input_slots:
            return embedded
        arrived = slots.read(carry.inputs, rank["forward_input"])
        return jnp.where(rank["forward_is_first"] == 1, embedded, arrived)

    def _forward_place(self, rank: dict) -> Place:
        surroundings_of = self._surroundings_of(rank["forward_microbatch"])
        return Place(rank["forward_chunk"], surroundings_of, slot=rank["forward_stash"])

    def _backward_place(self, rank: dict) -> Place:
        return Place(
            rank["backward_chunk"],
            self._surroundings_of(rank["backward_microbatch"]),
            slot=rank["backward_stash"],
            tap_slot=rank["backward_taps"],
        )

    def _forward(self, rank: dict, place: Place, embedded: jax.Array, carry: _Carry) -> _Carry:
        x = self._forward_input(carry, rank, embedded)
        y, totals, stash = self.stage.forward(place, x, carry.totals, carry.stash)
        return carry._replace(y=y, totals=totals, stash=stash)

    def _head(self, carry: _Carry, rank: dict, tick: dict) -> _Carry:
        trains = self.lowered.has_backward
        head_name = "head" if "head" in self.params else "embedding"

        def run(carry):
            microbatch = tick["head_microbatch"]
            is_owner = self._after_weight_gradients(rank["head_owner"] == 1, carry)
            result = head_loss(
                from_owner(carry.y, is_owner, self.vocabulary_axis),
                slots.read(self.batch["targets"], microbatch),
                slots.read(self.batch["weights"], microbatch),
                head=self.params[head_name],
                final_norm=self.params["final_norm"],
                norm_eps=self.config.norm_eps,
                vocab_size=self.config.vocab_size,
                scale=self.loss_scale,
                with_gradient=trains,
                axis=self.vocabulary_axis,
            )
            loss = result.loss if trains else result
            carry = carry._replace(loss=carry.loss + jnp.where(is_owner, loss, jnp.zeros((), loss.dtype)))
            if not trains:
                return carry
            grads = dict(carry.grads)
            grads[head_name] = step_end.added(grads[head_name], result.head)
            grads["final_norm"] = step_end.added(grads["final_norm"], result.final_norm)
            gradients = slots.write(carry.gradients, result.hidden, rank["head_gradient"])
            return carry._replace(grads=grads, gradients=gradients)

        column, name = (tick, "head_on") if self.splits_vocabulary else (rank, "head_owner")
        return self._when(column, name, run, _unchanged, carry)

    def _backward(self, rank: dict, place: Place, carry: _Carry) -> _Carry:
        g, layers, taps = self.stage.backward(
            place,
            slots.read(carry.gradients, rank["backward_gradient"]),
            scale=self.aux_scale,
            stash=carry.stash,
            grads=carry.grads["layers"],
            taps=carry.taps,
        )
        return carry._replace(g=g, grads={**carry.grads, "layers": layers}, taps=taps)

    def _weight_gradient(self, carry: _Carry, rank: dict, number: int) -> _Carry:
        columns = {
            name: column[number] for name, column in rank.items() if name.startswith("weight_gradient_")
        }
        place = Place(
            columns["weight_gradient_chunk"],
            self._surroundings_of(columns["weight_gradient_microbatch"]),
            tap_slot=columns["weight_gradient_taps"],
        )

        def run(layers):
            return self.stage.weight_gradient(place, grads=layers, taps=carry.taps)

        on, layers = columns["weight_gradient_on"], carry.grads["layers"]
        layers = choose(on, _unchanged, run, layers, turn=number)
        return carry._replace(grads={**carry.grads, "layers": layers})

    def _after_weight_gradients(self, flag: jax.Array, carry: _Carry) -> jax.Array:
        """The same flag, not known before the weight gradients that precede it in the tick.

        Without it the compiler is free to run them after a collective, and then the other ranks, which have
        filled their idle time, wait for this one.
        """
        if not self.lowered.num_tap_slots:
            return flag
        largest = max(jax.tree.leaves(carry.grads["layers"]), key=lambda leaf: leaf.size)
        element = lax.slice(largest, (0,) * largest.ndim, (1,) * largest.ndim).reshape(())
        return flag & (element != -jnp.inf)

    def _embedding_gradient(self, carry: _Carry, rank: dict, tick: dict) -> _Carry:
        def run(carry):
            is_owner = (rank["backward_is_first"] == 1) & (rank["backward_on"] == 1)
            is_owner = self._after_weight_gradients(is_owner, carry)
            tokens = slots.read(self.batch["tokens"], tick["embedding_gradient_microbatch"])
            gradient = from_owner(carry.g, is_owner, self.vocabulary_axis)
            total = add_embedding_gradient(carry.grads["embedding"], tokens, gradient, self.vocabulary_axis)
            return carry._replace(grads={**carry.grads, "embedding": total})

        in_tick, in_rank = (tick, "embedding_gradient_on"), (rank, "backward_is_first")
        column, name = in_tick if self.splits_vocabulary else in_rank
        return self._when(column, name, run, _unchanged, carry)

    def _when(self, column: dict, name: str, run, otherwise, *operands):
        """Runs where the column says so; without a branch if it says so in every tick and on every rank."""
        columns = self.lowered.rank_columns.__dict__ | self.lowered.tick_columns.__dict__
        if (columns[name] == 1).all():
            return run(*operands)
        return choose(column[name], otherwise, run, *operands)

    def _surroundings_of(self, microbatch: jax.Array):
        """Arrays of a layer's context for a microbatch, as a function of the index among MoE layers.

        Called outside the branches of a tick: read inside, every operation that needs a row would slice the whole
        batch anew, element by element, and attention's mask alone would take as long as its products on a CPU.
        """
        positions, segment_ids = (
            slots.read(self.batch[name], microbatch) for name in ("positions", "segment_ids")
        )
        rotaries = {layer.attention.rotary for layer in self.config.kinds.values()}
        rows = {key: rotation(positions, *key, self.dtype) for key in sorted(rotaries)}, segment_ids

        def surroundings(moe_index):
            if not self.config.moe_layers:
                return Surroundings(*rows, *self.by_layer)
            return Surroundings(*rows, *jax.tree.map(lambda rows: slots.read(rows, moe_index), self.by_layer))

        return surroundings

    def _context(self, surroundings: Surroundings) -> LayerContext:
        return LayerContext(
            rotation=lambda width, theta: surroundings.rotations[width, theta],
            segment_ids=surroundings.segment_ids,
            router_bias=surroundings.router_bias,
            experts=partial(self.experts, placement=surroundings.placement),
            grouped_matmul=grouped_matmul,
            all_sum=lambda x: vary(lax.psum(x, BATCH)),
            num_shards=self.plan.data * self.plan.expert,
        )


def _unchanged(given: Any) -> Any:
    return given


def _shifted(x: jax.Array, shift: int, size: int) -> jax.Array:
    if shift == 0:
        return x
    return lax.ppermute(x, PIPE, [(rank, (rank + shift) % size) for rank in range(size)])
