"""All-to-all over the expert axes, as a value: one message to every device, or in phases that follow the nodes.

Every algorithm takes rows [P C, ...], C for each of P devices in order, and returns what these sent, [P C, ...] in
the order of senders; all move the same bits to the same places. Devices are numbered along the axes, outermost first;
the last axis joins the devices of a node, the others together are the nodes.

Applied twice, an all-to-all returns what it was given, so each is its own transpose.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from piperjax.runtime.permute import take

Axes = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AllToAll:
    """An algorithm.

    Attributes:
      name: what a dispatcher is named after.
      move: per device: (rows [P C, ...], axes) -> rows [P C, ...].
      waits_for_all: whether it waits for all devices of a mesh, not only for those along the axes.
    """

    name: str
    move: Callable[[jax.Array, Axes], jax.Array]
    waits_for_all: bool = False


def split_axes(axes: Axes) -> tuple[Axes, Axes]:
    """Axes between nodes and the axis inside of one, without those along which there is one device."""
    return _longer(axes[:-1]), _longer(axes[-1:])


def _longer(axes: Axes) -> Axes:
    return tuple(axis for axis in axes if lax.axis_size(axis) > 1)


def axes_size(axes: Axes) -> int:
    """Devices along the axes together."""
    return math.prod(lax.axis_size(axis) for axis in axes)


def _flat(x: jax.Array, axes: Axes) -> jax.Array:
    """One message to each of P - 1 devices."""
    axes = _longer(axes)
    return lax.all_to_all(x, axes, 0, 0, tiled=True) if axes else x


def _halo2(x: jax.Array, axes: Axes) -> jax.Array:
    """Inside the node to the device of the destination's local index, then between nodes: L - 1 + N - 1 messages.

    Those between nodes are L times as large as flat ones, and every device sends to its own index only, by its own
    network interface. The first phase brings rows for this node to their destination.

    Piper (arXiv:2605.05049, section 6) sends those beside the others, and these on inside the destination's node.
    That is one phase more, and saves 1 / N of the first: on 4 nodes of 8 devices over sockets, where exchanges of a
    device run one after the other, it took 2.3 times as long at 256 B of a pair, 1.1 at 4 KiB, and 0.97 at 64 KiB,
    which is within the scatter.
    """
    nodes, local = split_axes(axes)
    if not nodes or not local:
        return _flat(x, axes)
    rows = x.reshape(axes_size(nodes), axes_size(local), -1)
    rows = lax.all_to_all(rows, local, 1, 1, tiled=True)
    return lax.all_to_all(rows, nodes, 0, 0, tiled=True).reshape(x.shape)


def _halo3(x: jax.Array, axes: Axes) -> jax.Array:
    """To a leader for each pair of nodes, to the same local index of the other node, from there to the destination.

    Between nodes a device sends ceil(N / L) messages, up to L^2 times as large as flat ones (`_Leaders`). They are
    permutes, for which all devices of a mesh wait: not for branches that some devices do not take.
    """
    nodes, local = split_axes(axes)
    if not nodes or not local:
        return _flat(x, axes)
    return _through_leaders(x, nodes, local)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _through_leaders(x: jax.Array, nodes: Axes, local: Axes) -> jax.Array:
    return by_leaders(x, nodes, local)


def by_leaders(x: jax.Array, nodes: Axes, local: Axes, *, to_same_index: bool = False) -> jax.Array:
    """Per device: rows for all devices [N L C, ...], or for those of its own index in all nodes, [N C, ...].

    Returns what these sent. The axes must have more than one device each. It is its own transpose; its gathers, taken
    one by one, are not: they would become scatters, so who calls this says that.
    """
    N, L = axes_size(nodes), axes_size(local)
    leaders = _Leaders(N, L)
    rows = x.reshape(N, 1 if to_same_index else L, -1)
    width = rows.shape[2]
    padding = -width % leaders.shares
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padding))).reshape(*rows.shape[:2], leaders.shares, -1)
    node = lax.axis_index(nodes)
    # [leader, round, destination, part of a row]
    rows = rows.swapaxes(1, 2).reshape(N * leaders.shares, rows.shape[1], -1)
    rows = lax.all_to_all(take(rows, take(leaders.sources, node)), local, 0, 0, tiled=True)
    # [round, source, destination, part]
    rows = jnp.stack(
        [
            lax.ppermute(rows[:, number], (*nodes, *local), pairs)
            for number, pairs in enumerate(leaders.rounds)
        ]
    )
    # [round, leader, source, part]; to the same index there is one source.
    if to_same_index:
        rows = lax.all_to_all(rows, local, 1, 1, tiled=True)
    else:
        rows = lax.all_to_all(rows, local, 2, 2, tiled=True).swapaxes(1, 2)
    # [node, part number, source, part]
    rows = take(rows.reshape(-1, *rows.shape[2:]), take(leaders.targets, node)).swapaxes(1, 2)
    return rows.reshape(*rows.shape[:2], -1)[:, :, :width].reshape(x.shape)


# Applied twice it is the identity.
_through_leaders.defvjp(
    lambda x, nodes, local: (by_leaders(x, nodes, local), None),
    lambda nodes, local, _, dy: (by_leaders(dy, nodes, local),),
)


class _Leaders:
    """Who carries what between N nodes of L devices.

    What node n sends to node m is carried by the devices of local index (n + m) mod L, on both sides. (The index of the
    destination alone would bring all that a node receives through one network interface.) With fewer nodes than
    devices in a node, L // N of them carry an equal share each, those of indices (n + m) mod N + N s. With more nodes
    a leader carries several pairs, one after the other.

    Attributes:
      shares: parts into which rows are cut.
      rounds: for every round the pairs (from, to) of device numbers that exchange something.
      sources: for every node n, what its devices hand to each leader in each round, as m shares + s: [N, L, rounds].
      targets: for every node m, where the s-th part of what n sent has arrived, as round L + leader: [N, N, shares].
    """

    def __init__(self, N: int, L: int):
        M = min(N, L)
        self.shares = L // M
        num_rounds = math.ceil(N / M)
        rounds: list[list[tuple[int, int]]] = [[] for _ in range(num_rounds)]
        self.sources = np.zeros((N, L, num_rounds), np.int32)
        self.targets = np.zeros((N, N, self.shares), np.int32)
        for n in range(N):
            for m in range(N):
                number = (m // M - n // M) % num_rounds
                for share in range(self.shares):
                    leader = (n + m) % M + M * share
                    rounds[number].append((n * L + leader, m * L + leader))
                    self.sources[n, leader, number] = m * self.shares + share
                    self.targets[m, n, share] = number * L + leader
        self.rounds = rounds
        self.sources, self.targets = jnp.asarray(self.sources), jnp.asarray(self.targets)


FLAT = AllToAll(name="flat", move=_flat)
HALO2 = AllToAll(name="halo2", move=_halo2)
HALO3 = AllToAll(name="halo3", move=_halo3, waits_for_all=True)
ALL_TO_ALLS = {algorithm.name: algorithm for algorithm in (FLAT, HALO2, HALO3)}
