"""Embedding, head and loss, with the vocabulary split over the pipe ranks or whole.

Split (`axis` is the pipe axis), every pipe rank holds `V / pipe` rows of the embedding and of the head and works on its
share of every microbatch, so the last stage is not slower than the others (as Megatron's vocabulary-parallel layers,
but over `pipe`; Narayanan et al., arXiv:2104.04473, section 3.2). All of these then run under predicates that are the
same on every pipe rank, so their all-reduces over `pipe` always meet. Whole (`axis` is None), a rank works alone with
all rows, and nothing is exchanged.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from meshes.axes import PIPE
from models.transformer import rms_norm
from piperjax.runtime.varying import vary


class HeadResult(NamedTuple):
    """Per device: loss of one microbatch and its gradients.

    Attributes:
      loss: sum of weights times cross entropy over this device's tokens, times `scale`.
      hidden: gradient of the last stage's output [B, S, D].
      head: gradient of this rank's rows of the head, [V / pipe, D] or [V, D].
      final_norm: this rank's share of the gradient of the final norm [D].
    """

    loss: jax.Array
    hidden: jax.Array
    head: jax.Array
    final_norm: jax.Array


def axis_of(vocabulary: str) -> str | None:
    """The axis that divides the vocabulary of a plan, None if it is whole or there is one pipe rank."""
    return PIPE if vocabulary == "split" and lax.axis_size(PIPE) > 1 else None


def sum_over_pipe(x: jax.Array, axis: str | None) -> jax.Array:
    """Per device: sum over the pipe ranks, in at least float32, marked varying again."""
    if axis is None:
        return x
    return vary(lax.psum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis)).astype(x.dtype)


def from_owner(x: jax.Array, is_owner: jax.Array, axis: str | None) -> jax.Array:
    """Per device: `x` of the one pipe rank where `is_owner`, on all pipe ranks that take part."""
    if axis is None:
        return x
    return vary(lax.psum(jnp.where(is_owner, x, jnp.zeros((), x.dtype)), axis))


def embed(table: jax.Array, tokens: jax.Array, axis: str | None) -> jax.Array:
    """Per device: rows of the embedding for `tokens` [B, S], all of [B, S, D] on every rank that takes part."""
    if axis is None:
        return table[tokens]
    local, inside = _local_ids(tokens, table.shape[0], axis)
    return vary(lax.psum(jnp.where(inside[..., None], table[local], jnp.zeros((), table.dtype)), axis))


def add_embedding_gradient(
    total: jax.Array, tokens: jax.Array, gradient: jax.Array, axis: str | None
) -> jax.Array:
    """Per device: adds the gradient [B, S, D] of the looked-up rows to this rank's rows, `total` like the table."""
    local, inside = _local_ids(tokens, total.shape[0], axis)
    gradient = jnp.where(inside[..., None], gradient, jnp.zeros((), gradient.dtype)).astype(total.dtype)
    return total.at[local].add(gradient)


def head_loss(
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    head: jax.Array,
    final_norm: jax.Array,
    norm_eps: float,
    vocab_size: int,
    scale: jax.Array,
    with_gradient: bool,
    axis: str | None,
) -> HeadResult | jax.Array:
    """Per device: final norm, logits of this rank's rows, cross entropy, and their gradients by hand.

    Args:
      hidden: output of the last stage [B, S, D], the same on all pipe ranks.
      targets: next tokens [B, S].
      weights: weight of each position in the loss [B, S].
      head: this rank's rows of the head, [V / pipe, D] or [V, D].
      final_norm: scale of the final norm [D].
      norm_eps: epsilon of the final norm.
      vocab_size: rows beyond it are padding.
      scale: factor of the loss, one over the weights of the whole batch.
      with_gradient: whether to return gradients too.
      axis: the axis that divides the rows, if any.

    Returns:
      `HeadResult`, or the loss alone. The loss is the same on all pipe ranks that take part.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def normed(scale_, x):
        return vary(rms_norm(x, scale_, norm_eps))

    h, norm_vjp = jax.vjp(normed, final_norm, hidden)
    logits = jnp.einsum("bsd,vd->bsv", h, head, preferred_element_type=wide)
    rows = head.shape[0]
    number = jnp.arange(rows, dtype=jnp.int32)
    parts = 1
    if axis is not None:
        number, parts = lax.axis_index(axis) * rows + number, lax.axis_size(axis)
    if parts * rows != vocab_size:
        logits = jnp.where(number < vocab_size, logits, jnp.finfo(wide).min)
    shift = lax.stop_gradient(logits.max(-1))
    if axis is not None:
        shift = vary(lax.pmax(shift, axis))
    exponentials = jnp.exp(logits - shift[..., None])
    normaliser = sum_over_pipe(exponentials.sum(-1), axis)
    is_target = number == targets[..., None]
    target_logit = sum_over_pipe(jnp.where(is_target, logits, jnp.zeros((), wide)).sum(-1), axis)
    token_scale = weights.astype(wide) * scale.astype(wide)
    loss = (token_scale * (jnp.log(normaliser) + shift - target_logit)).sum()
    if not with_gradient:
        return loss
    probability = exponentials / normaliser[..., None]
    logit_grads = ((probability - is_target) * token_scale[..., None]).astype(hidden.dtype)
    head_grad = jnp.einsum("bsv,bsd->vd", logit_grads, h, preferred_element_type=wide)
    norm_grad, hidden_grad = norm_vjp(jnp.einsum("bsv,vd->bsd", logit_grads, head))
    return HeadResult(loss, sum_over_pipe(hidden_grad, axis), head_grad, norm_grad)


def _local_ids(tokens: jax.Array, rows: int, axis: str | None) -> tuple[jax.Array, jax.Array]:
    local = tokens if axis is None else tokens - lax.axis_index(axis) * rows
    inside = (local >= 0) & (local < rows)
    return jnp.clip(local, 0, rows - 1), inside
