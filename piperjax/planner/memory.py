"""This file is the memory that a plan needs on each device, by what it is for.

Every rank runs the same program, so all of them allocate the same: buffers are as large as the worst rank needs.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf
from typing import NamedTuple

from models.config import LayerConfig, ModelConfig, MoEFFN
from piperjax.planner import workspace
from piperjax.planner.backends import BACKENDS
from piperjax.planner.kept import Share, kept_bytes, tap_bytes
from piperjax.planner.plan import Plan
from piperjax.planner.storage import (
    LayerWeights,
    Storage,
    kinds_of,
    most_layers_of_kind,
    padded_rows,
    storage,
)
from piperjax.planner.workspace import Backend, Phase
from piperjax.schedules import registry
from piperjax.schedules.lower import lower
from piperjax.schedules.profile import Slots
from piperjax.schedules.ticks import pack

BATCH_FIELDS = 5  # Tokens, targets, weights, positions, segments; 4 bytes each.


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes that one device of a pipe rank needs, by what they are for.

    Attributes:
      parameters: master parameters at rest.
      moments: both moments of the optimizer.
      compute_copy: parameters cast and gathered for a step.
      gradients: accumulators.
      stash: what forwards in flight keep for their backwards.
      taps: what input gradients leave for weight gradients.
      pipeline_buffers: activations and gradients that travel between ranks.
      batch: tokens, targets, weights, positions and segments of a step.
      dispatch: rows that travel between experts' devices, in the phase that needs most.
      logits: likewise of the head.
      workspace: everything else that this phase needs.
      reserve: what the device or its libraries keep for themselves.
    """

    parameters: float
    moments: float
    compute_copy: float
    gradients: float
    stash: float
    taps: float
    pipeline_buffers: float
    batch: float
    dispatch: float
    logits: float
    workspace: float
    reserve: float = 0.0

    @property
    def terms(self) -> dict[str, float]:
        """Every part by name."""
        return dict(vars(self))

    @property
    def is_least(self) -> bool:
        """Whether nobody asked for more than what lasts, see `rank_memory`."""
        return self.workspace == 0.0

    @property
    def taken(self) -> float:
        """What a step takes and gives back."""
        return self.total - self.parameters - self.moments - self.batch - self.reserve

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.terms.values())


class _Lasting(NamedTuple):
    """What lasts from the first tick to the last, in the terms of `RankMemory`."""

    compute_copy: float
    gradients: float
    stash: float
    taps: float
    pipeline_buffers: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the memory of a model depends on.

    Attributes:
      pipe, data, expert: sizes of the axes.
      layers_per_stage: layers held by each stage.
      num_microbatches: of a step.
      share: what a device works on at a time.
      slots: buffers of the schedule, as a profile counts them.
      memory_mode, vocabulary, overlap, gradient_dtype: as in a plan.
      is_straight: every rank runs a forward and a backward in every tick, so that nothing is in a branch.
    """

    pipe: int
    data: int
    expert: int
    layers_per_stage: tuple[int, ...]
    num_microbatches: int
    share: Share
    slots: Slots
    memory_mode: str = "layer"
    vocabulary: str = "split"
    overlap: bool = False
    gradient_dtype: str = "float32"
    is_straight: bool = False

    @property
    def is_one_tick(self) -> bool:
        """Whether there is no loop over ticks, so that what a later part of a step needs is there from then on only."""
        return self.is_straight and self.num_microbatches * len(self.layers_per_stage) == self.pipe

    @property
    def splits(self) -> bool:
        """Whether backward comes as input and weight gradients."""
        return self.slots.taps > 0


def estimate_memory(
    model: ModelConfig,
    plan: Plan,
    *,
    dtype: str = "bfloat16",
    master_dtype: str = "float32",
    backend: str = "gpu",
    reserve_bytes: float = 0,
) -> tuple[RankMemory, ...]:
    """Bytes on a device of each pipe rank, for one training step with AdamW, old state donated.

    Args:
      model: the model.
      plan: how it is laid out.
      dtype: of the computation.
      master_dtype: of parameters at rest.
      backend: "gpu", or "cpu" as XLA compiles for simulated devices: there, products in bfloat16 are computed in
        float32, and what a loop reads in every turn is converted once, before it; "native_cpu" where only their
        results are float32, as with jax 0.12 (`installed_cpu` says which of the two).
      reserve_bytes: added as it is.

    Raises:
      ValueError: for an unknown backend or dtype.
    """
    layout = layout_of(plan, dtype)
    options = dict(master_dtype=master_dtype, backend=backend, reserve_bytes=reserve_bytes)
    return (rank_memory(model, layout, **options),) * plan.pipe


def layout_of(plan: Plan, dtype: str) -> Layout:
    """What memory depends on of a plan."""
    return Layout(
        pipe=plan.pipe,
        data=plan.data,
        expert=plan.expert,
        layers_per_stage=plan.layers_per_stage,
        num_microbatches=plan.num_microbatches,
        share=Share.of(plan, dtype),
        slots=plan.profile().slots,
        memory_mode=plan.memory_mode,
        vocabulary=plan.vocabulary,
        overlap=plan.overlap,
        gradient_dtype=plan.gradient_dtype,
        is_straight=plan.pipe == 1 and is_straight(plan.schedule, plan.num_microbatches, plan.num_chunks),
    )


def rank_memory(
    model: ModelConfig,
    layout: Layout,
    *,
    master_dtype: str = "float32",
    backend: str = "gpu",
    reserve_bytes: float = 0,
    enough: float = inf,
) -> RankMemory:
    """Bytes on any device; arguments as of `estimate_memory`.

    Args:
      model: the model.
      layout: what the memory of a plan depends on.
      enough: where what lasts from the first tick to the last takes more bytes than that, nothing else is counted.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    share, slots = layout.share, Slots(*(ceil(count - 1e-6) for count in layout.slots))
    stored = storage(
        model,
        layout.layers_per_stage,
        pipe=layout.pipe,
        data=layout.data,
        expert=layout.expert,
        vocabulary=layout.vocabulary,
        dtype=share.dtype,
        master_dtype=master_dtype,
        gradient_dtype=layout.gradient_dtype,
    )
    most = most_layers_of_kind(model, layout.layers_per_stage)
    kept = {kind: slots.stash * most[kind] for kind in most}
    compiler = Backend.named(backend, share)
    x = share.tokens * model.d_model * share.itemsize
    copy = stored.compute_copy
    if compiler.is_widened and layout.is_straight:
        # What is in no branch is read in every turn of the loop over ticks, so that is where it is converted.
        widened = copy if _is_loop(stored, layout) else stored.outer_copy
        copy += widened * (share.wide - share.itemsize) // share.itemsize
        # Of the embedding, which tokens are looked up in, what was converted stays as well.
        copy += padded_rows(model.vocab_size, layout.pipe) * model.d_model * share.itemsize
    of_layers = _between_passes(model, share, layout.memory_mode)
    stash = sum(kept[kind] * of_layers[kind].kept for kind in most)
    lasting = _Lasting(
        compute_copy=copy,
        gradients=stored.accumulators,
        stash=slots.stash * x if layout.memory_mode == "stage" else stash,
        taps=sum(slots.taps * most[kind] * of_layers[kind].taps for kind in most) if slots.taps else 0,
        pipeline_buffers=x * (2 + (slots.inputs + 1 if slots.inputs else 0) + slots.gradients + 1),
    )
    batch = layout.num_microbatches * share.tokens * BATCH_FIELDS * 4
    least = 3 * stored.at_rest + sum(lasting) + batch + reserve_bytes
    # In the phases of the only tick, some of that is not there yet, or gone.
    is_least = least > enough and not layout.is_one_tick
    phase = Phase() if is_least else _largest_phase(model, layout, stored, compiler, lasting)
    return RankMemory(
        parameters=stored.at_rest,
        moments=2 * stored.at_rest,
        **lasting._asdict(),
        batch=batch,
        **phase._asdict(),
        reserve=reserve_bytes,
    )


def peak_memory(model: ModelConfig, plan: Plan, **options) -> float:
    """Bytes on the device that needs most; options as of `estimate_memory`."""
    return max(rank.total for rank in estimate_memory(model, plan, **options))


class _Between(NamedTuple):
    """Bytes of one layer and microbatch between passes, and the elements of the computation's dtype among them."""

    kept: int
    taps: int
    narrow_kept: int
    narrow_taps: int


@lru_cache(maxsize=8192)
def _between_passes(model: ModelConfig, share: Share, memory_mode: str) -> dict[str, _Between]:
    """By kind of layer."""
    D = model.d_model
    return {
        kind: _Between(
            kept=kept_bytes(D, layer, share, memory_mode),
            taps=tap_bytes(D, layer, share, memory_mode),
            narrow_kept=workspace.narrow_elements(kept_bytes, D, layer, share, memory_mode),
            narrow_taps=workspace.narrow_elements(tap_bytes, D, layer, share, memory_mode),
        )
        for kind, layer in kinds_of(model)
    }


def _largest_phase(
    model: ModelConfig, layout: Layout, stored: Storage, compiler: Backend, lasting: _Lasting
) -> Phase:
    chunks = len(layout.layers_per_stage) // layout.pipe
    held = sum(of.held for of in stored.layers.values()) // chunks
    x = compiler.share.tokens * model.d_model * compiler.itemsize
    of_stage = held * x if layout.memory_mode == "stage" else 0
    if layout.overlap:  # A backward's slot is read before its loop.
        of_stage += lasting.stash / ceil(layout.slots.stash)
    absent = _absent(layout, stored, lasting)
    rows = padded_rows(model.vocab_size, layout.pipe) * (layout.pipe if layout.vocabulary == "whole" else 1)
    weights = tuple(stored.layers.values())
    head, layers = _phases(model, compiler, rows, weights, layout.splits, layout.memory_mode)
    between = _between_passes(model, compiler.share, layout.memory_mode)
    # Of every phase what is beside it, and what of that is exact.
    found = [(head, 0.0, -absent.head)]
    for (kind, layer), of_layer in zip(kinds_of(model), layers, strict=True):
        of = stored.layers[kind]
        before_layers, before_weights = _converted(model, kind, layout, stored, compiler)
        again = layout.overlap and of.held > 1  # The slice of the weights of a layer whose forward runs.
        beside = before_layers + of_stage + again * of.total * compiler.itemsize
        # What the forward beside it makes waits to be kept. With one pipe rank no step compiled had more than without.
        if layout.overlap and layout.pipe > 1:
            beside += between[kind].kept + _hidden_of_forward(layer, layout, compiler)
            beside += _rows_of_forward(model.d_model, layer, compiler)
        found.append((of_layer.backward, beside, -absent.backward))
        if of_layer.weight_gradient is not None:
            gone = _gone(layer, of.held * layout.is_one_tick, before_weights, compiler, absent)
            found.append((of_layer.weight_gradient, before_weights, -gone))
    # On CPUs the sum of squares is a kernel of its own, which reads float32, and so does what follows.
    widened = stored.widened if compiler.widens else 0
    # After the last tick only accumulators last, and what they are reduced to comes beside them. What one device alone
    # has is not reduced.
    end = Phase(workspace=lasting.gradients + 2 * stored.reduced + widened - sum(lasting))
    phase, beside, exact = max(found, key=lambda one: workspace.SLACK * (one[0].total + one[1]) + one[2])
    largest = Phase(*(workspace.SLACK * part for part in phase.beside(beside))).beside(exact)
    return max(largest, end, key=lambda phase: phase.total)


def _hidden_of_forward(layer: LayerConfig, layout: Layout, compiler: Backend) -> float:
    """Bytes between experts' matrices that a forward beside a backward has, other than what it keeps.

    Barriers keep both passes from their experts at a time; on CPU there are none. There, what is converted counts more
    where passes run again, and where they do not, it is these rows that are as narrow as they are kept.
    """
    share, runs_again = compiler.share, layout.memory_mode in ("layer", "named")
    if not compiler.widens or not isinstance(layer.ffn, MoEFFN) or runs_again == compiler.is_widened:
        return 0.0
    return share.rows(layer.ffn) * share.itemsize * (layer.ffn.num_matrices - 1) * layer.ffn.d_ff


def _rows_of_forward(d_model: int, layer: LayerConfig, compiler: Backend) -> float:
    """Bytes of rows that a forward beside a backward has: as they were sent, as they arrived, and by expert.

    On CPUs these are in the place of others.
    """
    if compiler.widens or not isinstance(layer.ffn, MoEFFN):
        return 0.0
    return 3 * compiler.share.rows(layer.ffn) * d_model * compiler.itemsize


class _OfLayer(NamedTuple):
    """Phases of one layer; weight gradients have none of their own unless backward comes in two parts."""

    backward: Phase
    weight_gradient: Phase | None


@lru_cache(maxsize=8192)
def _phases(
    model: ModelConfig,
    compiler: Backend,
    rows: int,
    weights: tuple[LayerWeights, ...],
    splits: bool,
    memory_mode: str,
) -> tuple[Phase, tuple[_OfLayer, ...]]:
    """Phase of the head for `rows` of the vocabulary, and those of every kind of layer."""
    layers = []
    for (_, layer), of in zip(kinds_of(model), weights, strict=True):
        mine = (model.d_model, layer, of, compiler)
        backward = workspace.layer_backward(*mine, splits=splits, memory_mode=memory_mode)
        weight_gradient = workspace.weight_gradient(*mine, memory_mode) if splits else None
        layers.append(_OfLayer(backward, weight_gradient))
    return workspace.head(model.d_model, rows, compiler), tuple(layers)


class _Absent(NamedTuple):
    """Bytes of what lasts from the first tick to the last that are not there in a phase of the only tick."""

    head: float = 0
    backward: float = 0
    weight_gradient: float = 0


def _absent(layout: Layout, stored: Storage, lasting: _Lasting) -> _Absent:
    """Gradients of layers begin with the pass that makes them; weight gradients need taps and no weights."""
    if not layout.is_one_tick:
        return _Absent()
    gradients = lasting.gradients - stored.outer_accumulators
    return _Absent(
        head=gradients + lasting.taps,
        backward=gradients if layout.splits else 0,
        weight_gradient=lasting.compute_copy + lasting.stash,
    )


def _gone(layer: LayerConfig, held: int, converted: float, compiler: Backend, absent: _Absent) -> float:
    """Bytes that weight gradients do without in the only tick, given how many layers it has, and what they converted.

    Of that the original is gone as well, but for gaps where it was. Later passes read the weights.
    """
    share = compiler.share
    if not held or (isinstance(layer.ffn, MoEFFN) and share.makes_passes(layer.ffn)):
        return 0.0
    if not converted:
        return absent.weight_gradient
    gap = workspace.GAP * held * workspace.widest_tap(layer, share) * share.itemsize
    return absent.weight_gradient + converted * share.itemsize / share.wide - gap


def _is_loop(stored: Storage, layout: Layout) -> bool:
    """Whether the layers of a stage are in loops: not if every stage has one, all of one kind."""
    return len(stored.layers) > 1 or max(layout.layers_per_stage) > 1


def _converted(
    model: ModelConfig, own: str, layout: Layout, stored: Storage, compiler: Backend
) -> tuple[float, float]:
    """Bytes that a backward, and that weight gradients, convert to float32 before their loops over layers.

    Loops over layers of every kind are prepared at once. If there is one layer of a kind, its own loop converts it.
    """
    if not (compiler.is_widened and _is_loop(stored, layout)):
        return 0.0, 0.0
    backward = weight_gradient = 0
    between = _between_passes(model, compiler.share, layout.memory_mode)
    for kind, held in most_layers_of_kind(model, layout.layers_per_stage).items():
        of = stored.layers[kind]
        if (of.held > 1 or kind != own) and not layout.is_straight:
            backward += of.held * of.total
        if layout.memory_mode != "stage":
            backward += ceil(layout.slots.stash) * held * between[kind].narrow_kept
        weight_gradient += ceil(layout.slots.taps) * held * between[kind].narrow_taps
    return compiler.share.wide * backward, compiler.share.wide * weight_gradient


@lru_cache(maxsize=256)
def is_straight(schedule: str, num_microbatches: int, num_chunks: int) -> bool:
    """Whether a schedule runs a forward and a backward in every tick, which only one pipe rank can."""
    few = num_microbatches if registry.is_file(schedule) else min(4, num_microbatches)
    columns = lower(pack(registry.build(schedule, 1, few, num_chunks))).rank_columns
    return bool((columns.forward_on == 1).all() and (columns.backward_on == 1).all())
