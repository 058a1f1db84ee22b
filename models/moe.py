"""This file is the mixture-of-experts layer: router, balancing losses, routed and shared experts.

Nothing here compiles to a scatter, forward or backward: chosen scores and counts are masked sums over the
experts, which XLA fuses into one pass over [T, k, E] without storing it.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import DenseFFN, MoEFFN, Router
from models.layers import FeedForward, LayerContext, activate, at_least_float32, parameter

Stats = dict[str, jax.Array]


def route(logits: jax.Array, bias: jax.Array, *, k: int, router: Router) -> tuple[jax.Array, jax.Array]:
    """Chooses k distinct experts for every token, lowest index first among equals.

    `logits` [T, E] and `bias` [E] in at least float32. Returns `(expert_ids [T, k] int32, gates [T, k])`,
    best expert first. The bias moves the choice, never a gate. With groups, experts of others than the chosen
    groups are never taken.
    """
    scores = _scores(logits, router)
    selection = jax.lax.stop_gradient(scores)
    if router.balance == "bias":
        selection = selection + jax.lax.stop_gradient(bias).astype(scores.dtype)[None, :]
    if router.groups_per_token < router.num_groups:
        selection = _within_chosen_groups(selection, router)
    _, expert_ids = jax.lax.top_k(selection, k)
    gates = jnp.sum(jnp.where(_chosen(expert_ids, scores.shape[1]), scores[:, None, :], 0), axis=-1)
    if router.gates == "normalized":
        gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + jnp.finfo(gates.dtype).tiny)
    return expert_ids, gates * router.scaling_factor


def _within_chosen_groups(selection: jax.Array, router: Router) -> jax.Array:
    """Lowers experts outside of the best groups to -inf: [T, E] -> [T, E].

    The score of a group is the sum of its best experts' (DeepSeek-V3, arXiv:2412.19437 section 2.1.2); of equal
    groups the first is taken.
    """
    groups = selection.reshape(selection.shape[0], router.num_groups, -1)  # [T, G, E / G]
    best, _ = jax.lax.top_k(groups, router.scored_per_group)
    _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), router.groups_per_token)
    is_chosen = jnp.any(_chosen(chosen, router.num_groups), axis=1)
    return jnp.where(is_chosen[:, :, None], groups, -jnp.inf).reshape(selection.shape)


def balance_loss(
    logits: jax.Array, load: jax.Array, *, k: int, router: Router, context: LayerContext
) -> jax.Array:
    """Returns this device's share of the auxiliary losses of a layer.

    The shares of all devices add up to

        coefficient * E * sum_e f_e p_e  +  z_coefficient * mean(logsumexp(logits)^2)

    with f_e the fraction of the rows of the whole microbatch that go to expert e, held constant, and p_e the
    mean probability of e (Switch Transformer, arXiv:2101.03961 eq. 4; ST-MoE, arXiv:2202.08906 eq. 5). Linear
    in what this device computed, so gradients of shares add up as well and no reduction is differentiated.
    `logits` is [T, E], `load` [E].
    """
    T, E = logits.shape
    num_tokens = T * context.num_shards
    loss = jnp.zeros((), logits.dtype)
    if router.balance == "aux_loss":
        fraction = context.all_sum(jax.lax.stop_gradient(load)).astype(logits.dtype) / (num_tokens * k)
        scores = _scores(logits, router)
        probability = scores / jnp.sum(scores, axis=-1, keepdims=True)
        share = jnp.sum(probability, axis=0) / num_tokens
        loss = loss + router.aux_loss_coefficient * E * jnp.sum(jax.lax.stop_gradient(fraction) * share)
    if router.z_loss_coefficient > 0:
        squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        loss = loss + router.z_loss_coefficient * jnp.sum(squares) / num_tokens
    return loss


def _scores(logits: jax.Array, router: Router) -> jax.Array:
    """Returns [T, E]: probabilities of a softmax, or independent sigmoids."""
    return jax.nn.softmax(logits, axis=-1) if router.score == "softmax" else jax.nn.sigmoid(logits)


def _chosen(expert_ids: jax.Array, num_experts: int) -> jax.Array:
    """Returns [T, k, E] bool, true where slot k of a token is expert E (or group E)."""
    return expert_ids[:, :, None] == jnp.arange(num_experts, dtype=expert_ids.dtype)[None, None, :]


@jax.custom_vjp
def weigh(rows: jax.Array, gates: jax.Array) -> jax.Array:
    """Rows [R, F] times gates [R], multiplied in at least float32; [R, F] in the dtype of rows."""
    return _weighed(rows, gates)


def _weighed(rows, gates):
    wide = _wide(rows, gates)
    return (gates[:, None].astype(wide) * rows.astype(wide)).astype(rows.dtype)


def _weigh_backward(saved, dy):
    rows, gates = saved
    wide = _wide(rows, gates)
    # As a matrix product, which XLA:CPU does four times faster than a product and a sum over the last dimension.
    dgates = jnp.einsum("rf,rf->r", rows.astype(wide), dy.astype(wide), precision="highest")
    return _weighed(dy, gates), dgates.astype(gates.dtype)


weigh.defvjp(lambda rows, gates: (_weighed(rows, gates), (rows, gates)), _weigh_backward)


def _wide(rows: jax.Array, gates: jax.Array) -> jnp.dtype:
    return jnp.promote_types(jnp.promote_types(rows.dtype, gates.dtype), jnp.float32)


class Experts(nnx.Module):
    """Routed experts, each a small FeedForward; weights [E, D, F] and [E, F, D], or the share of a device."""

    def __init__(self, d_model: int, ffn: MoEFFN):
        self.num_matrices = ffn.num_matrices
        if ffn.num_matrices == 3:
            self.gate_up = parameter(ffn.num_experts, d_model, 2 * ffn.d_ff)
        else:
            self.up = parameter(ffn.num_experts, d_model, ffn.d_ff)
        self.down = parameter(ffn.num_experts, ffn.d_ff, d_model)

    def __call__(
        self,
        rows: jax.Array,
        group_sizes: jax.Array,
        context: LayerContext,
        gates: jax.Array | None = None,
    ) -> jax.Array:
        """Applies expert g to the g-th contiguous group of rows: [R, D], [G] -> [R, D], times gates [R] if given.

        Hidden rows are weighed, which is the same: gradients of gates then need no result of the second matrix, so that
        nothing keeps it or makes it again.
        """
        first = self.gate_up if self.num_matrices == 3 else self.up
        hidden = activate(context.grouped_matmul(rows, first[...], group_sizes), self.num_matrices)
        if gates is not None:
            hidden = weigh(hidden, gates)
        return context.grouped_matmul(hidden, self.down[...], group_sizes)


class MixtureOfExperts(nnx.Module):
    """Routed experts plus, where configured, shared experts.

    [B, S, D] -> (y [B, S, D], auxiliary loss, stats); see `transformer.layer_function` for the stats.
    """

    def __init__(self, d_model: int, ffn: MoEFFN):
        self.config = ffn
        self.router = parameter(d_model, ffn.num_experts)
        self.experts = Experts(d_model, ffn)
        if ffn.shared_d_ff:
            self.shared = FeedForward(d_model, DenseFFN(d_ff=ffn.shared_d_ff, num_matrices=ffn.num_matrices))
        if ffn.shared_gate == "sigmoid":
            self.shared_gate = parameter(d_model)

    def __call__(self, x: jax.Array, context: LayerContext) -> tuple[jax.Array, jax.Array, Stats]:
        B, S, D = x.shape
        E, k, router = self.config.num_experts, self.config.experts_per_token, self.config.router
        tokens = x.reshape(B * S, D)
        # Router logits in float32: in bfloat16 two experts can tie, and then top-k depends on their order.
        wide = at_least_float32(x.dtype)
        logits = jnp.matmul(tokens.astype(wide), self.router[...].astype(wide), precision="highest")
        expert_ids, gates = route(logits, context.router_bias, k=k, router=router)
        load = jnp.sum(_chosen(expert_ids, E), axis=(0, 1), dtype=jnp.float32)
        aux = balance_loss(logits, load, k=k, router=router, context=context)

        def expert_ffn(rows: jax.Array, group_sizes: jax.Array, gates: jax.Array | None = None) -> jax.Array:
            return self.experts(rows, group_sizes, context, gates)

        routed, overflow = context.experts(expert_ffn, tokens, expert_ids, gates, E)
        y = routed.astype(x.dtype).reshape(B, S, D) + self._shared_experts(x)
        return y, aux, {"load": load, "overflow": overflow}

    def _shared_experts(self, x: jax.Array) -> jax.Array | float:
        """Returns what the shared experts add, [B, S, D], or 0.0 without any."""
        y = 0.0
        if self.config.shared_d_ff:
            y = self.shared(x)
        if self.config.shared_gate == "sigmoid":
            y = jax.nn.sigmoid(x @ self.shared_gate[...])[:, :, None] * y
        return y
