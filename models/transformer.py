"""This file is the decoder: its parameters, one layer as a function, and whole passes on one device.

Parameters are nested dicts of arrays, the layers of one kind stacked along the first dimension:

    {"embedding": [V, D], "layers": {kind: {"attention_norm": [L, D], "attention": {...}, ...}},
     "final_norm": [D], "head": [V, D]}            # no head when embeddings are tied

The nnx modules say which weights a layer has and what it computes; they live only inside `layer_function`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import initial
from models.attention import Attention
from models.config import DenseFFN, LayerConfig, ModelConfig, MoEFFN
from models.layers import (
    ExpertFFN,
    FeedForward,
    LayerContext,
    at_least_float32,
    parameter,
    rms_norm,
    rotation,
)
from models.moe import MixtureOfExperts, Stats

Params = dict[str, Any]
LayerFunction = Callable[[Params, jax.Array, LayerContext], tuple[jax.Array, jax.Array, Stats]]


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), plus dense_residual(norm(x)) where configured."""

    def __init__(self, config: ModelConfig, layer: LayerConfig):
        self.norm_eps = config.norm_eps
        self.num_experts = config.num_experts
        self.attention_norm = parameter(config.d_model)
        self.attention = Attention(config.d_model, layer.attention, norm_eps=config.norm_eps)
        self.ffn_norm = parameter(config.d_model)
        has_experts = isinstance(layer.ffn, MoEFFN)
        self.ffn = (MixtureOfExperts if has_experts else FeedForward)(config.d_model, layer.ffn)
        self.has_dense_residual = has_experts and layer.ffn.dense_residual_d_ff > 0
        if self.has_dense_residual:
            residual = DenseFFN(d_ff=layer.ffn.dense_residual_d_ff, num_matrices=layer.ffn.num_matrices)
            self.dense_residual_norm = parameter(config.d_model)
            self.dense_residual = FeedForward(config.d_model, residual)

    def __call__(self, x: jax.Array, context: LayerContext) -> tuple[jax.Array, jax.Array, Stats]:
        with jax.named_scope("attention"):
            x = x + self.attention(rms_norm(x, self.attention_norm[...], self.norm_eps), context)
        normed = rms_norm(x, self.ffn_norm[...], self.norm_eps)
        with jax.named_scope("ffn"):
            if isinstance(self.ffn, MixtureOfExperts):
                y, aux, stats = self.ffn(normed, context)
            else:
                y, aux = self.ffn(normed), jnp.zeros((), at_least_float32(x.dtype))
                stats = {
                    "load": jnp.zeros(self.num_experts, jnp.float32),
                    "overflow": jnp.zeros((), jnp.float32),
                }
            if self.has_dense_residual:
                y = y + self.dense_residual(rms_norm(x, self.dense_residual_norm[...], self.norm_eps))
        return x + y, aux, stats


def layer_function(config: ModelConfig, kind: str) -> LayerFunction:
    """Returns `layer(params, x [B, S, D], context) -> (y [B, S, D], aux, stats)` for the layers of a kind.

    `params` is the nested dict of one layer; expert weights may be the share of a device. `aux` is this
    device's share of the auxiliary loss, a scalar in at least float32. `stats` is `{"load": [E] float32, rows
    that this device's tokens send to each expert, "overflow": scalar float32}`, zeros for a dense layer.
    """
    graph, _ = _declared(config, kind)

    def layer(params: Params, x: jax.Array, context: LayerContext) -> tuple[jax.Array, jax.Array, Stats]:
        return nnx.merge(graph, params)(x, context)

    return layer


@functools.lru_cache(maxsize=64)
def _declared(config: ModelConfig, kind: str) -> tuple[nnx.GraphDef, Params]:
    """Returns the structure of a layer and its nested dict of ShapeDtypeStruct; allocates nothing."""
    config.layers_of_kind(kind)  # names the kinds there are when this one is not among them
    layer = config.kinds[kind]
    config.check_trainable()
    graph, state = nnx.split(nnx.eval_shape(lambda: DecoderLayer(config, layer)))
    return graph, nnx.to_pure_dict(state)


def init_params(config: ModelConfig, seed: int | jax.Array) -> Params:
    """Returns all parameters in float32, stacked by kind."""
    layers = {
        kind: init_layers(config, kind, np.array(config.layers_of_kind(kind)), seed) for kind in config.kinds
    }
    return init_outer(config, seed) | {"layers": layers}


def init_outer(config: ModelConfig, seed: int | jax.Array) -> Params:
    """Returns what belongs to no layer: "embedding" [V, D], "final_norm" [D], unless tied "head" [V, D]."""
    V, D = config.vocab_size, config.d_model
    shapes = {"embedding": (V, D), "final_norm": (D,)}
    if config.embeddings == "untied":
        shapes["head"] = (V, D)
    return {name: _draw(config, name, shape, seed=seed, layer=0, expert=0) for name, shape in shapes.items()}


def init_layers(
    config: ModelConfig, kind: str, layer_ids: np.ndarray | jax.Array, seed: int | jax.Array
) -> Params:
    """Returns the parameters of the layers `layer_ids` (int32, any shape), leaves [*layer_ids.shape, ...].

    A value depends on seed, name, layer and expert only, so any stacking and any sharding draws the same.
    """
    _, declared = _declared(config, kind)

    def leaf(path: tuple[jax.tree_util.DictKey, ...], value: jax.ShapeDtypeStruct) -> jax.Array:
        names = ["layers", *(entry.key for entry in path)]

        def one_layer(layer: jax.Array) -> jax.Array:
            draw = functools.partial(_draw, config, "/".join(names), seed=seed, layer=layer)
            if "experts" not in names:
                return draw(value.shape, expert=0)
            return jax.vmap(lambda expert: draw(value.shape[1:], expert=expert))(jnp.arange(value.shape[0]))

        for _ in range(np.ndim(layer_ids)):
            one_layer = jax.vmap(one_layer)
        return one_layer(jnp.asarray(layer_ids, jnp.int32))

    return jax.tree_util.tree_map_with_path(leaf, declared)


def _draw(config: ModelConfig, name: str, shape: tuple[int, ...], *, seed, layer, expert) -> jax.Array:
    """Returns the initial value of a weight: normal, ones for norms, zeros for biases."""
    last = name.rsplit("/", maxsplit=1)[-1]
    if last.endswith("norm"):
        return jnp.ones(shape, jnp.float32)
    if last.endswith("bias"):
        return jnp.zeros(shape, jnp.float32)
    # What is added to the residual stream 2 L times is drawn smaller by sqrt(2 L) (GPT-2).
    shrink = math.sqrt(2 * config.num_layers) if last in ("output", "down") else 1.0
    std = config.init_std / shrink
    return initial.normal(name, shape, seed=seed, layer=layer, expert=expert, std=std)


def cast_params(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """Returns a compute copy in `dtype`; router weights and norm scales stay in at least float32."""

    def cast(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> jax.Array:
        name = str(path[-1].key)
        keeps = name == "router" or name.endswith("norm")
        return leaf.astype(at_least_float32(dtype) if keeps else dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def is_small_parameter(path: tuple[jax.tree_util.DictKey, ...]) -> bool:
    """Whether a layer's parameter is a norm, a bias, a router or another gate: its gradient costs next to nothing."""
    name = str(path[-1].key)
    return name in ("router", "shared_gate") or name.endswith(("norm", "bias"))


class Output(NamedTuple):
    """Result of a pass over one microbatch: logits [B, S, V], auxiliary loss, load [num_moe_layers, E]."""

    logits: jax.Array
    aux_loss: jax.Array
    load: jax.Array


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    router_bias: jax.Array,
) -> Output:
    """Runs the model on one device, every expert on every token; computes in the dtype of the embedding.

    `tokens`, `positions` and `segment_ids` are [B, S] int32, `router_bias` [num_moe_layers, E].
    """
    x = params["embedding"][tokens]
    aux_loss, loads = jnp.zeros((), at_least_float32(x.dtype)), []
    next_row = {kind: iter(range(config.num_layers)) for kind in config.kinds}
    for index, kind in enumerate(config.kind_of_layer):
        row = next(next_row[kind])
        layer_params = jax.tree.map(lambda leaf, row=row: leaf[row], params["layers"][kind])
        is_moe = index in config.moe_layers
        bias = router_bias[len(loads)] if is_moe else jnp.zeros(config.num_experts, jnp.float32)
        context = reference_context(positions, segment_ids, bias, x.dtype)
        x, aux, stats = layer_function(config, kind)(layer_params, x, context)
        aux_loss = aux_loss + aux
        loads += [stats["load"]] if is_moe else []
    x = rms_norm(x, params["final_norm"], config.norm_eps)
    head = params["embedding" if config.embeddings == "tied" else "head"]
    logits = jnp.einsum("bsd,vd->bsv", x, head, preferred_element_type=at_least_float32(x.dtype))
    return Output(logits, aux_loss, jnp.stack(loads) if loads else jnp.zeros((0, 0), jnp.float32))


def reference_context(
    positions: jax.Array,
    segment_ids: jax.Array,
    router_bias: jax.Array,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> LayerContext:
    """Returns the context of one device that shares its microbatch with nobody: no sorting, no dispatch."""
    return LayerContext(
        rotation=lambda width, theta: rotation(positions, width, theta, dtype),
        segment_ids=segment_ids,
        router_bias=router_bias,
        experts=every_expert_on_every_token,
        grouped_matmul=masked_grouped_matmul,
        all_sum=lambda array: array,
        num_shards=1,
    )


def every_expert_on_every_token(
    expert_ffn: ExpertFFN, x: jax.Array, expert_ids: jax.Array, gates: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
    """Weights the outputs of all experts by a dense gate matrix [T, E], zero where one was not chosen."""
    T, D = x.shape
    one_hot = jax.nn.one_hot(expert_ids, num_experts, dtype=gates.dtype)
    gate_matrix = jnp.sum(one_hot * gates[:, :, None], axis=1)
    rows = jnp.broadcast_to(x[None], (num_experts, T, D)).reshape(num_experts * T, D)
    outputs = expert_ffn(rows, np.full(num_experts, T, np.int32)).reshape(num_experts, T, D)
    y = jnp.einsum("te,etd->td", gate_matrix, outputs.astype(gates.dtype), precision="highest")
    return y.astype(x.dtype), jnp.zeros((), jnp.float32)


def masked_grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array | np.ndarray) -> jax.Array:
    """Multiplies the g-th group of rows by w[g]: [R, D], [G, D, F], [G] -> [R, F], zeros past the groups.

    Costs G times too much, except when the groups are known to be equal and to fill x: then nothing too much.
    """
    R, G = x.shape[0], w.shape[0]
    if isinstance(group_sizes, np.ndarray) and np.all(group_sizes * G == R):
        return jnp.einsum("grd,gdf->grf", x.reshape(G, R // G, -1), w).reshape(R, -1)
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(R)[:, None]
    products = [jnp.where((row >= ends[g] - group_sizes[g]) & (row < ends[g]), x @ w[g], 0) for g in range(G)]
    return sum(products[1:], products[0])


class ReferenceStep(NamedTuple):
    """Loss of a step and its parts: cross entropy per token, auxiliary loss, sum of weights, load [., E]."""

    loss: jax.Array
    cross_entropy: jax.Array
    aux_loss: jax.Array
    num_tokens: jax.Array
    load: jax.Array


def reference_loss(config: ModelConfig, params: Params, router_bias: jax.Array, batch: dict) -> jax.Array:
    """Returns the loss of a step as it is defined, plainly and on one device: the truth to compare with.

        sum(weights * cross entropy) / sum(weights) over the batch + mean over microbatches of the aux losses

    `batch` holds [M, B, S] "tokens", "targets", "positions", "segment_ids" (int32) and "weights" (float32);
    `router_bias` is [num_moe_layers, E]. Computes in the dtype of the parameters (`cast_params`).
    """
    return reference_step(config, params, router_bias, batch).loss


def reference_step(config: ModelConfig, params: Params, router_bias: jax.Array, batch: dict) -> ReferenceStep:
    """Returns the parts of `reference_loss` as well."""
    num_microbatches = batch["tokens"].shape[0]
    cross_entropy, aux_loss, load = 0.0, 0.0, 0.0
    for microbatch in range(num_microbatches):
        rows = {name: array[microbatch] for name, array in batch.items()}
        terms = _microbatch_terms(config, params, router_bias, rows)
        cross_entropy, aux_loss, load = (
            total + term for total, term in zip((cross_entropy, aux_loss, load), terms, strict=True)
        )
    num_tokens = jnp.sum(batch["weights"])
    cross_entropy, aux_loss = cross_entropy / num_tokens, aux_loss / num_microbatches
    return ReferenceStep(cross_entropy + aux_loss, cross_entropy, aux_loss, num_tokens, load)


@functools.partial(jax.jit, static_argnums=0)  # compiled once, called for every microbatch
def _microbatch_terms(
    config: ModelConfig, params: Params, router_bias: jax.Array, rows: dict
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the weighted sum of the cross entropy, the auxiliary loss and the load of one microbatch."""
    output = forward(config, params, rows["tokens"], rows["positions"], rows["segment_ids"], router_bias)
    log_probabilities = jax.nn.log_softmax(output.logits, axis=-1)
    picked = jnp.take_along_axis(log_probabilities, rows["targets"][:, :, None], axis=-1)[:, :, 0]
    return -jnp.sum(picked * rows["weights"].astype(picked.dtype)), output.aux_loss, output.load
