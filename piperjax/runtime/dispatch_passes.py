"""Rows that find no room in the buffers: they are dropped, or travel in later passes, so that none is.

    pass 1     through all stages, in chunks, as if there were nothing else
    pass 2...  a loop, which turns as long as any device that shares the experts has rows left

Shapes stay static, and buffers as small as the capacity factor makes them, whatever the routing. Passes are as many as
the fullest buffer of any device needs, ceil(rows / places); where one is enough the loop costs an all-reduce of one
number. Pipe ranks need not agree on that, and neither need replicas, unless messages wait for all devices.

Later passes take rows of all chunks at once, in the buffers of one. Backward makes the same passes, each with its
forward run again: nothing of them is kept. Gradients of pass 1 are what it starts from, so that it needs no second
set of gradients of weights to begin with.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.runtime import dispatch_chunks
from piperjax.runtime.dispatcher import Dispatcher, ExpertFFN, Sharing
from piperjax.runtime.varying import vary_like


class Way(NamedTuple):
    """A dispatcher, how devices share the tokens of one chunk, and the number of chunks."""

    dispatcher: Dispatcher
    sharing: Sharing
    chunks: int

    def admitted(self, expert_ids: jax.Array) -> jax.Array | None:
        """Which copies [T, k] find room in pass 1; None if there is always room for all."""
        parts = [self.dispatcher.admit(part, self.sharing) for part in jnp.split(expert_ids, self.chunks)]
        return None if parts[0] is None else jnp.concatenate(parts)

    def first(self, expert_ffn: ExpertFFN, x: jax.Array, expert_ids: jax.Array, gates: jax.Array):
        """Pass 1: y [T, D]."""
        return dispatch_chunks.run(
            self.dispatcher, expert_ffn, (x, expert_ids, gates), self.sharing, chunks=self.chunks
        )


def run_dropping(
    way: Way, expert_ffn: ExpertFFN, x: jax.Array, expert_ids: jax.Array, gates: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Per device: y [T, D] of the copies that find room, and how many do not."""
    room = way.admitted(expert_ids)
    if room is not None:
        expert_ids = jnp.where(room, expert_ids, way.sharing.num_experts)
    return way.first(expert_ffn, x, expert_ids, gates), _overflow(room, x)


def run_all(
    way: Way, expert_ffn: ExpertFFN, x: jax.Array, expert_ids: jax.Array, gates: jax.Array, *, splits: bool
) -> tuple[jax.Array, jax.Array]:
    """Per device: y [T, D] of all copies, and how many had to wait for a later pass.

    If gradients of weights are asked for apart (`splits`), backward makes the later passes once for each.
    """
    room = way.admitted(expert_ids)
    if room is None:
        return way.first(expert_ffn, x, expert_ids, gates), _overflow(room, x)
    absent = way.sharing.num_experts
    expert_ffn, weights = _opened(way, expert_ffn, x, gates)
    later = _Later(way.dispatcher, way.sharing, expert_ffn, _who_agrees(way, x), splits)
    waiting = jnp.where(room, absent, expert_ids)
    y_later, x, gates, weights = _run_later(later, x, gates, weights, waiting)
    now = jnp.where(room, expert_ids, absent)
    y = way.first(lambda *rows: expert_ffn(*rows, *weights), x, now, gates)
    return (y.astype(y_later.dtype) + y_later).astype(y.dtype), _overflow(room, x)


def _overflow(room: jax.Array | None, x: jax.Array) -> jax.Array:
    count = jnp.zeros((), jnp.float32) if room is None else (~room).sum(dtype=jnp.float32)
    return vary_like(count, x)


def _opened(
    way: Way, expert_ffn: ExpertFFN, x: jax.Array, gates: jax.Array
) -> tuple[Callable, list[jax.Array]]:
    """The experts as a function of (rows, sizes, gates, *weights), and their weights.

    Raises:
      ValueError: if weights are alike on devices whose tokens are not: their gradients would be added up in the loop.
    """
    rows = vary_like(jnp.zeros((way.dispatcher.num_rows(way.sharing), x.shape[1]), x.dtype), x)
    sizes = vary_like(jnp.zeros(way.sharing.experts_per_device, jnp.int32), x)
    of_rows = vary_like(jnp.zeros(len(rows), gates.dtype), x)
    function, weights = jax.closure_convert(expert_ffn, rows, sizes, of_rows)
    missing = {axis for leaf in weights for axis in _varying(x) - _varying(leaf)}
    if missing:
        raise ValueError(
            f"weights of experts must vary over the axes of the tokens, got some that do not over {sorted(missing)}; "
            "mark them by varying.vary"
        )
    return function, weights


def _varying(leaf: jax.Array) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying


def _who_agrees(way: Way, x: jax.Array) -> tuple[str, ...]:
    """Axes whose devices make the same number of passes."""
    if not way.dispatcher.waits_for_all:
        return way.sharing.axes
    return tuple(sorted(_varying(x)))


class _Later(NamedTuple):
    """Per device: how the passes after the first are made.

    Attributes:
      dispatcher: moves the rows.
      sharing: of one chunk, as its buffers are used.
      expert_ffn: (rows, sizes, gates, *weights) -> results.
      axes: along which devices agree on the number of passes.
      splits: whether backward makes the passes of weights apart.
    """

    dispatcher: Dispatcher
    sharing: Sharing
    expert_ffn: Callable[..., jax.Array]
    axes: tuple[str, ...]
    splits: bool

    def loop(self, turn: Callable[[jax.Array, Any], Any], waiting: jax.Array, carry):
        """Carry after a turn for every pass; `turn` takes the ids [T, k] that travel, others absent, and the carry."""
        absent = self.sharing.num_experts

        def some_are_left(ids):
            some = (ids < absent).any().astype(jnp.int32)
            return lax.pmax(some, self.axes) if self.axes else some

        def one_pass(state):
            ids, _, carry = state
            room = self.dispatcher.admit(ids, self.sharing)
            carry = turn(jnp.where(room, ids, absent), carry)
            ids = jnp.where(room, absent, ids)
            return ids, some_are_left(ids), carry

        with jax.named_scope("later_passes"):
            return lax.while_loop(
                lambda state: state[1] > 0, one_pass, (waiting, some_are_left(waiting), carry)
            )[2]

    def stages(self, expert_ids: jax.Array, x: jax.Array, gates: jax.Array, weights: list[jax.Array]):
        """One pass: y [T, D]."""
        arrived, sent = self.dispatcher.send(x, expert_ids, gates, self.sharing)

        def expert_ffn(*rows):
            return self.expert_ffn(*rows, *weights)

        results = self.dispatcher.work(expert_ffn, arrived, self.sharing)
        return self.dispatcher.collect(results, sent, self.sharing)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_later(later: _Later, x: jax.Array, gates: jax.Array, weights: list[jax.Array], waiting: jax.Array):
    """Per device: what passes after the first add [T, D], in at least float32; then x, gates and weights as they are.

    Pass 1 takes these: so its gradients come here, and those of later passes are added to them.
    """

    def turn(expert_ids, y):
        return y + later.stages(expert_ids, x, gates, weights).astype(y.dtype)

    y = vary_like(jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), x)
    return later.loop(turn, waiting, y), x, gates, weights


def _forward(later: _Later, x, gates, weights, waiting):
    return _run_later(later, x, gates, weights, waiting), (x, gates, weights, waiting)


def _backward(later: _Later, saved, gradients):
    x, gates, weights, waiting = saved
    dy, dx, dgates, dweights = gradients
    dy = dy.astype(x.dtype)

    def of_tokens(expert_ids, total):
        _, vjp = jax.vjp(lambda x, gates: later.stages(expert_ids, x, gates, weights), x, gates)
        return _added(total, vjp(dy))

    def of_weights(expert_ids, total):
        _, vjp = jax.vjp(lambda weights: later.stages(expert_ids, x, gates, weights), weights)
        return _added(total, vjp(dy)[0])

    def of_both(expert_ids, total):
        _, vjp = jax.vjp(partial(later.stages, expert_ids), x, gates, weights)
        dx, dgates, dweights = vjp(dy)
        return _added(total[0], (dx, dgates)), _added(total[1], dweights)

    tokens = (dx.astype(jnp.promote_types(dx.dtype, jnp.float32)), dgates)
    if later.splits:
        tokens = later.loop(of_tokens, waiting, tokens)
        dweights = later.loop(of_weights, waiting, dweights)
    else:
        tokens, dweights = later.loop(of_both, waiting, (tokens, dweights))
    return tokens[0].astype(x.dtype), tokens[1], dweights, None


_run_later.defvjp(_forward, _backward)


def _added(total, more):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)
