"""Cells: what a mesh and a number of microbatches decide, whatever schedule, memory mode and vocabulary go with them.

Layers are priced for every kind and memory mode; what depends on tokens and expert axis only is remembered.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from models import cost
from models.config import ModelConfig, MoEFFN
from piperjax.planner import workspace
from piperjax.planner.candidates import Mesh, Question, memory_modes, microbatch_counts, vocabularies
from piperjax.planner.kept import Share, kept_bytes, tap_bytes
from piperjax.planner.layer_time import layer_seconds
from piperjax.planner.network import axis_group, best_dispatcher, permute
from piperjax.planner.partition import partition_layers
from piperjax.planner.plan import Plan
from piperjax.planner.shared_cores import at_once
from piperjax.planner.step_end import itemsize_of, step_end_seconds
from piperjax.planner.storage import kinds_of, storage
from piperjax.planner.timing import vocabulary_exchange_seconds, vocabulary_seconds

# Tokens, targets, weights, positions and segments: five numbers of 4 bytes.
BATCH_BYTES_PER_TOKEN = 5 * 4


class Cell(NamedTuple):
    """What a mesh and a number of microbatches decide. Modes, kinds of layers and vocabularies are the axes.

    Attributes:
      index: number of the mesh.
      mesh, num_microbatches: these.
      dispatch: number of the dispatcher.
      layers: seconds of F, B, I, W, and of the exchanges in F and in B or I, `[modes, kinds, 6]`.
      transfer: seconds of one exchange with the neighbours.
      outer: seconds of embedding and head of one microbatch, `[vocabularies]`.
      outer_exchange: seconds of exchanges in it, `[vocabularies]`.
      step_end: seconds once per step.
      kept, taps: bytes per layer that a forward and an input gradient leave, `[modes, kinds]`.
      activation: bytes of what a stage passes on.
      batch: bytes of the tokens of a step.
      layer_phase: bytes of the workspace of a layer.
      head_phase: bytes of the workspace of the head, `[vocabularies]`.
    """

    index: int
    mesh: Mesh
    num_microbatches: int
    dispatch: int
    layers: np.ndarray
    transfer: float
    outer: np.ndarray
    outer_exchange: np.ndarray
    step_end: float
    kept: np.ndarray
    taps: np.ndarray
    activation: float
    batch: float
    layer_phase: float
    head_phase: np.ndarray


def groups(question: Question, meshes: list[Mesh]) -> Iterator[list[Cell]]:
    """Cells with the same pipe ranks and microbatches."""
    groups: dict[tuple[int, int], list[Cell]] = {}
    for index, mesh in enumerate(meshes):
        for number in microbatch_counts(question, mesh):
            groups.setdefault((mesh.pipe, number), []).append(_cell(question, index, mesh, number))
    yield from groups.values()


def _cell(question: Question, index: int, mesh: Mesh, num_microbatches: int) -> Cell:
    model, platform, dtype = question.model, question.platform, question.dtype
    sequences = question.batch_size // (mesh.data * mesh.expert * num_microbatches)
    share = Share(
        sequences=sequences,
        seq_len=question.seq_len,
        expert=mesh.expert,
        capacity_factor=question.wished.get("capacity_factor", 0.0),
        dtype=dtype,
    )
    plans = [
        _simplest_plan(question, mesh, num_microbatches, placed)
        for placed in vocabularies(question, mesh.pipe)
    ]
    dispatch, layers, kept, taps, layer_phase = _layers(question, share, plans[0].expert_factors)
    activation = share.tokens * model.d_model * itemsize_of(dtype)
    outer = [sum(vocabulary_seconds(model, plan, platform, dtype=dtype).values()) for plan in plans]
    # One for the embedding, three for the head, one for the gradient of the embedding.
    exchanges = 2 + 3 * (1 + model.prediction_layers)
    exchange = [vocabulary_exchange_seconds(model, plan, platform, dtype=dtype) for plan in plans]
    reduction, optimizer = step_end_seconds(model, plans[0], platform, dtype=dtype)
    if platform.device.concurrent_devices is not None:
        optimizer = at_once(platform, question.num_devices * optimizer)
    return Cell(
        index=index,
        mesh=mesh,
        num_microbatches=num_microbatches,
        dispatch=question.dispatchers.index(dispatch),
        layers=layers,
        transfer=2 * permute(platform, axis_group(plans[0], "pipe"), activation).seconds,
        outer=np.array(outer),
        outer_exchange=exchanges * np.array(exchange),
        step_end=reduction + optimizer,
        kept=kept,
        taps=taps,
        activation=activation,
        batch=num_microbatches * share.tokens * BATCH_BYTES_PER_TOKEN,
        layer_phase=layer_phase,
        head_phase=np.array([_head_phase(question, plan, share) for plan in plans]),
    )


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
    )


def _layers(
    question: Question, share: Share, expert_factors: tuple[int, int, int]
) -> tuple[str, np.ndarray, np.ndarray, np.ndarray, float]:
    """Dispatcher, seconds, kept bytes and taps of every kind of layer in every memory mode, and its workspace."""
    return _priced_layers(
        question.model,
        question.platform,
        share,
        expert_factors,
        (memory_modes(question), question.dispatchers, question.imbalance, memory_backend(question)),
    )


@lru_cache(maxsize=8192)
def _priced_layers(model, platform, share: Share, expert_factors, choices: tuple):
    modes, dispatchers, imbalance, backend = choices
    kinds = kinds_of(model)
    dispatch = _dispatcher(model, platform, share, expert_factors, dispatchers, imbalance)
    seconds = np.zeros((len(modes), len(kinds), 6))
    kept, taps = np.zeros(seconds.shape[:2]), np.zeros(seconds.shape[:2])
    for i, mode in enumerate(modes):
        for j, (_, layer) in enumerate(kinds):
            priced = layer_seconds(
                model,
                layer,
                platform,
                tokens=share.tokens,
                seq_len=share.seq_len,
                expert_factors=expert_factors,
                dtype=share.dtype,
                memory_mode=mode,
                dispatcher=dispatch,
                imbalance=imbalance,
                capacity_factor=share.capacity_factor,
            )
            seconds[i, j] = (
                priced.forward,
                priced.backward,
                priced.input_gradient,
                priced.weight_gradient,
                priced.exchange_forward,
                priced.exchange_backward,
            )
            kept[i, j] = kept_bytes(model.d_model, layer, share, mode)
            taps[i, j] = tap_bytes(model.d_model, layer, share, mode)
    # Weights of one layer do not depend on how many a device holds.
    stored = storage(model, (model.num_layers,), pipe=1, data=1, expert=share.expert, dtype=share.dtype)
    phase = max(
        sum(workspace.layer_backward(model.d_model, layer, share, stored.layers[kind], wide=backend == "cpu"))
        for kind, layer in kinds
    )
    return dispatch, seconds, kept, taps, phase


def _dispatcher(
    model, platform, share: Share, expert_factors, dispatchers: tuple[str, ...], imbalance: float
) -> str:
    moe = next((layer.ffn for layer in model.layers if isinstance(layer.ffn, MoEFFN)), None)
    if moe is None or share.expert == 1 or len(dispatchers) == 1:
        return dispatchers[0]
    name, _ = best_dispatcher(
        platform,
        candidates=dispatchers,
        expert_factors=expert_factors,
        tokens=share.tokens,
        row_bytes=model.d_model * share.itemsize,
        num_experts=moe.num_experts,
        experts_per_token=moe.experts_per_token,
        imbalance=imbalance,
        capacity_factor=share.capacity_factor,
    )
    return name


def _head_phase(question: Question, plan: Plan, share: Share) -> float:
    rows = -(-question.model.vocab_size // (plan.pipe if plan.vocabulary == "split" else 1))
    wide = memory_backend(question) == "cpu"
    return sum(workspace.head(question.model.d_model, rows, share, wide=wide))


@lru_cache(maxsize=1024)
def layers_by_flop(model: ModelConfig, seq_len: int, num_stages: int) -> tuple[int, ...]:
    """Layers per stage so that the stage with most FLOP has as few as possible."""
    costs = tuple(float(layer.total) for layer in cost.flop_per_token(model, seq_len).layers)
    return partition_layers(costs, num_stages)


def memory_backend(question: Question) -> str:
    """What compiles for the devices: simulated ones are CPUs."""
    return "gpu" if question.platform.device.concurrent_devices is None else "cpu"
