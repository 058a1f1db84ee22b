"""The layers of one stage, forward and backward, as scans over layer positions.

Weights are sliced one layer at a time inside the scan, `leaf[chunk, index]`, and gradients are added in
place at the same index: a slice of a whole chunk would be copied at every tick. Backward is driven by hand,
one `jax.vjp` per layer, so that nothing differentiates through a loop and memory is one layer's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from piperjax.runtime import slots
from piperjax.runtime.layout import LayerLayout
from piperjax.runtime.varying import vary

LayerFunction = Callable[[dict, jax.Array, object], tuple[jax.Array, jax.Array, dict]]


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


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Runs the layers of one stage.

    Attributes:
      layout: which layer is where.
      functions: `(params, x, context) -> (y, aux, stats)` for each layer kind.
      memory_mode: what forward keeps: the input of every "layer", or of the "stage" only.
    """

    layout: LayerLayout
    functions: dict[str, LayerFunction]
    memory_mode: Literal["layer", "stage"]

    @property
    def stash_positions(self) -> int:
        """Layer inputs kept per microbatch and stage."""
        return self.layout.positions if self.memory_mode == "layer" else 1

    def forward(
        self, params: dict, table: LayerTable, chunk: jax.Array, x: jax.Array, context_of, totals, keep
    ):
        """Per device: applies the stage to `x` [B, S, D].

        Args:
          params: layers of this rank by kind, leaves `[chunk, L_kind, ...]`.
          table: layer columns of this rank.
          chunk: which of the rank's stages.
          x: stage input.
          context_of: layer context as a function of the layer's index among MoE layers.
          totals: `Totals` so far.
          keep: function `(stash, position, x) -> stash` and the stash, or `(None, None)`.

        Returns:
          Stage output, totals, stash.
        """
        write, stash = keep
        if write is not None and self.memory_mode == "stage":
            stash = write(stash, np.int32(0), x)

        def body(carry, position):
            x, totals, stash = carry
            if write is not None and self.memory_mode == "layer":
                stash = write(stash, position, x)
            x, aux, load, dropped = self._switch(
                slots.read(table.kind, chunk, position),
                [
                    self._forward_branch(kind, params, table, (chunk, position), context_of)
                    for kind in self.layout.kinds
                ],
                lambda x: (x, *self._no_statistics(totals)),
                x,
            )
            totals = Totals(
                totals.aux + aux, slots.add(totals.load, load, chunk, position), totals.dropped + dropped
            )
            return (x, totals, stash), None

        (x, totals, stash), _ = lax.scan(body, (x, totals, stash), self._positions())
        return x, totals, stash

    def backward(
        self, params: dict, table: LayerTable, chunk, read, gradient, *, context_of, scale, grads: dict
    ):
        """Per device: input gradient of the stage; weight gradients are added to `grads` in place.

        Args:
          params, table, chunk, context_of: as in `forward`.
          read: function of a position that returns the kept layer (or stage) input [B, S, D].
          gradient: gradient of the stage output [B, S, D].
          scale: gradient of the loss with respect to this device's auxiliary loss.
          grads: accumulators like `params`.

        Returns:
          Gradient of the stage input [B, S, D], accumulators.
        """
        if self.memory_mode == "stage":
            inputs = self._recompute(params, table, chunk, read(np.int32(0)), context_of)

            def read(position):
                return slots.read(inputs, position)

        def body(carry, position):
            gradient, grads = carry
            x = read(position)
            carry = self._switch(
                slots.read(table.kind, chunk, position),
                [
                    self._backward_branch(kind, params, table, (chunk, position), context_of, scale)
                    for kind in self.layout.kinds
                ],
                lambda operands: (operands[1], operands[2]),
                (x, gradient, grads),
            )
            return carry, None

        (gradient, grads), _ = lax.scan(body, (gradient, grads), self._positions(), reverse=True)
        return gradient, grads

    def _positions(self) -> jax.Array:
        # Not varying: a predicate read at a position must vary over pipe only, as the layer table does.
        return jnp.arange(self.layout.positions, dtype=jnp.int32)

    def _switch(self, kind: jax.Array, branches: list, nothing, operands):
        if self.layout.is_uniform:
            return branches[0](operands)
        has_gaps = bool((self.layout.kind == len(self.layout.kinds)).any())
        return lax.switch(kind, branches + ([nothing] if has_gaps else []), operands)

    def _slice(self, params: dict, kind: str, table: LayerTable, place: tuple) -> dict:
        chunk, position = place
        index = slots.read(table.index, chunk, position)
        return jax.tree.map(lambda leaf: slots.read(leaf, chunk, index), params[kind])

    def _no_statistics(self, totals: Totals) -> tuple[jax.Array, ...]:
        return vary((jnp.zeros((), totals.aux.dtype), jnp.zeros(totals.load.shape[2:], totals.load.dtype),
                     jnp.zeros((), totals.dropped.dtype)))  # fmt: skip

    def _forward_branch(self, kind: str, params: dict, table: LayerTable, place: tuple, context_of):
        def run(x):
            context = context_of(slots.read(table.moe_index, *place))
            y, aux, stats = self.functions[kind](self._slice(params, kind, table, place), x, context)
            return vary((y, aux, stats["load"], stats["dropped"]))

        return run

    def _backward_branch(self, kind: str, params: dict, table: LayerTable, place: tuple, context_of, scale):
        def run(operands):
            x, gradient, grads = operands
            context = context_of(slots.read(table.moe_index, *place))

            def apply(weights, x):
                y, aux, _ = self.functions[kind](weights, x, context)
                return vary((y, aux))

            (_, aux), vjp = jax.vjp(apply, self._slice(params, kind, table, place), x)
            weight_grads, x_grad = vjp((gradient, scale.astype(aux.dtype)))
            chunk, position = place
            at = (chunk, slots.read(table.index, chunk, position))
            added = jax.tree.map(lambda total, g: slots.add(total, g, *at), grads[kind], weight_grads)
            return x_grad, {**grads, kind: added}

        return run

    def _recompute(self, params: dict, table: LayerTable, chunk, x: jax.Array, context_of) -> jax.Array:
        """Inputs of every layer of the stage, `[position, B, S, D]`."""

        def body(x, position):
            place = (chunk, position)

            def branch(kind):
                def run(x):
                    context = context_of(slots.read(table.moe_index, *place))
                    return vary(self.functions[kind](self._slice(params, kind, table, place), x, context)[0])

                return run

            y = self._switch(
                slots.read(table.kind, *place), [branch(kind) for kind in self.layout.kinds], lambda x: x, x
            )
            return y, x

        return lax.scan(body, x, self._positions())[1]
