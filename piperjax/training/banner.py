"""This file is what a run prints before its first step: model, mesh, stages, memory, batch and data."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from meshes.platform import Platform
from models import cost
from models.config import ModelConfig, MoEFFN
from piperjax.planner.plan import Plan
from piperjax.training.config import TrainConfig
from piperjax.training.metrics import gib, si
from piperjax.training.optimizer import Moments
from piperjax.training.prediction import Prediction


def banner(
    config: TrainConfig,
    platform: Platform,
    abstract_params: Any,
    data: str,
    *,
    prediction: Prediction,
    notes: Sequence[str] = (),
) -> str:
    """Returns the lines that describe a run under its plan.

    Args:
      config: with a plan.
      platform: the machine.
      abstract_params: `Executor.abstract_params`.
      data: one line about the text.
      prediction: what is expected of the plan.
      notes: lines on how the plan came about.
    """
    plan, tokens = config.plan, config.tokens_per_step
    params_bytes = bytes_per_device(abstract_params)
    rows = {
        "model": _model(config.model),
        "mesh": f"pipe {plan.pipe} x data {plan.data} x expert {plan.expert} = "
        f"{_count(plan.num_devices, 'device')}, {platform.name}: {platform.description}",
        "schedule": f"{plan.schedule}, {_count(plan.num_microbatches, 'microbatch')} of "
        f"{_count(plan.microbatch_size, 'sequence')}, {_dispatch(plan)}, {config.dtype}{_gradients(plan)}",
        "stages": " | ".join(_stages(config.model, plan)),
        "plan": f"\n{'':10}".join(notes),
        "memory": f"per device {gib(params_bytes)} parameters, {gib(len(Moments._fields) * params_bytes)} optimizer; "
        f"{prediction.memory_line()}",
        "time": prediction.time_line(),
        "batch": f"{plan.batch_size} sequences x {plan.seq_len} = {tokens:,} tokens per step; "
        f"{config.steps:,} steps = {si(tokens * config.steps)} tokens",
        "data": data,
        "run": config.out,
    }
    return "\n".join(f"{name:<9} {text}" for name, text in rows.items() if text)


def bytes_per_device(abstract: Any) -> int:
    """Returns the bytes of a tree of ShapeDtypeStruct that one device holds; all devices hold the same."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )


def _model(model: ModelConfig) -> str:
    parameters = cost.parameters(model)
    experts = ""
    if model.num_experts:
        experts = f", {model.num_experts} experts, {model.experts_per_token} per token"
    size = f"{si(parameters.total)} parameters, {si(parameters.active)} active per token"
    return f"{model.name}: {model.num_layers} layers{experts}; {size}"


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def _dispatch(plan: Plan) -> str:
    chunks = f" in {plan.dispatch_chunks} chunks" if plan.dispatch_chunks > 1 else ""
    capacity = f"capacity factor {plan.capacity_factor:g}" if plan.capacity_factor else "dropless"
    if plan.overflow == "passes":
        capacity += ", the rest in later passes"
    return f"{plan.dispatch} dispatch{chunks}, {capacity}"


def _gradients(plan: Plan) -> str:
    return "" if plan.gradient_dtype == "float32" else f", gradients added up in {plan.gradient_dtype}"


def _stages(model: ModelConfig, plan: Plan) -> Sequence[str]:
    """Returns "0: layers 0-3 (1 dense, 3 moe)" for every stage."""
    lines, first = [], 0
    for stage, count in enumerate(plan.layers_per_stage):
        layers = model.layers[first : first + count]
        num_moe = sum(isinstance(layer.ffn, MoEFFN) for layer in layers)
        parts = [
            f"{number} {name}" for number, name in ((count - num_moe, "dense"), (num_moe, "moe")) if number
        ]
        numbers = f"layer {first}" if count == 1 else f"layers {first}-{first + count - 1}"
        lines.append(f"{stage}: {numbers} ({', '.join(parts)})")
        first += count
    return lines
