"""The passes of one layer: forward, backward, and backward in two parts, as programs traced once.

What forward keeps is decided by a memory mode. The input gradient hands to the weight gradient just the operands
of the products that remain: of y = a w, the pair (a, dL/dy). Computing weight gradients by a second `jax.vjp` and
leaving the rest to dead-code elimination saves nothing: they need the whole chain of gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import transformer
from models.block_attention import ATTENDED
from models.layers import LayerContext, Rotation
from piperjax.runtime.dispatcher import DISPATCHED
from piperjax.runtime.program import Call, is_variable, trace
from piperjax.runtime.varying import vary

LayerFunction = Callable[[dict, jax.Array, LayerContext], tuple[jax.Array, jax.Array, dict]]


@dataclass(frozen=True, kw_only=True)
class MemoryMode:
    """What a forward keeps for its backward.

    Attributes:
      policy: what is saveable under `jax.checkpoint`; None keeps every intermediate result.
      by_stage: keep the input of a stage only, and run its forward again before its backward.
    """

    policy: Callable[..., Any] | None
    by_stage: bool = False


def _is_product(primitive, *_, **params) -> bool:
    """Whether an operation is a matrix product without batch dimensions, a sort, a search, or moves data.

    Batched products are those of attention, with their S * S results. Attention in blocks names what it needs instead
    of these.
    """
    if primitive.name == "name":
        return params["name"] == ATTENDED
    if primitive.name == "dot_general":
        _, (batch_dimensions, _) = params["dimension_numbers"]
        return not batch_dimensions
    return primitive.name in _PRODUCTS


_PRODUCTS = frozenset(
    (
        "multiply",
        "sort",
        "top_k",
        "while",
        "cond",
        "psum",
        "psum_invariant",
        "all_to_all",
        "all_gather",
        "ppermute",
    )
)
_INPUTS_ONLY = jax.checkpoint_policies.nothing_saveable
MEMORY_MODES = {
    "stage": MemoryMode(policy=_INPUTS_ONLY, by_stage=True),
    "layer": MemoryMode(policy=_INPUTS_ONLY),
    # Backward then repeats no all-to-all: 4 per layer and step instead of 5.
    "named": MemoryMode(policy=jax.checkpoint_policies.save_only_these_names(DISPATCHED)),
    # Backward then repeats elementwise work only and, of sequences that are not in blocks, attention.
    "products": MemoryMode(policy=_is_product),
    "stash": MemoryMode(policy=None),
}


class Surroundings(NamedTuple):
    """Arrays of a layer's context.

    Attributes:
      rotations: what rotary positions turn by, by (H, theta); arrays [B, S, 1, H/2].
      segment_ids: [B, S].
      router_bias: [E].
      placement: the physical expert of every logical one [E]; None if they are the same.
    """

    rotations: dict[tuple[int, float], Rotation]
    segment_ids: jax.Array
    router_bias: jax.Array
    placement: jax.Array | None = None

    def arrays(self) -> list[jax.Array]:
        """Those that are there."""
        return jax.tree.leaves(self)


class Result(NamedTuple):
    """Per device: what the forward of a layer returns; the field names are those of `layer_function`."""

    y: jax.Array
    aux: jax.Array
    load: jax.Array
    overflow: jax.Array


class LayerPasses:
    """Per device: the passes of the layers of one kind, as calls that have not run yet.

    Weight gradients are lists in the order of `jax.tree.leaves(weights)`. The gradients of norms, biases and
    routers, which are cheap, belong to the input gradient; the others to the weight gradient.

    Attributes:
      kept: shapes of what forward keeps.
      taps: shapes of what the input gradient hands to the weight gradient.
    """

    def __init__(
        self,
        function: LayerFunction,
        policy: Callable[..., Any] | None,
        context_of: Callable[[Surroundings], LayerContext],
        weights: dict,
        x: jax.Array,
        surroundings: Surroundings,
        *,
        trains: bool = True,
        splits: bool = True,
    ):
        """Traces the passes.

        Args:
          function: the layer.
          policy: of a `MemoryMode`.
          context_of: the layer's context from its arrays.
          weights, x, surroundings: values of the right shapes, types and mesh axes; used for nothing else.
          trains: whether there will be a backward. If not, forward keeps nothing.
          splits: whether backward will come in two parts.
        """
        self.kept = self.taps = ()
        structure, of_surroundings = jax.tree.structure(weights), jax.tree.structure(surroundings)
        leaves = jax.tree.leaves(weights)
        num_weights = len(leaves)
        vjp_structure = None

        def layer(weights, x, surroundings):
            y, aux, stats = function(weights, x, context_of(surroundings))
            return vary((y, aux)), vary((stats["load"], stats["overflow"]))

        if not trains:

            def evaluate(*values):
                weights = jax.tree.unflatten(structure, values[:num_weights])
                rest = jax.tree.unflatten(of_surroundings, values[num_weights + 1 :])
                results, stats = layer(weights, values[num_weights], rest)
                return [*results, *stats]

            self._forward = trace(evaluate, *leaves, x, *surroundings.arrays())
            return
        if policy is not None:
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)

        def forward(*values):
            nonlocal vjp_structure
            weights = jax.tree.unflatten(structure, values[:num_weights])
            rest = jax.tree.unflatten(of_surroundings, values[num_weights + 1 :])
            results, vjp, stats = jax.vjp(
                lambda weights, x: layer(weights, x, rest), weights, values[num_weights], has_aux=True
            )
            residuals, vjp_structure = jax.tree.flatten(vjp)
            return [*results, *stats, *residuals]

        program = trace(forward, *leaves, x, *surroundings.arrays())
        free = (*program.inputs[:num_weights], *program.inputs[num_weights + 1 :])
        results, residuals = program.outputs[:4], program.outputs[4:]
        kept = program.to_keep(residuals, free)
        self.kept = _shapes(kept)
        self._forward = program.cut(program.inputs, (*results, *kept))
        restore = program.cut((*kept, *free), residuals)

        def backward(*values):
            # (kept, weights, surroundings, gradient of y, gradient of aux)
            residuals = restore(*values[:-2])
            vjp = jax.tree.unflatten(vjp_structure, residuals)
            weight_grads, x_grad = vjp(tuple(values[-2:]))
            return [x_grad, *jax.tree.leaves(weight_grads)]

        dummies = [vary(jnp.zeros(v.shape, v.dtype)) for v in self.kept]
        y, aux = (vary(jnp.zeros(v.aval.shape, v.aval.dtype)) for v in results[:2])
        self._backward = trace(backward, *dummies, *leaves, *surroundings.arrays(), y, aux)
        if splits:
            self._split(weights, len(kept))

    def _split(self, weights: dict, num_kept: int):
        """Cuts the backward in two: equations that only large weights need go to the second part."""
        program = self._backward
        x_grad, *weight_grads = program.outputs
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
        self._is_later = [not transformer.is_small_parameter(path) for path in paths]
        now, later = (
            [g for g, is_later in zip(weight_grads, self._is_later, strict=True) if is_later == part]
            for part in (False, True)
        )
        done = {id(equation) for equation in program.cut(program.inputs, (x_grad, *now)).equations}
        rest = [e for e in program.cut(program.inputs, later).equations if id(e) not in done]
        made = {v for equation in rest for v in equation.outvars}
        needed = filter(is_variable, [v for equation in rest for v in equation.invars] + later)
        free = program.inputs[num_kept:-2]
        taps = program.to_keep([v for v in needed if v not in made], free)
        self.taps = _shapes(taps)
        self._input_gradient = program.cut(program.inputs, (x_grad, *now, *taps))
        self._weight_gradient = program.cut((*taps, *free), later)

    def forward(self, weights: dict, x: jax.Array, surroundings: Surroundings) -> Call:
        """The `Result` of the layer on `x` [B, S, D], and a list of what it keeps."""
        leaves = jax.tree.leaves(weights)
        return Call(
            self._forward,
            (*leaves, x, *surroundings.arrays()),
            len(leaves),
            lambda values: (Result(*values[:4]), values[4:]),
        )

    def backward(
        self, weights: dict, kept: list, surroundings: Surroundings, gradient: jax.Array, aux_gradient
    ) -> Call:
        """Gradient of the input, and a list of those of all weights."""
        values = (*kept, *jax.tree.leaves(weights), *surroundings.arrays(), gradient, aux_gradient)
        return Call(self._backward, values, len(values) - 2, lambda values: (values[0], values[1:]))

    def input_gradient(
        self, weights: dict, kept: list, surroundings: Surroundings, gradient: jax.Array, aux_gradient
    ) -> Call:
        """Gradient of the input, gradients of small weights (None for others), taps."""

        def finish(values):
            x_grad, *values = values
            num_now = self._is_later.count(False)
            now = iter(values[:num_now])
            grads = [None if is_later else next(now) for is_later in self._is_later]
            return x_grad, grads, values[num_now:]

        values = (*kept, *jax.tree.leaves(weights), *surroundings.arrays(), gradient, aux_gradient)
        return Call(self._input_gradient, values, len(values) - 2, finish)

    def weight_gradient(self, weights: dict, taps: list, surroundings: Surroundings) -> Call:
        """Gradients of the weights that `input_gradient` left (None for others)."""

        def finish(values):
            later = iter(values)
            return [next(later) if is_later else None for is_later in self._is_later]

        return Call(
            self._weight_gradient, (*taps, *jax.tree.leaves(weights), *surroundings.arrays()), 0, finish
        )


def _shapes(variables) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables)
