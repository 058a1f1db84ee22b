"""This file is what the layers share: their context, normalisation, rotary positions, the dense FFN."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import DenseFFN

ExpertFFN = Callable[..., jax.Array]


class Rotation(NamedTuple):
    """By which angles rotary positions turn the pairs of features of every token, [B, S, 1, H/2]."""

    cos: jax.Array
    sin: jax.Array


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """What a layer is told about its microbatch and its surroundings; closed over, never differentiated.

    The three functions are all that a layer knows of a mesh.

    Attributes:
      rotation: (H, theta) -> `Rotation` of the positions that tokens have in their documents. It is the same in every
        layer, so whoever runs several makes it once for all: sines take as long as dozens of products.
      segment_ids: [B, S] int32, equal for tokens of one document.
      router_bias: [E] float32, the balancing bias of this layer.
      experts: (expert_ffn, x [T, D], expert_ids [T, k] int32, gates [T, k], num_experts)
        -> (y [T, D], overflow): sends tokens to their experts, adds up what comes back weighted by the gates,
        and says how many of the T * k rows found no room at first. `expert_ffn(rows [R, D], group_sizes [G] int32,
        gates [R] or None) -> [R, D]` applies G experts to contiguous groups of rows, and weighs their results where
        gates are given; rows past sum(group_sizes) mean nothing.
      grouped_matmul: (x [R, D], w [G, D, F], group_sizes [G] int32) -> [R, F].
      all_sum: sums an array over the devices that share the microbatch.
      num_shards: number of those devices.
    """

    rotation: Callable[[int, float], Rotation]
    segment_ids: jax.Array
    router_bias: jax.Array
    experts: Callable[[ExpertFFN, jax.Array, jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]
    grouped_matmul: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    all_sum: Callable[[jax.Array], jax.Array]
    num_shards: int


def at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns float32, or `dtype` where that is wider: the precision of norms, softmax, router and losses."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)


def parameter(*shape: int) -> nnx.Param:
    """Declares a weight. Its values come from `transformer.init_layers`, which reads only name and shape."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Returns x / sqrt(mean(x^2) + eps) * scale over the last dimension, computed in at least float32.

    `x` is [..., D] and `scale` [D]; the result has the dtype of `x`.
    """
    wide = x.astype(at_least_float32(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    scale = scale.astype(wide.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (wide * inverse * scale).astype(x.dtype)


def rotation(
    positions: jax.Array, width: int, theta: float, dtype: jax.typing.DTypeLike = jnp.float32
) -> Rotation:
    """Angles position * theta^(-2i/H) for pair i of heads `width` H wide (RoFormer, arXiv:2104.09864, 3.4.2).

    `positions` is [B, S] int32. Computed in at least float32.
    """
    wide, half = at_least_float32(dtype), width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions.astype(wide)[:, :, None, None] * frequencies.reshape(1, 1, 1, half)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotary(x: jax.Array, turn: Rotation) -> jax.Array:
    """Turns the pairs (i, i + H/2) of the last dimension of `x` [B, S, N, H]; the result has its dtype.

    Halves are paired as in published checkpoints, not neighbours.
    """
    first, second = jnp.split(x.astype(turn.cos.dtype), 2, axis=-1)
    halves = first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin
    return jnp.concatenate(halves, axis=-1).astype(x.dtype)


def activate(hidden: jax.Array, num_matrices: int) -> jax.Array:
    """Returns silu(gate) * up of [..., 2F] for three matrices, gelu of [..., F] for two; [..., F]."""
    if num_matrices == 2:
        return jax.nn.gelu(hidden)
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


class FeedForward(nnx.Module):
    """SwiGLU of three matrices or GELU of two, on every token: [..., D] -> [..., D]."""

    def __init__(self, d_model: int, ffn: DenseFFN):
        self.num_matrices = ffn.num_matrices
        if ffn.num_matrices == 3:
            self.gate_up = parameter(d_model, 2 * ffn.d_ff)
        else:
            self.up = parameter(d_model, ffn.d_ff)
        self.down = parameter(ffn.d_ff, d_model)

    def __call__(self, x: jax.Array) -> jax.Array:
        first = self.gate_up if self.num_matrices == 3 else self.up
        return activate(x @ first[...], self.num_matrices) @ self.down[...]
