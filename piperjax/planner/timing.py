"""This file is the time model: seconds of every action of a plan, of a whole step, and where they go.

Layers are priced by `layer_time`, exchanges by `network`, and the schedule's own table is timed in lockstep, as the
executor runs it, or asynchronously, as the literature does. Embedding, head, gradient reduction and optimizer are
priced as the executor runs them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import get_args

import numpy as np

from meshes.platform import Platform
from models import cost
from models.config import ModelConfig, MoEFFN
from piperjax.planner.backends import installed_cpu
from piperjax.planner.layer_exchanges import saved_seconds
from piperjax.planner.layer_time import LayerSeconds, layer_seconds
from piperjax.planner.memory import estimate_memory
from piperjax.planner.network import Rows, all_reduce, axis_group, dispatch_transfer, permute
from piperjax.planner.plan import Plan
from piperjax.planner.shared_cores import at_once, fresh_seconds, on_shared_cores
from piperjax.planner.step_end import itemsize_of, step_end_seconds
from piperjax.planner.storage import most_layers_of_kind
from piperjax.planner.work import FLOAT32_BYTES, GRADIENT_BYTES, layer_work
from piperjax.schedules.timeline import ActionCosts, Timeline, lockstep, simulate

# How far off a prediction may be that rests on numbers of each provenance, as a fraction.
UNCERTAINTY = {"measured": 0.07, "published": 0.18, "vendor": 0.25, "assumed": 0.5}
# Added where a shape or message lies outside the range that was measured.
UNCERTAINTY_OUTSIDE_RANGE = 0.1


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under which a plan is timed.

    Attributes:
      dtype: of the operands of products.
      imbalance: rows of the device with the busiest experts over the mean.
      rows: whether dispatch sends its "static" buffers, as the executor does, or "exact" rows.
    """

    dtype: str = "bfloat16"
    imbalance: float = 1.0
    rows: Rows = "static"

    def __post_init__(self):
        if not self.imbalance >= 1 or self.rows not in get_args(Rows):
            raise ValueError(
                f"a plan is timed with an imbalance of at least 1 and rows that are {' or '.join(get_args(Rows))}, "
                f"got imbalance {self.imbalance} and rows {self.rows!r}"
            )


USUAL = Conditions()


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """How long a step takes, and why.

    Attributes:
      step_seconds: one step.
      parts: seconds by what they are spent on, on the pipe rank with most work; they add up to the step. "compute"
        (recomputation included), "exposed_all_to_all", "head" (with the embedding), "pipeline_transfer", "bubble"
        (idle, or waiting for a slower rank), "gradient_reduction" (with the gathering of parameters), "optimizer".
      mfu: useful FLOP over what the peak allows in that time, 0 to 1; None where the platform has no peak.
      flop_per_second: useful FLOP per second and device; recomputation is not useful.
      tokens_per_second: of all devices.
      uncertainty_fraction: how far off `step_seconds` may be, from where the platform's numbers come from.
      notes: reservations.
    """

    step_seconds: float
    parts: Mapping[str, float]
    mfu: float | None
    flop_per_second: float
    tokens_per_second: float
    uncertainty_fraction: float
    notes: tuple[str, ...] = ()

    @property
    def bubble_fraction(self) -> float:
        """Part of the step in which the busiest rank waits for others."""
        return self.parts["bubble"] / self.step_seconds

    @property
    def all_to_all_fraction(self) -> float:
        """Part of the step in which expert exchanges are exposed."""
        return self.parts["exposed_all_to_all"] / self.step_seconds


def stage_seconds(
    model: ModelConfig, plan: Plan, platform: Platform, conditions: Conditions = USUAL
) -> tuple[LayerSeconds, ...]:
    """Seconds of the layers of every stage, of one microbatch on one device."""
    by_kind = {
        (kind, mode): layer_seconds(
            model,
            layer,
            platform,
            tokens=plan.tokens_per_device,
            seq_len=plan.seq_len,
            expert_factors=plan.expert_factors,
            dtype=conditions.dtype,
            memory_mode=mode,
            dispatcher=plan.dispatch,
            dispatch_chunks=plan.dispatch_chunks,
            rows=conditions.rows,
            imbalance=conditions.imbalance,
            capacity_factor=plan.capacity_factor,
            overflow=plan.overflow,
            gradient_dtype=plan.gradient_dtype,
        )
        for kind, layer in model.kinds.items()
        for mode in dict.fromkeys((plan.memory_mode, *plan.layer_modes))
    }
    most, chunks = most_layers_of_kind(model, plan.layers_per_stage), len(plan.layers_per_stage) // plan.pipe
    for (kind, mode), priced in by_kind.items():
        if chunks * most[kind] > 1:
            by_kind[kind, mode] = priced.cut()
    kinds = iter(zip(model.kind_of_layer, plan.layer_modes, strict=True))
    stages = [sum((by_kind[next(kinds)] for _ in range(n)), LayerSeconds()) for n in plan.layers_per_stage]
    for _ in range(model.prediction_layers):
        stages[-1] += by_kind[model.kind_of_layer[-1], plan.memory_mode]
    return tuple(stages)


def action_costs(
    model: ModelConfig, plan: Plan, platform: Platform, conditions: Conditions = USUAL
) -> ActionCosts:
    """Seconds of every action by stage, for the clocks of `schedules.timeline`."""
    stages = stage_seconds(model, plan, platform, conditions)
    activation_bytes = plan.tokens_per_device * model.d_model * itemsize_of(conditions.dtype)
    # A tick sends an activation on and a gradient back, one after the other.
    transfer = 2 * permute(platform, axis_group(plan, "pipe"), activation_bytes).seconds
    return ActionCosts(
        forward=tuple(s.forward for s in stages),
        backward=tuple(s.backward for s in stages),
        input_gradient=tuple(s.input_gradient for s in stages),
        weight_gradient=tuple(s.weight_gradient for s in stages),
        exposed_forward=tuple(s.exchange_forward for s in stages),
        exposed_backward=tuple(s.exchange_backward for s in stages),
        transfer=transfer,
        overlap=hidden_seconds(stages, platform) if plan.overlap else 0.0,
        **vocabulary_seconds(model, plan, platform, dtype=conditions.dtype),
    )


def hidden_seconds(stages: Iterable[LayerSeconds], platform: Platform) -> float:
    """Seconds that a forward and a backward side by side save, on the stage that saves least."""
    return min(
        float(
            saved_seconds(platform, s.exchange_forward, s.backward)
            + saved_seconds(platform, s.exchange_backward, s.forward)
        )
        for s in stages
    )


def vocabulary_seconds(
    model: ModelConfig, plan: Plan, platform: Platform, *, dtype: str = "bfloat16"
) -> dict[str, float]:
    """Embedding, head with loss, and gradient of the embedding of one microbatch (`runtime/vocabulary.py`)."""
    device, tokens, D = platform.device, plan.tokens_per_device, model.d_model
    base = "bfloat16" if dtype.startswith("float8") else dtype
    itemsize, split = itemsize_of(base), plan.vocabulary == "split" and plan.pipe > 1
    vocabulary = ceil(model.vocab_size / plan.pipe) if split else model.vocab_size
    hidden_bytes = tokens * D * itemsize
    exchange = vocabulary_exchange_seconds(model, plan, platform, dtype=dtype)
    logits = tokens * vocabulary * FLOAT32_BYTES
    head = (
        # The head is a row for every token, so that forward reads it transposed, and its input gradient as it is.
        device.product_seconds(tokens, vocabulary, D, dtype=base, part="input_gradient")
        + device.product_seconds(tokens, D, vocabulary, dtype=base)
        + device.product_seconds(vocabulary, D, tokens, dtype=base, part="weight_gradient")
        # Logits are written, read for their maximum, read and written as exponentials, read for the gradient.
        + device.stream_seconds(5.5 * logits)
        + device.stream_seconds(2 * GRADIENT_BYTES[plan.gradient_dtype] * vocabulary * D)
        + device.stream_seconds(8 * hidden_bytes)
        + 3 * exchange
    )
    rows = 2 * hidden_bytes
    gradient = 4 * tokens * D * FLOAT32_BYTES
    return {
        "embedding": device.stream_seconds(rows) + exchange,
        "head": head * (1 + model.prediction_layers) + _join_seconds(model, platform, tokens, base),
        "embedding_gradient": device.stream_seconds(gradient) + exchange,
    }


def vocabulary_exchange_seconds(
    model: ModelConfig, plan: Plan, platform: Platform, *, dtype: str = "bfloat16"
) -> float:
    """One exchange of the activations of a microbatch between pipe ranks that each hold a part of the vocabulary."""
    if plan.vocabulary != "split" or plan.pipe == 1:
        return 0.0
    base = "bfloat16" if dtype.startswith("float8") else dtype
    hidden_bytes = plan.tokens_per_device * model.d_model * itemsize_of(base)
    return all_reduce(platform, axis_group(plan, "pipe"), hidden_bytes).seconds


def _join_seconds(model: ModelConfig, platform: Platform, tokens: int, dtype: str) -> float:
    """Forward and backward of the products that join the stream with an embedding before a prediction layer."""
    D = model.d_model
    return 3 * model.prediction_layers * platform.device.product_seconds(tokens, D, 2 * D, dtype=dtype)


def estimate_time(
    model: ModelConfig,
    plan: Plan,
    platform: Platform,
    conditions: Conditions = USUAL,
    *,
    clock: str = "lockstep",
) -> TimeEstimate:
    """Times one step of a plan with its own schedule table.

    Args:
      model: the model.
      plan: its plan.
      platform: the machine.
      conditions: number format, imbalance and rows.
      clock: "lockstep" as the executor runs it, "profile" for the same from counts instead of the table, as if all
        stages cost what the slowest does, "async" where ranks only wait for what they need.

    Raises:
      ValueError: if the platform does not say how fast something is, or the clock is unknown.
    """
    dtype = conditions.dtype
    costs = action_costs(model, plan, platform, conditions)
    if clock == "profile":
        parts = _profiled(plan, costs)
    elif clock in ("lockstep", "async"):
        parts = _timed(plan, costs, clock)
    else:
        raise ValueError(f"the clock of an estimate is lockstep, profile or async, got {clock!r}")
    reduction, optimizer = step_end_seconds(model, plan, platform, dtype=dtype)
    if platform.device.concurrent_devices is not None:
        # One for the embedding, three for the head, one for the gradient of the embedding.
        exchange = (2 + 3 * (1 + model.prediction_layers)) * vocabulary_exchange_seconds(
            model, plan, platform, dtype=dtype
        )
        parts = on_shared_cores(parts, plan, platform, costs, head_exchange=exchange)
        optimizer = at_once(platform, plan.num_devices * optimizer)
        taken = max(rank.taken for rank in estimate_memory(model, plan, dtype=dtype, backend=installed_cpu()))
        parts["fresh_memory"] = float(fresh_seconds(platform, plan.num_devices, taken))
    parts |= {"gradient_reduction": reduction, "optimizer": optimizer}
    step = sum(parts.values())
    notes = _notes(model, plan, platform, conditions)
    useful = cost.flop_per_token(model, plan.seq_len).step * plan.batch_size * plan.seq_len
    rate = useful / (step * plan.num_devices)
    peak = platform.device.known_peak(dtype)
    return TimeEstimate(
        step_seconds=step,
        parts=parts,
        mfu=rate / peak if peak else None,
        flop_per_second=rate,
        tokens_per_second=plan.batch_size * plan.seq_len / step,
        uncertainty_fraction=uncertainty(platform, parts) + UNCERTAINTY_OUTSIDE_RANGE * bool(notes),
        notes=notes,
    )


def _timed(plan: Plan, costs: ActionCosts, clock: str) -> dict[str, float]:
    """Parts of a step from its own schedule."""
    transfers = 0.0
    if clock == "lockstep":
        table = plan.tick_table()
        timeline = lockstep(table, costs)
        transfers = len(table.ticks) * costs.transfer * (plan.pipe > 1)
    else:
        costs = replace(costs, transfer=costs.transfer / 2)
        timeline = simulate(plan.build_schedule(), costs)
    parts = _busiest_rank(timeline, costs, clock) | {"pipeline_transfer": transfers}
    return parts | {"bubble": max(0.0, timeline.step_seconds - sum(parts.values()))}


def _profiled(plan: Plan, costs: ActionCosts) -> dict[str, float]:
    """Parts of a step from the counts of its schedule, where a table would take long to build."""
    counted = plan.profile()
    by_stage = np.array([costs.forward, costs.backward, costs.input_gradient, costs.weight_gradient]).T
    exposed = np.array([costs.exposed_forward, costs.exposed_backward]).T
    pace = by_stage + np.stack([exposed[:, 0], exposed[:, 1], exposed[:, 1], 0 * exposed[:, 0]], axis=1)
    kinds = [0, 2, 3] if counted.splits_backward else [0, 1]
    slowest = pace[pace[:, kinds].sum(axis=1).argmax()]
    seconds = float(counted.seconds(np.append(slowest, costs.overlap)))
    hidden = costs.overlap * counted.side_by_side
    held = [list(stages) for stages in plan.stages_of_rank]
    busiest = max(held, key=lambda stages: pace[stages][:, kinds].sum())
    M = plan.num_microbatches
    outer = costs.embedding + costs.head + costs.embedding_gradient
    parts = {
        "compute": M * float(by_stage[busiest][:, kinds].sum()),
        "exposed_all_to_all": M * float(exposed[busiest].sum()) - hidden,
        "head": M * outer,
        "pipeline_transfer": counted.num_ticks * costs.transfer,
    }
    busy = parts["compute"] + parts["exposed_all_to_all"]
    return parts | {"bubble": max(0.0, seconds - busy)}


def _busiest_rank(timeline: Timeline, costs: ActionCosts, clock: str) -> dict[str, float]:
    """Computation, exposed exchanges and head of the rank with most of them, without waiting."""
    schedule = timeline.schedule
    busy, actions = max(zip(timeline.busy_seconds, schedule.ranks, strict=True), key=lambda pair: pair[0])
    alone = sum(costs.seconds(action) for action in actions)
    exposed = sum(
        (costs.exposed_forward if a.kind == "F" else costs.exposed_backward)[a.stage]
        for a in actions
        if a.kind != "W"
    )
    if clock == "lockstep":  # All ranks work on embedding and head, as nobody's action.
        head = schedule.num_microbatches * (costs.embedding + costs.head + costs.embedding_gradient)
        hidden = alone - busy
    else:
        head = sum(costs.edge_seconds(action, schedule.num_stages) for action in actions)
        hidden = alone + head - busy
    return {"compute": alone - exposed, "exposed_all_to_all": exposed - hidden, "head": head}


def uncertainty(platform: Platform, parts: Mapping[str, float]) -> float:
    """How far off a step may be: the parts' uncertainties by provenance, weighted with their seconds.

    Errors of one table all point the same way, so they add up instead of averaging out.
    """
    device = platform.device
    rates = [table.provenance for table in (device.matmul, device.grouped_matmul, device.attention) if table]
    compute = max((UNCERTAINTY[p] for p in rates), default=UNCERTAINTY[device.provenance])
    network = max((UNCERTAINTY[link.provenance] for link in platform.links), default=0.0)
    by_part = {
        "exposed_all_to_all": network,
        "pipeline_transfer": network,
        "gradient_reduction": network,
        "optimizer": UNCERTAINTY[device.provenance],
    }
    total = sum(parts.values())
    return sum(seconds * by_part.get(part, compute) for part, seconds in parts.items()) / total


def _notes(model: ModelConfig, plan: Plan, platform: Platform, conditions: Conditions) -> tuple[str, ...]:
    """What lies outside the measured range."""
    notes: list[str] = []
    attention, tokens = platform.device.attention, plan.tokens_per_device
    if attention and not attention.covers(plan.seq_len):
        notes.append(
            f"attention: sequences of {plan.seq_len} outside the measured range of {attention.smallest_seq:g} to "
            f"{attention.largest_seq:g}"
        )
    notes += _unmeasured_products(model, plan, platform, conditions.imbalance)
    moe = next((layer.ffn for layer in model.layers if isinstance(layer.ffn, MoEFFN)), None)
    if moe and plan.expert > 1:
        notes += dispatch_transfer(
            platform,
            expert_factors=plan.expert_factors,
            tokens=tokens,
            row_bytes=2 * model.d_model,
            num_experts=moe.num_experts,
            experts_per_token=moe.experts_per_token,
            num_groups=moe.router.num_groups,
            groups_per_token=moe.router.groups_per_token,
            dispatcher=plan.dispatch,
            chunks=plan.dispatch_chunks,
            rows=conditions.rows,
            imbalance=conditions.imbalance,
            capacity_factor=plan.capacity_factor,
        ).notes
    return tuple(notes)


def _unmeasured_products(model: ModelConfig, plan: Plan, platform: Platform, imbalance: float) -> list[str]:
    """Tables of products that leave their measured range, by products that are at least 1 % of a layer's FLOP."""
    tables = {"dense": platform.device.matmul, "expert": platform.device.grouped_matmul}
    notes = {}
    for layer in dict.fromkeys(model.layers):
        work = layer_work(
            model.d_model,
            layer,
            tokens=plan.tokens_per_device,
            seq_len=plan.seq_len,
            expert=plan.expert,
            imbalance=imbalance,
        )
        flop = {p: 2 * max(p.groups, 1) * p.rows * p.columns * p.depth for p in work.products}
        for product, amount in flop.items():
            name = "expert" if product.groups else "dense"
            table = tables[name]
            if table and amount > 0.01 * sum(flop.values()) and not table.covers(amount):
                notes[name] = (
                    f"{name} products: {amount:.2g} FLOP for {product.name} outside the measured range of "
                    f"{table.smallest_flop:.2g} to {table.largest_flop:.2g}"
                )
    return list(notes.values())
