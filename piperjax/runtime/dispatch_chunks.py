"""The tokens of a microbatch in chunks, so that one is on its way while another is at its experts.

    step     0     1     2     3     4
    send     0     1     2
    work           0     1     2             three chunks
    collect              0     1     2

At the end of every step a barrier holds all that its stages made, and the next chunk of tokens, until all are done:
without it a compiler would send every chunk first and work after. Transposed, the barriers hold gradients, and the
backward of a step runs beside those of the same step, in reverse: it is the same pipeline.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from piperjax.runtime.dispatcher import DISPATCHED, Dispatcher, ExpertFFN, Sharing


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
    for step in range(chunks + 2):
        made = {}
        if step < chunks:
            arrived[step], sent[step] = dispatcher.send(waiting[step], *others[step], sharing)
            made["arrived"] = (arrived, step)
        if 1 <= step <= chunks:
            results[step - 1] = dispatcher.work(expert_ffn, arrived.pop(step - 1), sharing)
            made["results"] = (results, step - 1)
        if step >= 2:
            collected[step - 2] = dispatcher.collect(results.pop(step - 2), sent.pop(step - 2), sharing)
            made["collected"] = (collected, step - 2)
        if step + 1 < chunks:
            made["waiting"] = (waiting, step + 1)
        if chunks > 1:
            _hold(list(made.values()))
        if step < chunks:
            # After the barrier: what is kept must not ask for all that the barrier holds.
            arrived[step] = jax.tree.map(partial(_named, sharing), arrived[step])
    return jnp.concatenate([collected[chunk] for chunk in range(chunks)])


def _named(sharing: Sharing, leaf: jax.Array) -> jax.Array:
    # With one device nothing has travelled, and indices are made again from what is there.
    remake = sharing.num_devices == 1 and not jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf if remake else checkpoint_name(leaf, DISPATCHED)


def _hold(made: list) -> None:
    """Passes all floating-point arrays of (container, key) entries through one barrier."""
    leaves, structure = jax.tree.flatten([container[key] for container, key in made])
    floating = [number for number, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    held = lax.optimization_barrier([leaves[number] for number in floating])
    for number, leaf in zip(floating, held, strict=True):
        leaves[number] = leaf
    for (container, key), value in zip(made, jax.tree.unflatten(structure, leaves), strict=True):
        container[key] = value
