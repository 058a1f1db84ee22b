"""This file is the price of a model on one device: parameters, FLOP, activation bytes, all-to-all bytes.

Everything is counted part by part and unsharded; the planner divides it among devices. FLOP are those
of matrix products, two per multiply-add, per token. Shape letters: D d_model, N heads, K key-value
heads, H head_dim, F d_ff, E experts, k experts per token, S seq_len.
"""

import dataclasses
from dataclasses import dataclass

from models.config import DenseFFN, GroupedQueryAttention, LatentAttention, LayerConfig, ModelConfig, MoEFFN


class _Parts:
    """Numbers that add up."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True)
class LayerParameters(_Parts):
    """Numbers of parameters of one layer.

    Attributes:
      norms: of the residual stream.
      attention: projections with their biases and norms.
      router: D E.
      router_bias: E when the router is balanced by a bias; published counts include it, gradients do not.
      experts: all routed experts.
      shared: shared experts with their gate.
      dense: dense FFN, or the dense residual part beside experts.
    """

    norms: int = 0
    attention: int = 0
    router: int = 0
    router_bias: int = 0
    experts: int = 0
    shared: int = 0
    dense: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelParameters:
    """Numbers of parameters of a model.

    Attributes:
      embedding: V D.
      head: V D, or 0 when tied to the embedding.
      final_norm: D.
      layers: one entry per layer, those that predict further tokens last.
      active_experts: parameters of the k experts a token passes through, all layers together.
      joins: for each layer that predicts a further token, 2 D^2 that join the stream with an embedding, and 3 norms.
    """

    embedding: int
    head: int
    final_norm: int
    layers: tuple[LayerParameters, ...]
    active_experts: int
    joins: int = 0

    @property
    def total(self) -> int:
        """All parameters, as published counts have it."""
        outer = self.embedding + self.head + self.final_norm + self.joins
        return outer + sum(layer.total for layer in self.layers)

    @property
    def trained(self) -> int:
        """Parameters with a gradient: all but the balancing biases."""
        return self.total - sum(layer.router_bias for layer in self.layers)

    @property
    def experts(self) -> int:
        """Parameters of all routed experts: what the expert axis divides."""
        return sum(layer.experts for layer in self.layers)

    @property
    def active(self) -> int:
        """Parameters that one token passes through, embedding and head included."""
        return self.total - self.experts + self.active_experts


@dataclass(frozen=True, kw_only=True)
class LayerFlop(_Parts):
    """Forward FLOP of one layer per token.

    Attributes:
      attention_projections: 2 per projection weight.
      attention_scores: scores and their product with the values; the causal half of the S^2 pairs.
      router: 2 D E.
      experts: k experts.
      shared: shared experts with their gate.
      dense: dense FFN, or the dense residual part beside experts.
    """

    attention_projections: int = 0
    attention_scores: int = 0
    router: int = 0
    experts: int = 0
    shared: int = 0
    dense: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelFlop:
    """Forward FLOP of a model per token.

    Attributes:
      layers: one entry per layer, those that predict further tokens last.
      head: 2 V D for every token that is predicted.
      joins: 4 D^2 for each layer that predicts a further token.
    """

    layers: tuple[LayerFlop, ...]
    head: int
    joins: int = 0

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.head + self.joins + sum(layer.total for layer in self.layers)

    @property
    def step(self) -> int:
        """Forward and backward, which costs twice the forward; recomputation is not useful work."""
        return 3 * self.forward


@dataclass(frozen=True, kw_only=True)
class LayerActivations(_Parts):
    """Bytes that one layer keeps per token for its backward pass when nothing is recomputed.

    Attributes:
      norms: inputs of the norms, the layer's own input first, and their outputs.
      attention: queries, keys, values, their latents, output, log-sum-exp.
      attention_scores: weights in float32 and rounded, for every pair; 0 for fused kernels (flash attention).
      router: logits and gates in float32, maps of rows to slots and back.
      dispatch: rows as experts receive them.
      experts: hidden rows before and after the activation function.
      combine: rows as experts return them.
      shared: hidden rows of the shared experts.
      dense: hidden rows of the dense FFN or the dense residual part.
    """

    norms: int = 0
    attention: int = 0
    attention_scores: int = 0
    router: int = 0
    dispatch: int = 0
    experts: int = 0
    combine: int = 0
    shared: int = 0
    dense: int = 0


def parameters(config: ModelConfig) -> ModelParameters:
    """Counts the parameters of a model: those that `transformer.init_params` makes and the router biases."""
    V, D = config.vocab_size, config.d_model
    layers = _all_layers(config)
    return ModelParameters(
        embedding=V * D,
        head=V * D if config.embeddings == "untied" else 0,
        final_norm=D,
        layers=tuple(layer_parameters(config, layer) for layer in layers),
        active_experts=sum(
            layer.ffn.experts_per_token * _matrices(D, layer.ffn.d_ff, layer.ffn.num_matrices)
            for layer in layers
            if isinstance(layer.ffn, MoEFFN)
        ),
        joins=config.prediction_layers * (2 * D + 3) * D,
    )


def layer_parameters(config: ModelConfig, layer: LayerConfig) -> LayerParameters:
    """Counts the parameters of one layer."""
    D, ffn = config.d_model, layer.ffn
    attention = _projections(D, layer.attention) + _small_attention_parameters(D, layer.attention)
    if isinstance(ffn, DenseFFN):
        return LayerParameters(
            norms=2 * D, attention=attention, dense=_matrices(D, ffn.d_ff, ffn.num_matrices)
        )
    return LayerParameters(
        norms=(3 if ffn.dense_residual_d_ff else 2) * D,
        attention=attention,
        router=D * ffn.num_experts,
        router_bias=ffn.num_experts if ffn.router.balance == "bias" else 0,
        experts=ffn.num_experts * _matrices(D, ffn.d_ff, ffn.num_matrices),
        shared=_shared_matrices(D, ffn),
        dense=_matrices(D, ffn.dense_residual_d_ff, ffn.num_matrices),
    )


def flop_per_token(config: ModelConfig, seq_len: int) -> ModelFlop:
    """Counts the FLOP of a model per token in sequences of `seq_len`.

    The step total is 6 (active - embedding) + 3 L S N (d_qk + d_v) but for the norms: the formula that
    the published rates of vendors imply (Narayanan et al., arXiv:2104.04473, appendix, with only the
    causal half).
    """
    predictions, D = config.prediction_layers, config.d_model
    return ModelFlop(
        layers=tuple(layer_flop(config, layer, seq_len) for layer in _all_layers(config)),
        head=2 * config.vocab_size * D * (1 + predictions),
        joins=4 * D**2 * predictions,
    )


def layer_flop(config: ModelConfig, layer: LayerConfig, seq_len: int) -> LayerFlop:
    """Counts the forward FLOP of one layer per token, on average over a sequence of `seq_len` positions."""
    D, ffn = config.d_model, layer.ffn
    projections = 2 * _projections(D, layer.attention)
    query_width, value_width = head_widths(layer.attention)
    scores = seq_len * layer.attention.num_heads * (query_width + value_width)
    if isinstance(ffn, DenseFFN):
        dense = 2 * _matrices(D, ffn.d_ff, ffn.num_matrices)
        return LayerFlop(attention_projections=projections, attention_scores=scores, dense=dense)
    return LayerFlop(
        attention_projections=projections,
        attention_scores=scores,
        router=2 * D * ffn.num_experts,
        experts=2 * ffn.experts_per_token * _matrices(D, ffn.d_ff, ffn.num_matrices),
        shared=2 * _shared_matrices(D, ffn),
        dense=2 * _matrices(D, ffn.dense_residual_d_ff, ffn.num_matrices),
    )


def layer_activation_bytes(
    config: ModelConfig, layer: LayerConfig, seq_len: int, *, itemsize: int = 2
) -> LayerActivations:
    """Counts the bytes that one layer keeps per token for its backward pass, `itemsize` bytes per element.

    Korthikanti et al. (arXiv:2205.05198, section 4) with grouped-query or latent attention and, for experts,
    k rows per token: received, both halves of the hidden row and their product, returned (X-MoE,
    arXiv:2508.13337). This is what fused kernels keep; plain autodiff of our layers keeps up to 2.2 times as
    much, because of float32 copies around norms and softmax and of both factors of elementwise products.
    A layer that is recomputed keeps only its input, D * itemsize.
    """
    D, N, ffn = config.d_model, layer.attention.num_heads, layer.ffn
    attention = itemsize * _attention_elements(layer.attention) + 4 * N
    scores = N * seq_len * (4 + itemsize)
    if isinstance(ffn, DenseFFN):
        dense = itemsize * ffn.num_matrices * ffn.d_ff
        return LayerActivations(
            norms=4 * D * itemsize, attention=attention, attention_scores=scores, dense=dense
        )
    k = ffn.experts_per_token
    return LayerActivations(
        norms=(5 if ffn.dense_residual_d_ff else 4) * D * itemsize,
        attention=attention,
        attention_scores=scores,
        router=4 * (ffn.num_experts + k) + 8 * k,
        dispatch=all_to_all_bytes(config, layer, itemsize=itemsize),
        experts=itemsize * k * ffn.num_matrices * ffn.d_ff,
        combine=all_to_all_bytes(config, layer, itemsize=itemsize),
        shared=itemsize * ffn.num_matrices * ffn.shared_d_ff,
        dense=itemsize * ffn.num_matrices * ffn.dense_residual_d_ff,
    )


def all_to_all_bytes(config: ModelConfig, layer: LayerConfig, *, itemsize: int = 2) -> int:
    """Counts the bytes of rows that one token sends in one all-to-all of a layer: k D itemsize.

    A step has four of them per MoE layer, dispatch and combine, forward and backward, and six when the
    forward is recomputed. With the experts spread over X devices, 1/X of the rows stay where they are;
    sending a token once per node saves more. A dense layer sends nothing.
    """
    k = layer.ffn.experts_per_token if isinstance(layer.ffn, MoEFFN) else 0
    return k * config.d_model * itemsize


def _all_layers(config: ModelConfig) -> tuple[LayerConfig, ...]:
    """Returns the layers and, after them, those that predict further tokens."""
    return config.layers + config.layers[-1:] * config.prediction_layers


def _matrices(d_model: int, d_ff: int, num_matrices: int) -> int:
    return num_matrices * d_model * d_ff


def _shared_matrices(d_model: int, ffn: MoEFFN) -> int:
    """Returns the weights of the shared experts and of their gate, D."""
    gate = d_model if ffn.shared_gate == "sigmoid" else 0
    return _matrices(d_model, ffn.shared_d_ff, ffn.num_matrices) + gate


def _projections(d_model: int, attention: GroupedQueryAttention | LatentAttention) -> int:
    """Returns the weights of the query, key, value and output projections, or of their low-rank factors."""
    query_width, value_width = head_widths(attention)
    N = attention.num_heads
    if isinstance(attention, GroupedQueryAttention):
        return d_model * attention.head_dim * 2 * (N + attention.num_kv_heads)
    rank = attention.q_rank
    query = rank * (d_model + N * query_width) if rank else d_model * N * query_width
    down = d_model * (attention.kv_rank + attention.rope_dim)
    up = attention.kv_rank * N * (attention.nope_dim + value_width)
    return query + down + up + N * value_width * d_model


def _small_attention_parameters(d_model: int, attention: GroupedQueryAttention | LatentAttention) -> int:
    """Returns the weights of norms and biases inside attention."""
    if isinstance(attention, LatentAttention):
        return attention.q_rank + attention.kv_rank
    N, K, H = attention.num_heads, attention.num_kv_heads, attention.head_dim
    norms = {"none": 0, "head": 2 * H, "full": (N + K) * H}[attention.qk_norm]
    biases = {"none": 0, "qkv": (N + 2 * K) * H, "all": (N + 2 * K) * H + d_model}[attention.bias]
    return norms + biases


def head_widths(attention: GroupedQueryAttention | LatentAttention) -> tuple[int, int]:
    """Returns the features of one query head and of one value head."""
    if isinstance(attention, GroupedQueryAttention):
        return attention.head_dim, attention.head_dim
    return attention.nope_dim + attention.rope_dim, attention.v_dim


def _attention_elements(attention: GroupedQueryAttention | LatentAttention) -> int:
    """Returns the elements kept per token: query, key, value, output; with latents also these."""
    query_width, value_width = head_widths(attention)
    N = attention.num_heads
    if isinstance(attention, GroupedQueryAttention):
        return (N + attention.num_kv_heads) * (query_width + value_width)
    latents = attention.q_rank + attention.kv_rank + attention.rope_dim
    return latents + N * (2 * query_width + value_width) + N * value_width
