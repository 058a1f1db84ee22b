"""Cells: what a mesh and a number of microbatches decide, whatever schedule, memory mode and vocabulary go with them.

Layers are priced for every kind and memory mode; what depends on tokens and expert axis only is remembered.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from models import cost
from models.config import LayerConfig, ModelConfig, MoEFFN
from piperjax.planner.backends import installed_cpu
from piperjax.planner.candidates import (
    Mesh,
    Question,
    dispatch_ways,
    memory_modes,
    microbatch_counts,
    vocabularies,
)
from piperjax.planner.collectives import ALGORITHMS
from piperjax.planner.dispatchers import Way, named
from piperjax.planner.kept import Share, kept_bytes
from piperjax.planner.layer_time import LayerSeconds, layer_seconds
from piperjax.planner.network import axis_group, permute
from piperjax.planner.partition import partition_layers
from piperjax.planner.plan import LAST_LAYER_MODES, Plan
from piperjax.planner.shared_cores import at_once
from piperjax.planner.step_end import itemsize_of, step_end_seconds
from piperjax.planner.storage import kinds_of, storage
from piperjax.planner.timing import vocabulary_exchange_seconds, vocabulary_seconds
from piperjax.planner.workspace import Backend, layer_backward


class Cell(NamedTuple):
    """What a mesh and a number of microbatches decide. Modes, kinds of layers and vocabularies are the axes.

    Attributes:
      index: number of the mesh.
      mesh, num_microbatches: these.
      way: how rows reach their experts.
      layers: seconds of F, B, I, W, of exchanges in F and in B or I, and of slices of weights, `[modes, 2 kinds, 7]`:
        of layers of every kind, then of those that are the last of their stage.
      transfer: seconds of one exchange with the neighbours.
      outer: seconds of embedding and head of one microbatch, `[vocabularies]`.
      outer_exchange: seconds of exchanges in it, `[vocabularies]`.
      step_end: seconds once per step.
      share: what a device works on at a time.
    """

    index: int
    mesh: Mesh
    num_microbatches: int
    way: Way
    layers: np.ndarray
    transfer: float
    outer: np.ndarray
    outer_exchange: np.ndarray
    step_end: float
    share: Share


def groups(question: Question, meshes: list[Mesh]) -> Iterator[list[Cell]]:
    """Cells with the same pipe ranks and microbatches."""
    groups: dict[tuple[int, int], list[Cell]] = {}
    for index, mesh in enumerate(meshes):
        for number in microbatch_counts(question, mesh):
            tokens = question.tokens_per_step // (mesh.data * mesh.expert * number)
            if candidates := ways_on(question, mesh, tokens):
                found = _cells(question, index, mesh, number, candidates=candidates)
                groups.setdefault((mesh.pipe, number), []).extend(found)
    yield from groups.values()


def ways_on(question: Question, mesh: Mesh, tokens: int) -> tuple[Way, ...]:
    """Ways of dispatch that differ on a mesh, for so many tokens of a microbatch on a device."""
    possible = tuple(
        way
        for way in dispatch_ways(question)
        if tokens % way.chunks == 0 and not (mesh.pipe > 1 and named(way.dispatch).waits_for_all)
    )
    if mesh.expert == 1:
        return possible[:1]
    *nodes, local = question.platform.expert_factors(**mesh._asdict())
    if prod(nodes) > 1 and local > 1:
        return possible
    # With one node, or one device in each, all-to-alls are the same, and the plainest will do.
    return tuple(way for way in possible if not any(_is_plainer(other, way) for other in possible))


def _is_plainer(other: Way, way: Way) -> bool:
    """Whether another way sends the same rows in as many chunks by a simpler all-to-all."""
    one, two = named(other.dispatch), named(way.dispatch)
    alike = one.deduplicates == two.deduplicates and other.chunks == way.chunks
    return alike and ALGORITHMS.index(one.algorithm) < ALGORITHMS.index(two.algorithm)


def _cells(
    question: Question, index: int, mesh: Mesh, num_microbatches: int, *, candidates: tuple[Way, ...]
) -> list[Cell]:
    """With the quickest way of dispatch, and with the leanest if that is another."""
    model, platform, dtype = question.model, question.platform, question.dtype
    sequences = question.batch_size // (mesh.data * mesh.expert * num_microbatches)
    share = Share(
        sequences=sequences,
        seq_len=question.seq_len,
        expert=mesh.expert,
        capacity_factor=question.wished.get("capacity_factor", 0.0),
        overflow=question.wished.get("overflow", "drop"),
        dtype=dtype,
    )
    plans = [
        _simplest_plan(question, mesh, num_microbatches, placed)
        for placed in vocabularies(question, mesh.pipe)
    ]
    nodes = prod(plans[0].expert_factors[:2])
    activation = share.tokens * model.d_model * itemsize_of(dtype)
    outer = [sum(vocabulary_seconds(model, plan, platform, dtype=dtype).values()) for plan in plans]
    # One for the embedding, three for the head, one for the gradient of the embedding.
    exchanges = 2 + 3 * (1 + model.prediction_layers)
    exchange = [vocabulary_exchange_seconds(model, plan, platform, dtype=dtype) for plan in plans]
    reduction, optimizer = step_end_seconds(model, plans[0], platform, dtype=dtype)
    if platform.device.concurrent_devices is not None:
        optimizer = at_once(platform, question.num_devices * optimizer)
    return [
        Cell(
            index=index,
            mesh=mesh,
            num_microbatches=num_microbatches,
            way=way,
            layers=layers,
            transfer=2 * permute(platform, axis_group(plans[0], "pipe"), activation).seconds,
            outer=np.array(outer),
            outer_exchange=exchanges * np.array(exchange),
            step_end=reduction + optimizer,
            share=_by(share, way, nodes),
        )
        for way, layers in _layers(question, share, plans[0].expert_factors, candidates)
    ]


def _by(share: Share, way: Way, nodes: int) -> Share:
    return replace(share, nodes=nodes, dispatch=way.dispatch, dispatch_chunks=way.chunks)


def _simplest_plan(question: Question, mesh: Mesh, num_microbatches: int, vocabulary: str) -> Plan:
    """A plan with one stage per rank, for what does not depend on the schedule."""
    return Plan(
        **mesh._asdict(),
        expert_factors=question.platform.expert_factors(**mesh._asdict()),
        schedule="one_f_one_b",
        num_microbatches=num_microbatches,
        layers_per_stage=layers_by_flop(question.model, question.seq_len, mesh.pipe),
        batch_size=question.batch_size,
        seq_len=question.seq_len,
        vocabulary=vocabulary,
        gradient_dtype=question.wished.get("gradient_dtype", "float32"),
    )


def _layers(
    question: Question, share: Share, expert_factors: tuple[int, int, int], candidates: tuple[Way, ...]
) -> tuple[tuple[Way, np.ndarray], ...]:
    """`Cell.layers` by the quickest and leanest ways."""
    return _priced_layers(
        question.model,
        question.platform,
        share,
        expert_factors,
        (
            memory_modes(question),
            candidates,
            question.imbalance,
            memory_backend(question),
            question.wished.get("gradient_dtype", "float32"),
        ),
    )


@lru_cache(maxsize=8192)
def _priced_layers(model, platform, share: Share, expert_factors, choices: tuple):
    modes, candidates, imbalance, backend, gradient_dtype = choices
    kinds = kinds_of(model)

    def price(layer: LayerConfig, mode: str, way: Way) -> LayerSeconds:
        return layer_seconds(
            model,
            layer,
            platform,
            tokens=share.tokens,
            seq_len=share.seq_len,
            expert_factors=expert_factors,
            dtype=share.dtype,
            memory_mode=mode,
            dispatcher=way.dispatch,
            dispatch_chunks=way.chunks,
            imbalance=imbalance,
            capacity_factor=share.capacity_factor,
            overflow=share.overflow,
            gradient_dtype=gradient_dtype,
        )

    chosen, moe = candidates[:1], next((pair for pair in kinds if isinstance(pair[1].ffn, MoEFFN)), None)
    if moe is not None and len(candidates) > 1:
        kind, layer = moe
        # Which one is quickest depends little on what is computed again.
        totals = {way: price(layer, modes[0], way).total for way in candidates}
        nodes = prod(expert_factors[:2])
        needed = {way: _layer_bytes(model, kind, _by(share, way, nodes), backend) for way in candidates}
        quickest = min(candidates, key=totals.get)
        leanest = min(candidates, key=lambda way: (needed[way], totals[way]))
        chosen = (quickest, leanest) if needed[leanest] < needed[quickest] else (quickest,)
    found = []
    for way in chosen:
        seconds = np.zeros((len(modes), 2 * len(kinds), 7))
        for i, mode in enumerate(modes):
            both = product((mode, LAST_LAYER_MODES.get(mode, mode)), kinds)
            for j, (counted, (_, layer)) in enumerate(both):
                priced = price(layer, counted, way)
                seconds[i, j] = (
                    priced.forward,
                    priced.backward,
                    priced.input_gradient,
                    priced.weight_gradient,
                    priced.exchange_forward,
                    priced.exchange_backward,
                    priced.slices,
                )
        found.append((way, seconds))
    return tuple(found)


def _layer_bytes(model: ModelConfig, kind: str, share: Share, backend: str) -> float:
    """Bytes of the backward of one layer, and of one microbatch if what travelled is kept for it."""
    everywhere = (model.num_layers,)
    weights = storage(model, everywhere, pipe=1, data=1, expert=share.expert, dtype=share.dtype).layers[kind]
    layer, compiler = model.kinds[kind], Backend.named(backend, share)
    phase = layer_backward(model.d_model, layer, weights, compiler, splits=False)
    return phase.total + kept_bytes(model.d_model, layer, share, "named")


@lru_cache(maxsize=1024)
def layers_by_flop(model: ModelConfig, seq_len: int, num_stages: int) -> tuple[int, ...]:
    """Layers per stage so that the stage with most FLOP has as few as possible."""
    costs = tuple(float(layer.total) for layer in cost.flop_per_token(model, seq_len).layers)
    return partition_layers(costs, num_stages)


def memory_backend(question: Question) -> str:
    """What compiles for the devices: simulated ones are CPUs."""
    return "gpu" if question.platform.device.concurrent_devices is None else installed_cpu()
