"""This file is the memory that a plan needs on each device, by what it is for.

Every rank runs the same program, so all of them allocate the same: buffers are as large as the worst rank needs.
"""

from dataclasses import dataclass, fields
from math import ceil
from typing import NamedTuple

from models.config import ModelConfig
from piperjax.planner import workspace as phases
from piperjax.planner.kept import Share, kept_bytes, tap_bytes
from piperjax.planner.plan import Plan
from piperjax.planner.storage import Storage, itemsize_of, kinds_of, most_layers_of_kind, storage
from piperjax.planner.workspace import Workspace

BACKENDS = ("gpu", "cpu")


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
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.terms.values())


class Slots(NamedTuple):
    """How many microbatches wait at once on the worst rank.

    Attributes:
      inputs, gradients: slots for what has arrived from other ranks.
      stash: forwards whose backward is due.
      taps: input gradients whose weight gradient is due.
    """

    inputs: int
    gradients: int
    stash: int
    taps: int


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
        float32, and what a loop reads in every turn is converted once, before it.
      reserve_bytes: added as it is.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    stored = storage(
        model,
        plan.layers_per_stage,
        pipe=plan.pipe,
        data=plan.data,
        expert=plan.expert,
        vocabulary=plan.vocabulary,
        dtype=dtype,
        master_dtype=master_dtype,
    )
    slots = slot_counts(plan)
    share = Share(
        sequences=plan.microbatch_size // (plan.data * plan.expert),
        seq_len=plan.seq_len,
        expert=plan.expert,
        capacity_factor=plan.capacity_factor,
        dtype=dtype,
    )
    work = _largest_phase(model, plan, share, stored, backend)
    stash, taps = _between_passes(model, plan, share, slots)
    x = share.tokens * model.d_model * itemsize_of(dtype)
    batch = plan.num_microbatches * share.tokens * 5 * 4
    rank = RankMemory(
        parameters=stored.at_rest,
        moments=2 * stored.at_rest,
        compute_copy=stored.compute_copy,
        gradients=stored.accumulators,
        stash=stash,
        taps=taps,
        pipeline_buffers=x * (2 + (slots.inputs + 1 if slots.inputs else 0) + slots.gradients + 1),
        batch=batch,
        dispatch=work.dispatch,
        logits=work.logits,
        workspace=work.workspace,
        reserve=reserve_bytes,
    )
    return (rank,) * plan.pipe


def peak_memory(model: ModelConfig, plan: Plan, **options) -> float:
    """Bytes on the device that needs most; options as of `estimate_memory`."""
    return max(rank.total for rank in estimate_memory(model, plan, **options))


def _between_passes(model: ModelConfig, plan: Plan, share: Share, slots: Slots) -> tuple[int, int]:
    """Bytes of all slots that keep what forwards and input gradients leave."""
    most = most_layers_of_kind(model, plan.layers_per_stage)
    kept = taps = 0
    for kind, layer in kinds_of(model):
        kept += most[kind] * kept_bytes(model.d_model, layer, share, plan.memory_mode)
        taps += most[kind] * tap_bytes(model.d_model, layer, share, plan.memory_mode) if slots.taps else 0
    if plan.memory_mode == "stage":
        kept = share.tokens * model.d_model * share.itemsize
    return slots.stash * kept, slots.taps * taps


def _largest_phase(model: ModelConfig, plan: Plan, share: Share, stored: Storage, backend: str) -> Workspace:
    wide = backend == "cpu"
    rows = -(-model.vocab_size // (plan.pipe if plan.vocabulary == "split" else 1))
    found = [
        phases.layer_backward(model.d_model, layer, share, stored.layers[kind], wide=wide)
        for kind, layer in kinds_of(model)
    ]
    found.append(phases.head(model.d_model, rows, share, wide=wide))
    found.append(phases.reduction(stored))
    return max(found, key=sum)


def slot_counts(plan: Plan) -> Slots:
    """Slots of a plan's schedule."""
    counted = plan.profile().slots
    return Slots(
        *(ceil(count - 1e-6) for count in (counted.inputs, counted.gradients, counted.stash, counted.taps))
    )
