"""Where every layer and every parameter lives: device layout, shardings, and the way back to logical arrays.

Logical parameters are stacked by layer kind, `[L_kind, ...]`, and know no mesh: checkpoints hold these.
On devices a leaf is `[pipe, chunk, L_kind_per_chunk, ...]`, each pipe rank holding the layers of its stages;
ranks with fewer layers of a kind are padded with zeros. Embedding and head `[V, D]` are split over the
vocabulary across the pipe ranks, `V` padded to a multiple of `pipe`.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from meshes.axes import BATCH, DATA, EXPERT, PIPE
from models.config import ModelConfig
from piperjax.runtime.runs import Runs, runs_of
from piperjax.schedules.schedule import Schedule

NO_LAYER = -1


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """Which layer runs where. Arrays are `[pipe, chunk, position]` unless said otherwise.

    Attributes:
      kinds: layer kinds in the order of `kind`.
      layer_ids: for each kind, `[pipe, chunk, L_kind]` logical layer numbers, `NO_LAYER` where padded.
      kind: index into `kinds` of the layer at each position, `len(kinds)` where there is none.
      index: position of that layer among the layers of its kind on the same chunk.
      moe_index: position of that layer among all MoE layers of the model, 0 for dense layers.
      layer: logical layer number, `NO_LAYER` where there is none.
      moe_kinds: kinds with experts.
    """

    kinds: tuple[str, ...]
    layer_ids: dict[str, np.ndarray]
    kind: np.ndarray
    index: np.ndarray
    moe_index: np.ndarray
    layer: np.ndarray
    moe_kinds: frozenset[str]

    @property
    def positions(self) -> int:
        """Most layers that any stage holds."""
        return self.kind.shape[2]

    @cached_property
    def runs(self) -> Runs:
        """The layers of every chunk as runs of one kind."""
        return runs_of(self.kind, len(self.kinds))

    @property
    def busiest_kind(self) -> int:
        """Index of the kind of layer of which there are most; MoE layers come before others."""
        counts = np.bincount(self.kind[self.kind < len(self.kinds)], minlength=len(self.kinds))
        return max(
            range(len(self.kinds)), key=lambda kind: (self.kinds[kind] in self.moe_kinds, counts[kind])
        )


def layer_layout(config: ModelConfig, schedule: Schedule, layers_per_stage: tuple[int, ...]) -> LayerLayout:
    """Places the layers of a model on the chunks of a schedule.

    Raises:
      ValueError: if the stages do not hold exactly the model's layers.
    """
    if sum(layers_per_stage) != config.num_layers:
        raise ValueError(
            f"the stages must hold the {config.num_layers} layers of {config.name}, but layers_per_stage "
            f"{tuple(layers_per_stage)} holds {sum(layers_per_stage)}"
        )
    kinds = tuple(config.kinds)
    first = np.concatenate([[0], np.cumsum(layers_per_stage)])
    shape = (schedule.num_ranks, schedule.num_chunks)
    kind = np.full((*shape, max(layers_per_stage)), len(kinds), np.int32)
    index, moe_index = np.zeros_like(kind), np.zeros_like(kind)
    layer = np.full_like(kind, NO_LAYER)
    held: dict[str, list[tuple[int, int, int, int]]] = {name: [] for name in kinds}
    moe_position = {number: position for position, number in enumerate(config.moe_layers)}
    for rank, stages in enumerate(schedule.stage_of_chunk):
        for chunk, stage in enumerate(stages):
            counts = dict.fromkeys(kinds, 0)
            for position, number in enumerate(range(first[stage], first[stage + 1])):
                name = config.kind_of_layer[number]
                place = (rank, chunk, position)
                kind[place], index[place] = kinds.index(name), counts[name]
                moe_index[place], layer[place] = moe_position.get(number, 0), number
                held[name].append((rank, chunk, counts[name], number))
                counts[name] += 1
    layer_ids = {}
    for name, places in held.items():
        ids = np.full((*shape, 1 + max(place[2] for place in places)), NO_LAYER, np.int32)
        for rank, chunk, at, number in places:
            ids[rank, chunk, at] = number
        layer_ids[name] = ids
    return LayerLayout(
        kinds=kinds,
        layer_ids=layer_ids,
        kind=kind,
        index=index,
        moe_index=moe_index,
        layer=layer,
        moe_kinds=frozenset(config.kind_of_layer[number] for number in config.moe_layers),
    )


@dataclass(frozen=True, kw_only=True)
class LeafSharding:
    """How one parameter is stored, gathered for use, and how its gradient is reduced.

    Attributes:
      spec: at rest, in device layout.
      gather_axes: mesh axes it is split over at rest only (ZeRO), gathered before use.
      gather_dimension: the dimension that is split, in device layout.
      reduce_axes: mesh axes over which gradients are summed; those of `gather_axes` by reduce-scatter.
      gradient_spec: of gradients after that: as at rest, axes of one device that nothing was summed over named as well.
      expert_dimension: dimension of the experts in device layout, or -1.
    """

    spec: P
    gradient_spec: P
    gather_axes: tuple[str, ...]
    gather_dimension: int
    reduce_axes: tuple[str, ...]
    expert_dimension: int = -1


def leaf_sharding(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> LeafSharding:
    """Shards one leaf of the device layout.

    Layers are split over pipe, experts over the expert axes, the vocabulary over pipe. What remains
    replicated is split at rest over the devices that hold copies (ZeRO-1; Rajbhandari et al.,
    arXiv:1910.02054): dense leaves over data x expert, expert leaves over data, along the largest
    dimension that divides.
    """
    if path == ("final_norm",):
        return LeafSharding(
            spec=P(), gradient_spec=P(), gather_axes=(), gather_dimension=0, reduce_axes=(PIPE, *BATCH)
        )
    entries: list = [PIPE] + [None] * (len(shape) - 1)
    is_expert = "experts" in path
    expert_dimension = 3 if is_expert else -1
    if is_expert:
        entries[expert_dimension] = EXPERT
    copies = (DATA,) if is_expert else BATCH
    size = int(np.prod([mesh.shape[axis] for axis in copies]))
    first_free = 3 + is_expert if path[0] == "layers" else 1
    fits = [d for d in range(first_free, len(shape)) if shape[d] % size == 0]
    if size == 1 or not fits:
        # A sum over one device would be a copy of all its gradients.
        alone = copies if size == 1 else ()
        return LeafSharding(
            spec=P(*entries),
            gradient_spec=P((PIPE, *alone), *entries[1:]),
            gather_axes=(),
            gather_dimension=0,
            reduce_axes=() if alone else copies,
            expert_dimension=expert_dimension,
        )
    dimension = max(fits, key=lambda d: (shape[d], d))
    entries[dimension] = copies
    return LeafSharding(
        spec=P(*entries),
        gradient_spec=P(*entries),
        gather_axes=copies,
        gather_dimension=dimension,
        reduce_axes=copies,
        expert_dimension=expert_dimension,
    )


def path_names(path: tuple) -> tuple[str, ...]:
    """Key path of a pytree of dicts as names."""
    return tuple(str(entry.key) for entry in path)


def padded_vocabulary(vocab_size: int, pipe: int) -> int:
    """Rows of embedding and head: the vocabulary rounded up to a multiple of the pipe ranks."""
    return -(-vocab_size // pipe) * pipe


def device_from_logical(config: ModelConfig, layout: LayerLayout, pipe: int, tree: dict) -> dict:
    """Puts logical arrays into device layout (traceable)."""
    rows = padded_vocabulary(config.vocab_size, pipe) - config.vocab_size
    result = {"final_norm": tree["final_norm"]}
    for name in ("embedding", "head"):
        if name in tree:
            result[name] = jnp.pad(tree[name], ((0, rows), (0, 0)))
    result["layers"] = {
        kind: jax.tree.map(lambda leaf, kind=kind: _spread(config, layout, kind, leaf), stack)
        for kind, stack in tree["layers"].items()
    }
    return result


def logical_from_device(config: ModelConfig, layout: LayerLayout, tree: dict) -> dict:
    """Puts device-layout arrays into logical layout (traceable); the inverse of `device_from_logical`."""
    result = {"final_norm": tree["final_norm"]}
    for name in ("embedding", "head"):
        if name in tree:
            result[name] = tree[name][: config.vocab_size]
    result["layers"] = {
        kind: jax.tree.map(lambda leaf, kind=kind: _collect(config, layout, kind, leaf), stack)
        for kind, stack in tree["layers"].items()
    }
    return result


def _spread(config: ModelConfig, layout: LayerLayout, kind: str, leaf: jax.Array) -> jax.Array:
    ids = layout.layer_ids[kind]
    numbers = np.array(config.layers_of_kind(kind))
    if ids.size == numbers.size and (ids.ravel() == numbers).all():
        return leaf.reshape(*ids.shape, *leaf.shape[1:])
    held = ids != NO_LAYER
    position = np.searchsorted(numbers, np.where(held, ids, numbers[0]))
    picked = leaf[position.ravel()].reshape(*ids.shape, *leaf.shape[1:])
    mask = held.reshape(*held.shape, *(1,) * (leaf.ndim - 1))
    return jnp.where(mask, picked, jnp.zeros((), leaf.dtype))


def _collect(config: ModelConfig, layout: LayerLayout, kind: str, leaf: jax.Array) -> jax.Array:
    ids = layout.layer_ids[kind]
    flat = leaf.reshape(ids.size, *leaf.shape[3:])
    where = {int(number): place for place, number in enumerate(ids.ravel()) if number != NO_LAYER}
    order = np.array([where[number] for number in config.layers_of_kind(kind)])
    if order.size == ids.size and (order == np.arange(ids.size)).all():
        return flat
    return flat[order]


def shardings(tree: dict, mesh: Mesh) -> dict:
    """`LeafSharding` of every leaf of a device-layout tree of arrays or shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf_sharding(path_names(path), leaf.shape, mesh), tree
    )


def named_shardings(leaf_shardings: dict, mesh: Mesh) -> dict:
    """`NamedSharding` at rest of every leaf."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, leaf.spec),
        leaf_shardings,
        is_leaf=lambda x: isinstance(x, LeafSharding),
    )


def logical_shardings(config: ModelConfig, layout: LayerLayout, tree: dict, mesh: Mesh) -> dict:
    """`NamedSharding` of every leaf of the logical layout of a device-layout tree.

    As at rest; the layer or vocabulary dimension keeps its split over pipe where it divides evenly.
    """

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = path_names(path)
        spec = leaf_sharding(names, leaf.shape, mesh).spec
        if names == ("final_norm",):
            return NamedSharding(mesh, spec)
        if names[0] == "layers":
            ids, numbers = layout.layer_ids[names[1]], config.layers_of_kind(names[1])
            split = ids.size == len(numbers) and tuple(ids.ravel()) == tuple(numbers)
            return NamedSharding(mesh, P(PIPE if split else None, *spec[3:]))
        split = leaf.shape[0] == config.vocab_size
        return NamedSharding(mesh, P(PIPE if split else None, *spec[1:]))

    return jax.tree_util.tree_map_with_path(one, tree)
