"""The layers of one stage, forward and backward, as loops over layer positions.

Weights are sliced one layer at a time inside the loop, `leaf[0, chunk, index]`, and gradients are added in
place at the same index: a slice of a whole chunk would be copied at every tick. Backward is driven by hand,
one layer at a time, so that nothing differentiates through a loop and working memory is one layer's. Layers are
walked in runs of one kind (`runs.py`), without a conditional: what a branch leaves as it is would be copied.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from piperjax.runtime import slots
from piperjax.runtime.interleave import interleave
from piperjax.runtime.layout import LayerLayout
from piperjax.runtime.passes import LayerPasses, Surroundings
from piperjax.runtime.program import Call
from piperjax.runtime.runs import Walk
from piperjax.runtime.ties import corner, tied
from piperjax.runtime.varying import vary

# For each layer kind, one buffer [slot, L_kind, ...] per array.
Buffers = dict[str, list[jax.Array]]
SurroundingsOf = Callable[[jax.Array], Surroundings]
# One layer: (kind, position, carry) -> a call that makes the next carry.
LayerBody = Callable[[str, jax.Array, Any], Call]
# Walks by scope, given how many layers at the end of a walk are the last one of the chunk: 1 or 0.
_PARTS = {"again": Walk.without, "last": Walk.last}
# Place of this rank in its own share of the layers.
_RANK = np.int32(0)


class Totals(NamedTuple):
    """Per device: what forwards add up over a step.

    Attributes:
      aux: this device's share of the auxiliary losses, summed over layers and microbatches.
      load: `[chunk, position, E]` rows routed to each expert.
      overflow: rows beyond the limit of a capacity factor.
    """

    aux: jax.Array
    load: jax.Array
    overflow: jax.Array


class LayerTable(NamedTuple):
    """Per device: int32 columns of a `LayerLayout` and its `Runs`, this pipe rank's row.

    Attributes:
      index, moe_index: `[chunk, position]`.
      first, count, last: `[chunk, round, kind]`.
    """

    index: jax.Array
    moe_index: jax.Array
    first: jax.Array
    count: jax.Array
    last: jax.Array


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
      params: layers of this rank by kind, leaves `[1, chunk, L_kind, ...]`.
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
        return self._layers(place.chunk, partial(self._forward_layer, place), (x, totals, stash))

    def _forward_layer(self, place: Place, kind: str, position: jax.Array, carry) -> Call:
        """One layer: (x, totals, stash) -> (y, totals, stash)."""
        x, totals, stash = carry
        index, surroundings = self._at(place, position)

        def carried(results):
            (result, kept), (counted, filled) = results, (totals, stash)
            if stash is not None:
                written = [
                    slots.write(buffer, value, place.slot, index)
                    for buffer, value in zip(stash[kind], kept, strict=True)
                ]
                filled = {**stash, kind: written}
            if totals is not None:
                _, aux, load, overflow = vary(result)
                load = slots.add(totals.load, load, place.chunk, position)
                counted = Totals(totals.aux + aux, load, totals.overflow + overflow)
            return vary(result.y), counted, filled

        call = self.passes[kind].forward(self._weights(kind, place.chunk, index), x, surroundings)
        return call.then(carried, "forward")

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
        if self.by_stage:
            x = slots.read(stash[""][0], place.slot)
            place = place._replace(slot=jnp.zeros_like(place.slot))
            stash = self._inputs_of_layers(place, x)
        body = partial(self._backward_layer, place, scale, stash)
        return self._layers(place.chunk, body, (gradient, grads, taps), backward=True)

    def _inputs_of_layers(self, place: Place, x: jax.Array) -> Buffers:
        """Runs a stage again, from its input [B, S, D] to that of its last layer; returns the inputs of all layers."""

        def keep(kind: str, position: jax.Array, carry) -> Callable[[], Any]:
            (x, stash), (index, _) = carry, self._at(place, position)
            return lambda: (x, {**stash, kind: [slots.write(stash[kind][0], x, place.slot, index)]})

        carry = (x, None, self.stash_of_one())
        x, _, stash = self._layers(place.chunk, partial(self._forward_layer, place), carry, scope="again")
        return self._layers(place.chunk, keep, (x, stash), scope="last")[1]

    def _backward_layer(
        self, place: Place, scale: jax.Array, stash: Buffers, kind: str, position: jax.Array, carry
    ) -> Call:
        """One layer: (gradient, grads, taps) -> (input gradient, grads, taps)."""
        gradient, grads, taps = carry
        index, surroundings = self._at(place, position)
        slot, chunk, at = self._late(kind, (place.slot, place.chunk, index), gradient)
        kept = [slots.read(buffer, slot, at) for buffer in stash[kind]]
        if stash[kind][0].shape[:2] == (1, 1):  # There is no other place, so indices do not matter.
            kept = self._late(kind, kept, gradient)
        arguments = (self._weights(kind, chunk, at), kept, surroundings, gradient, scale)

        def carried(results):
            x_grad, weight_grads, *values = results
            filled = taps
            if taps is not None:
                written = [
                    slots.write(buffer, value, place.tap_slot, index)
                    for buffer, value in zip(taps[kind], values[0], strict=True)
                ]
                filled = {**taps, kind: written}
            return x_grad, self._added(grads, kind, weight_grads, place.chunk, index), filled

        passes = self.passes[kind]
        call = passes.backward(*arguments) if taps is None else passes.input_gradient(*arguments)
        return call.then(carried, "backward")

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

        The exchanges of each are beside the products of the other (`interleave`). Layers go in pairs that are of the
        kind of which there are most; others, and what one of both has more, go alone.

        Returns:
          What `forward` returns but the stash, what `backward` returns, the stash.
        """
        # Read before the loop that writes: within it, the whole stash would be copied at every layer.
        if self.layout.runs.has_single_turns:
            kept, slot = lax.platform_dependent(
                stash,
                backward_place.slot,
                vary(forward_place.slot),
                cpu=_read_before_writing,
                default=lambda stash, slot, other: (_read_slot(stash, slot), other),
            )
            forward_place = forward_place._replace(slot=slot)
        else:
            kept = _read_slot(stash, backward_place.slot)
        alone = backward_place._replace(slot=jnp.zeros_like(backward_place.slot))
        bodies = (
            partial(self._forward_layer, forward_place),
            partial(self._backward_layer, alone, scale, kept),
        )
        runs, main = self.layout.runs, self.layout.busiest_kind
        earlier, later = range(main), range(main + 1, runs.num_kinds)

        def run(number, carries):
            chunk, ahead, back = forward_place.chunk, *carries
            for kind in earlier:
                ahead = self._loop(kind, self._walk(chunk, number, kind), bodies[0], ahead)
            chunk, other = backward_place.chunk, np.int32(runs.num_rounds - 1) - number
            for kind in reversed(later):
                back = self._loop(kind, self._walk(chunk, other, kind).reversed(), bodies[1], back)
            walks = (
                self._walk(forward_place.chunk, number, main),
                self._walk(backward_place.chunk, other, main).reversed(),
            )
            ahead, back = self._pairs(main, walks, bodies, (ahead, back))
            for kind in later:
                ahead = self._loop(kind, self._walk(forward_place.chunk, number, kind), bodies[0], ahead)
            for kind in reversed(earlier):
                back = self._loop(kind, self._walk(chunk, other, kind).reversed(), bodies[1], back)
            return ahead, back

        carries = (x, totals, stash), (gradient, grads, taps)
        (x, totals, stash), backward_results = self._rounds(run, carries)
        return (x, totals), backward_results, stash

    def _pairs(self, kind: int, walks: tuple[Walk, Walk], bodies: tuple[LayerBody, LayerBody], carries):
        """Runs two walks over layers of a kind in one loop as far as both go, then what remains of each alone."""
        name, pairs = self.layout.kinds[kind], walks[0].pairs(walks[1])

        def both(turn, carries):
            ahead, back = (
                body(name, walk.position(turn), carry)
                for body, walk, carry in zip(bodies, walks, carries, strict=True)
            )
            # Backward first: its products are longer, and its last follow its last exchange.
            back, ahead = interleave(back, ahead)
            return ahead, back

        carries = _repeated(f"pairs_{name}", pairs, both, carries)
        return tuple(
            self._loop(kind, walk.after(pairs), body, carry, scope="single")
            for walk, body, carry in zip(walks, bodies, carries, strict=True)
        )

    def weight_gradient(self, place: Place, *, grads: dict, taps: Buffers) -> dict:
        """Per device: adds the weight gradients that `backward` left; returns the accumulators."""

        def body(kind: str, position: jax.Array, carry) -> Call:
            grads, last = carry
            index, surroundings = self._at(place, position)
            tap_slot, chunk, at = self._late(kind, (place.tap_slot, place.chunk, index), last)
            values = [slots.read(buffer, tap_slot, at) for buffer in taps[kind]]
            call = self.passes[kind].weight_gradient(self._weights(kind, chunk, at), values, surroundings)

            def carried(found):
                largest = max((grad for grad in found if grad is not None), key=lambda grad: grad.size)
                made = None if last is None else corner(largest)
                return self._added(grads, kind, found, place.chunk, index), made

            return call.then(carried, "weight_gradient")

        # An element of what the layer before has made. One of the accumulators would keep sums from being in place.
        last = vary(jnp.float32(0)) if any(map(self._is_alone, taps)) else None
        return self._layers(place.chunk, body, (grads, last))[0]

    def _is_alone(self, kind: str) -> bool:
        """Whether there are loops over layers of other kinds, and none over more than one of this kind."""
        runs = self.layout.runs
        return runs.num_kinds > 1 and runs.count[..., self.layout.kinds.index(kind)].max() <= 1

    def _late(self, kind: str, values, first: jax.Array):
        """The same values, not known before `first`, if a loop over layers of a kind would not change them.

        A loop over one layer, or none, reads the same weights and the same of what was kept in every turn. All that
        follows from these alone would run before the loops, for every kind at once and even if there is no layer.
        """
        return tied(values, to=[first]) if self._is_alone(kind) else values

    def stash_of_one(self) -> Buffers:
        """Buffers for what the layers of one stage keep of one microbatch."""
        return self._buffers(1, {kind: passes.kept for kind, passes in self.passes.items()})

    def _added(self, grads: dict, kind: str, weight_grads: list, chunk: jax.Array, index: jax.Array) -> dict:
        totals, structure = jax.tree.flatten(grads[kind])
        added = [
            total if grad is None else slots.add(total, grad, _RANK, chunk, index)
            for total, grad in zip(totals, weight_grads, strict=True)
        ]
        return {**grads, kind: jax.tree.unflatten(structure, added)}

    def _layers(
        self, chunk: jax.Array, body: LayerBody, carry, *, backward: bool = False, scope: str = "layers"
    ):
        """Runs a body for every layer of a chunk, in order or backward; or for a part of them (`_PARTS`)."""
        kinds = range(self.layout.runs.num_kinds)

        def run(number, carry):
            if backward:
                number = np.int32(self.layout.runs.num_rounds - 1) - number
            for kind in reversed(kinds) if backward else kinds:
                walk = self._walk(chunk, number, kind, scope)
                carry = self._loop(kind, walk.reversed() if backward else walk, body, carry, scope=scope)
            return carry

        return self._rounds(run, carry)

    def _rounds(self, run: Callable[[jax.Array | np.int32, Any], Any], carry):
        rounds = self.layout.runs.num_rounds
        return run(np.int32(0), carry) if rounds == 1 else _repeated("rounds", np.int32(rounds), run, carry)

    def _walk(self, chunk: jax.Array, number: jax.Array | np.int32, kind: int, scope: str = "layers") -> Walk:
        """Positions of the layers of a kind in a round; numbers that all ranks share are known."""
        runs, table = self.layout.runs, self.table

        def known(column: jax.Array, fixed: np.int32 | None):
            return slots.read(column, chunk, jnp.asarray(number), np.int32(kind)) if fixed is None else fixed

        walk = Walk(known(table.first, runs.fixed_first(kind)), known(table.count, runs.fixed_count(kind)))
        return _PARTS[scope](walk, known(table.last, runs.fixed_last(kind))) if scope in _PARTS else walk

    def _loop(self, kind: int, walk: Walk, body: LayerBody, carry, *, scope: str = "layers"):
        name = self.layout.kinds[kind]
        return _repeated(
            f"{scope}_{name}",
            walk.count,
            lambda turn, carry: body(name, walk.position(turn), carry)(),
            carry,
        )

    def _at(self, place: Place, position: jax.Array) -> tuple[jax.Array, Surroundings]:
        """Index of a layer among those of its kind on its chunk, and its surroundings."""
        index = slots.read(self.table.index, place.chunk, position)
        return index, place.surroundings_of(slots.read(self.table.moe_index, place.chunk, position))

    def _weights(self, kind: str, chunk: jax.Array, index: jax.Array) -> dict:
        return jax.tree.map(lambda leaf: slots.read(leaf, _RANK, chunk, index), self.params[kind])


def _repeated(scope: str, turns: jax.Array | np.int32, body: Callable[[jax.Array, Any], Any], carry):
    """Carry after `turns` turns of a loop.

    The counter does not vary, and `turns` over pipe at most, so collectives over data and expert inside always meet.
    """
    if isinstance(turns, np.integer) and turns == 0:
        return carry
    with jax.named_scope(scope):
        return lax.fori_loop(np.int32(0), turns, body, carry)


def _read_slot(stash: Buffers, slot: jax.Array) -> Buffers:
    """What a slot holds, as buffers of one slot."""
    return {kind: [slots.read(one, slot)[None] for one in of_kind] for kind, of_kind in stash.items()}


def _read_before_writing(stash: Buffers, slot: jax.Array, other: jax.Array) -> tuple[Buffers, jax.Array]:
    """The same on CPU, where XLA drops barriers and takes loops of one turn apart; and a slot to be written later.

    What was read before such a loop would be read where it is used, after writes, so that all slots would be copied. A
    loop of which nobody knows that it has one turn stays, and the other slot is not known before it ends.
    """

    def read(_, __):
        return _read_slot(stash, slot)

    empty = jax.tree.map(lambda like: vary(jnp.zeros(like.shape, like.dtype)), jax.eval_shape(read, 0, None))
    kept = _repeated("read_slot", ((slot | 1) != 0).astype(np.int32), read, empty)
    floating = [one for one in jax.tree.leaves(kept) if jnp.issubdtype(one.dtype, jnp.floating)]
    return kept, tied(other, to=floating)
