"""The layers of one stage, forward and backward, as scans over layer positions.

Weights are sliced one layer at a time inside the scan, `leaf[chunk, index]`, and gradients are added in
place at the same index: a slice of a whole chunk would be copied at every tick. Backward is driven by hand,
one layer at a time, so that nothing differentiates through a loop and working memory is one layer's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.runtime import slots
from piperjax.runtime.layout import LayerLayout
from piperjax.runtime.passes import LayerPasses, Surroundings
from piperjax.runtime.varying import vary

# For each layer kind, one buffer [slot, L_kind, ...] per array.
Buffers = dict[str, list[jax.Array]]
SurroundingsOf = Callable[[jax.Array], Surroundings]
# Every run of positions is compiled once more.
MOST_RUNS = 4


class Totals(NamedTuple):
    """Per device: what forwards add up over a step.

    Attributes:
      aux: this device's share of the auxiliary losses, summed over layers and microbatches.
      load: `[chunk, position, E]` rows routed to each expert.
      dropped: rows dropped by a capacity limit.
    """

    aux: jax.Array
    load: jax.Array
    dropped: jax.Array


class LayerTable(NamedTuple):
    """Per device: `[chunk, position]` int32 columns of a `LayerLayout`, this pipe rank's row."""

    kind: jax.Array
    index: jax.Array
    moe_index: jax.Array


class Place(NamedTuple):
    """Per device: where a microbatch's stage finds its own.

    Attributes:
      chunk: which of the rank's stages.
      surroundings_of: arrays of a layer's context as a function of its index among the MoE layers.
      slot: slot of the stash.
      tap_slot: slot of the taps, where backward comes in two parts.
    """

    chunk: jax.Array
    surroundings_of: SurroundingsOf
    slot: jax.Array | None = None
    tap_slot: jax.Array | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Per device: runs the layers of one stage.

    Attributes:
      layout: which layer is where.
      passes: passes of each layer kind.
      by_stage: whether forward keeps the input of the stage only.
      params: layers of this rank by kind, leaves `[chunk, L_kind, ...]`.
      table: layer columns of this rank.
      empty: a buffer of a shape and dtype, filled with what must not be read.
    """

    layout: LayerLayout
    passes: dict[str, LayerPasses]
    by_stage: bool
    params: dict
    table: LayerTable
    empty: Callable[[tuple[int, ...], Any], jax.Array]

    def stash_buffers(self, num_slots: int, x: jax.Array) -> Buffers:
        """Buffers for what forwards keep of `num_slots` microbatches, given an `x` [B, S, D]."""
        if self.by_stage:
            return {"": [self.empty((num_slots, *x.shape), x.dtype)]}
        return self._buffers(num_slots, {kind: passes.kept for kind, passes in self.passes.items()})

    def tap_buffers(self, num_slots: int) -> Buffers:
        """Buffers for what input gradients hand to weight gradients."""
        return self._buffers(num_slots, {kind: passes.taps for kind, passes in self.passes.items()})

    def _buffers(self, num_slots: int, shapes: dict) -> Buffers:
        return {
            kind: [
                self.empty((num_slots, self.layout.layer_ids[kind].shape[2], *one.shape), one.dtype)
                for one in of_kind
            ]
            for kind, of_kind in shapes.items()
        }

    def forward(
        self, place: Place, x: jax.Array, totals: Totals | None, stash: Buffers | None
    ) -> tuple[jax.Array, Totals | None, Buffers | None]:
        """Per device: applies the stage to `x` [B, S, D]; returns its output, totals, and the stash.

        Args:
          place: chunk, surroundings and slot of the microbatch.
          x: stage input.
          totals: `Totals` so far; None if nobody counts.
          stash: what to keep in; None if there is no backward.
        """
        if self.by_stage and stash is not None:
            stash = {"": [slots.write(stash[""][0], x, place.slot)]}
            y, totals, _ = self._layers_forward(place, x, totals, None)
            return y, totals, stash
        return self._layers_forward(place, x, totals, stash)

    def _layers_forward(self, place: Place, x: jax.Array, totals: Totals | None, stash: Buffers | None):
        return lax.scan(self._forward_body(place), (x, totals, stash), self._positions())[0]

    def _forward_body(self, place: Place, kind: int | None = None):
        """One layer, of a known kind if given: ((x, totals, stash), position) -> ((y, totals, stash), None)."""

        def branch(kind: str, position):
            def run(operands):
                x, totals, stash = operands
                index, surroundings = self._at(place, position)
                result, kept = self.passes[kind].forward(
                    self._weights(kind, place.chunk, index), x, surroundings
                )
                if stash is not None:
                    written = [
                        slots.write(buffer, value, place.slot, index)
                        for buffer, value in zip(stash[kind], kept, strict=True)
                    ]
                    stash = {**stash, kind: written}
                if totals is not None:
                    _, aux, load, dropped = vary(result)
                    load = slots.add(totals.load, load, place.chunk, position)
                    totals = Totals(totals.aux + aux, load, totals.dropped + dropped)
                return vary(result.y), totals, stash

            return run

        def body(carry, position):
            with jax.named_scope("forward"):
                branches = [branch(kind, position) for kind in self.layout.kinds]
                return self._switch(place.chunk, position, branches, carry, kind), None

        return body

    def backward(
        self,
        place: Place,
        gradient: jax.Array,
        *,
        scale: jax.Array,
        stash: Buffers,
        grads: dict,
        taps: Buffers | None = None,
    ) -> tuple[jax.Array, dict, Buffers | None]:
        """Per device: gradient of the stage input; weight gradients are added to `grads` in place.

        Args:
          place: chunk, surroundings and slots of the microbatch.
          gradient: gradient of the stage output [B, S, D].
          scale: gradient of the loss with respect to this device's auxiliary loss.
          stash: what forwards kept.
          grads: accumulators like `params`.
          taps: if given, the gradients of large weights are left to `weight_gradient`, which needs these.

        Returns:
          Gradient of the stage input [B, S, D], accumulators, taps.
        """
        slot = place.slot
        if self.by_stage:
            stash, slot, x = (
                self.stash_of_one(),
                jnp.zeros_like(place.slot),
                slots.read(stash[""][0], place.slot),
            )
            stash = self._layers_forward(place._replace(slot=slot), x, None, stash)[2]

        body = self._backward_body(place, slot, scale, stash)
        return lax.scan(body, (gradient, grads, taps), self._positions(), reverse=True)[0]

    def _backward_body(
        self, place: Place, slot: jax.Array, scale: jax.Array, stash: Buffers, kind: int | None = None
    ):
        """One layer, of a known kind if given: ((gradient, grads, taps), position) -> ((input gradient, ...), None)."""

        def branch(kind: str, position):
            passes = self.passes[kind]

            def run(operands):
                gradient, grads, taps = operands
                index, surroundings = self._at(place, position)
                kept = [slots.read(buffer, slot, index) for buffer in stash[kind]]
                weights = self._weights(kind, place.chunk, index)
                arguments = (weights, kept, surroundings, gradient, scale)
                if taps is None:
                    x_grad, weight_grads = passes.backward(*arguments)
                else:
                    x_grad, weight_grads, values = passes.input_gradient(*arguments)
                    written = [
                        slots.write(buffer, value, place.tap_slot, index)
                        for buffer, value in zip(taps[kind], values, strict=True)
                    ]
                    taps = {**taps, kind: written}
                return x_grad, self._added(grads, kind, weight_grads, place.chunk, index), taps

            return run

        def body(carry, position):
            with jax.named_scope("backward"):
                branches = [branch(kind, position) for kind in self.layout.kinds]
                return self._switch(place.chunk, position, branches, carry, kind), None

        return body

    def forward_and_backward(
        self,
        forward_place: Place,
        x: jax.Array,
        totals: Totals,
        backward_place: Place,
        gradient: jax.Array,
        *,
        scale: jax.Array,
        stash: Buffers,
        grads: dict,
        taps: Buffers | None,
    ) -> tuple[tuple[jax.Array, Totals], tuple[jax.Array, dict, Buffers | None], Buffers]:
        """Per device: `forward` of one microbatch and `backward` of another, layer by layer in one loop.

        Nothing in an iteration's forward depends on its backward, so a compiler that schedules for latency puts
        the all-to-all of one under the products of the other (the idea of DualPipe, DeepSeek-V3, 3.2.1). Nothing is
        hidden inside a conditional, so positions at which all ranks hold the same kind of layer are run without one.

        Returns:
          What `forward` returns but the stash, what `backward` returns, the stash.
        """
        last = self.layout.positions - 1

        def body(kinds, carry, position):
            (x, totals), backward_carry, stash = carry
            ahead = self._backward_body(backward_place, backward_place.slot, scale, stash, kinds[1])
            backward_carry, _ = ahead(backward_carry, last - position)
            (x, totals, stash), _ = self._forward_body(forward_place, kinds[0])((x, totals, stash), position)
            return ((x, totals), backward_carry, stash), None

        carry = ((x, totals), (gradient, grads, taps), stash)
        for kinds, positions in self._runs():
            carry = lax.scan(partial(body, kinds), carry, positions)[0]
        return carry

    def _runs(self) -> list[tuple[tuple[int | None, int | None], jax.Array]]:
        """Positions in a row with the same kinds of layer there and as far from the end; None where ranks differ."""
        agreed = self.layout.agreed_kinds
        pairs = list(zip(agreed, reversed(agreed), strict=True))
        if len(list(groupby(pairs))) > MOST_RUNS:
            pairs = [(None, None)] * len(pairs)
        runs = groupby(range(len(pairs)), key=pairs.__getitem__)
        return [(kinds, jnp.array(list(positions), jnp.int32)) for kinds, positions in runs]

    def weight_gradient(self, place: Place, *, grads: dict, taps: Buffers) -> dict:
        """Per device: adds the weight gradients that `backward` left; returns the accumulators."""

        def branch(kind: str, position):
            def run(grads):
                index, surroundings = self._at(place, position)
                values = [slots.read(buffer, place.tap_slot, index) for buffer in taps[kind]]
                weights = self._weights(kind, place.chunk, index)
                weight_grads = self.passes[kind].weight_gradient(weights, values, surroundings)
                return self._added(grads, kind, weight_grads, place.chunk, index)

            return run

        def body(grads, position):
            with jax.named_scope("weight_gradient"):
                branches = [branch(kind, position) for kind in self.layout.kinds]
                return self._switch(place.chunk, position, branches, grads), None

        return lax.scan(body, grads, self._positions())[0]

    def stash_of_one(self) -> Buffers:
        """Buffers for what the layers of one stage keep of one microbatch."""
        return self._buffers(1, {kind: passes.kept for kind, passes in self.passes.items()})

    def _added(self, grads: dict, kind: str, weight_grads: list, chunk: jax.Array, index: jax.Array) -> dict:
        totals, structure = jax.tree.flatten(grads[kind])
        added = [
            total if grad is None else slots.add(total, grad, chunk, index)
            for total, grad in zip(totals, weight_grads, strict=True)
        ]
        return {**grads, kind: jax.tree.unflatten(structure, added)}

    def _positions(self) -> jax.Array:
        # Not varying: a predicate read at a position must vary over pipe only, as the layer table does.
        return jnp.arange(self.layout.positions, dtype=jnp.int32)

    def _switch(
        self, chunk: jax.Array, position: jax.Array, branches: list, operands, kind: int | None = None
    ):
        """Runs the branch of the layer at a position, of a known kind if given; where there is none, operands stay."""
        if self.layout.is_uniform or kind is not None:
            return branches[kind or 0](operands)
        has_gaps = bool((self.layout.kind == len(self.layout.kinds)).any())
        kind = slots.read(self.table.kind, chunk, position)
        return lax.switch(kind, branches + ([lambda operands: operands] if has_gaps else []), operands)

    def _at(self, place: Place, position: jax.Array) -> tuple[jax.Array, Surroundings]:
        """Index of a layer among those of its kind on its chunk, and its surroundings."""
        index = slots.read(self.table.index, place.chunk, position)
        return index, place.surroundings_of(slots.read(self.table.moe_index, place.chunk, position))

    def _weights(self, kind: str, chunk: jax.Array, index: jax.Array) -> dict:
        return jax.tree.map(lambda leaf: slots.read(leaf, chunk, index), self.params[kind])
