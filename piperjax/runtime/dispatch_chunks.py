"""The tokens of a microbatch in chunks, so that one is on its way while another is at its experts.

    step     0     1     2     3     4
    send     0     1     2
    work           0     1     2             three chunks
    collect              0     1     2

At the end of every step a barrier holds all that its stages made, and the next chunk of tokens, until all are done:
without it a compiler would send every chunk first and work after. Transposed, the barriers hold gradients, and the
backward of a step runs beside those of the same step, in reverse: it is the same pipeline.

On CPU two things differ. Barriers vanish before XLA orders the operations of a device, so there values are tied by an
operation that it cannot remove. And exchanges of a device run one after the other, in that order: those of `work`
before its products come first, then those of the other stages, beside products, and backward likewise. On GPUs they
run at the same time. (And memory is not shared between exchanges and products: `xla_flags.BESIDE_EXCHANGES`.)
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from piperjax.runtime.dispatcher import DISPATCHED, Dispatcher, ExpertFFN, Sharing
from piperjax.runtime.ties import tied
from piperjax.runtime.varying import vary_like


def run(
    dispatcher: Dispatcher,
    expert_ffn: ExpertFFN,
    tokens: tuple[jax.Array, jax.Array, jax.Array],
    sharing: Sharing,
    *,
    chunks: int,
) -> jax.Array:
    """Per device: all stages of a dispatcher for (x [T, D], expert_ids [T, k], gates [T, k]) in chunks: y [T, D].

    Every chunk has buffers of its own: `sharing` is that of one.
    """
    waiting, *others = (jnp.split(array, chunks) for array in tokens)
    others = list(zip(*others, strict=True))
    arrived, sent, results, collected = {}, {}, {}, {}

    def exchange(step: int) -> list:
        """What other chunks send and collect in a step; returns the entries that it makes."""
        made = []
        if step < chunks:
            arrived[step], sent[step] = dispatcher.send(waiting[step], *others[step], sharing)
            made.append((arrived, step))
        if step >= 2:
            collected[step - 2] = dispatcher.collect(results.pop(step - 2), sent.pop(step - 2), sharing)
            made.append((collected, step - 2))
        return made

    for step in range(chunks + 2):
        if 1 <= step <= chunks:
            leaving = [(waiting, step)] * (step < chunks) + [(results, step - 2)] * (step >= 2)
            beside = _Beside(expert_ffn, leaving if chunks > 1 else [], partial(exchange, step))
            results[step - 1] = dispatcher.work(beside, arrived.pop(step - 1), sharing)
            made = [(results, step - 1), *beside.made]
        else:
            made = exchange(step)
        if step + 1 < chunks:
            made.append((waiting, step + 1))
        if chunks > 1:
            _hold(_until_all_are_there, made)
        if step < chunks:
            # After the barrier: what is kept must not ask for all that the barrier holds.
            arrived[step] = jax.tree.map(partial(_named, sharing), arrived[step])
    return jnp.concatenate([collected[chunk] for chunk in range(chunks)])


def _named(sharing: Sharing, leaf: jax.Array) -> jax.Array:
    # With one device nothing has travelled, and indices are made again from what is there.
    remake = sharing.num_devices == 1 and not jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf if remake else checkpoint_name(leaf, DISPATCHED)


class _Beside:
    """The experts of one chunk, beside what other chunks send meanwhile.

    That leaves when the rows of the experts are there, not before; backward, when the gradients of their results are.
    """

    def __init__(self, expert_ffn: ExpertFFN, leaving: list, exchange: Callable[[], list]):
        self._expert_ffn, self._leaving, self._exchange = expert_ffn, leaving, exchange
        self.made: list = []

    def __call__(self, rows: jax.Array, sizes: jax.Array, gates: jax.Array) -> jax.Array:
        """Calls the experts once, and makes what is exchanged."""
        if self._leaving:
            _hold(partial(_after, rows), self._leaving)
        self.made = self._exchange()
        results = {0: self._expert_ffn(rows, sizes, gates)}
        if self._leaving:
            _hold(_gradients_after_last, [*self.made, (results, 0)])
        return results[0]


def _hold(hold: Callable[[list[jax.Array]], list[jax.Array]], made: list) -> None:
    """Passes all floating-point arrays of (container, key) entries through a function."""
    leaves, structure = jax.tree.flatten([container[key] for container, key in made])
    floating = [number for number, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    alike = [vary_like(leaves[number], *leaves) for number in floating]
    for number, leaf in zip(floating, hold(alike), strict=True):
        leaves[number] = leaf
    for (container, key), value in zip(made, jax.tree.unflatten(structure, leaves), strict=True):
        container[key] = value


@jax.custom_vjp
def _until_all_are_there(leaves: list[jax.Array]) -> list[jax.Array]:
    return lax.platform_dependent(
        leaves, cpu=lambda leaves: tied(leaves, to=leaves), default=lax.optimization_barrier
    )


_until_all_are_there.defvjp(
    lambda leaves: (_until_all_are_there(leaves), None), lambda _, dy: (_until_all_are_there(dy),)
)


def _after(first: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
    """The same values, on CPU not before the first is there."""
    first = lax.stop_gradient(vary_like(first, *leaves))
    return _wait([vary_like(leaf, first) for leaf in leaves], first)


@jax.custom_vjp
def _wait(leaves: list[jax.Array], first: jax.Array) -> list[jax.Array]:
    def wait(leaves, first):
        return tied(leaves, to=[first])

    return lax.platform_dependent(leaves, first, cpu=wait, default=lambda leaves, _: leaves)


# The gradients of what leaves come from exchanges, for which `_gradients_after_last` stands.
_wait.defvjp(lambda leaves, first: (_wait(leaves, first), None), lambda _, dy: (dy, None))


@jax.custom_vjp
def _gradients_after_last(leaves: list[jax.Array]) -> list[jax.Array]:
    """The same values; on CPU the gradients of all but the last are not there before its own is."""
    return leaves


def _gradients(_, dys: list[jax.Array]) -> tuple[list[jax.Array]]:
    *others, last = dys
    return ([*_after(last, others), last],)


_gradients_after_last.defvjp(lambda leaves: (leaves, None), _gradients)
