"""This file is the configuration of a training run: one frozen dataclass per concern, composed by TrainConfig."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from models.config import ModelConfig
from piperjax.planner.plan import Plan

Dtype = Literal["float32", "bfloat16"]
STANDARD_LIBRARY = "stdlib"
BYTE_TOKENIZER = "bytes"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and clipping by global norm.

    Attributes:
      peak_lr: learning rate at the end of the warm-up.
      warmup_steps: steps over which the learning rate rises from 0.
      final_lr_fraction: learning rate of the last step over peak_lr.
      betas: decay of the first and second moment.
      eps: added to the square root of the second moment.
      weight_decay: decoupled decay of every matrix; norms and biases do not decay.
      clip_norm: gradients are scaled down to this global norm; 0 never clips.
    """

    peak_lr: float = 3e-3
    warmup_steps: int = 20
    final_lr_fraction: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _check_numbers(self, "optimizer", "peak_lr", "eps", above=0)
        _check_numbers(self, "optimizer", "weight_decay", "clip_norm", at_least=0)
        _check_numbers(self, "optimizer", "final_lr_fraction", at_least=0, at_most=1)
        _check_counts(self, "optimizer", "warmup_steps", at_least=0)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ValueError(f"optimizer.betas must be two numbers, got {self.betas!r}")
        for beta in self.betas:
            if not _is_number(beta) or not 0 <= beta < 1:
                raise ValueError(f"optimizer.betas must be two numbers from 0 to below 1, got {self.betas!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is read, and how it is cut into steps.

    Attributes:
      path: a file, a directory or a glob; "stdlib" is the source text of the running Python's standard library.
      tokenizer: "bytes", or the path of a Hugging Face tokenizer.json.
      seq_len: S, tokens per sequence.
      batch_size: sequences per step over all devices.
      validation_fraction: part of the text that is never trained on; 0 holds nothing out.
      seed: seed of the order of sequences; the held-out documents do not depend on it.
      cache_dir: where packed sequences are kept between runs; "" is the user's cache directory.
    """

    path: str = STANDARD_LIBRARY
    tokenizer: str = BYTE_TOKENIZER
    seq_len: int = 128
    batch_size: int = 16
    validation_fraction: float = 0.02
    seed: int = 0
    cache_dir: str = ""

    def __post_init__(self) -> None:
        _check_text(self, "data", "path", "tokenizer")
        _check_counts(self, "data", "batch_size", at_least=1)
        _check_counts(self, "data", "seq_len", at_least=2)
        _check_counts(self, "data", "seed", at_least=0)
        if not _is_number(self.validation_fraction) or not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction must be a number from 0 to below 1, got {self.validation_fraction!r}"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved. The last step and an interrupted step are always saved.

    Attributes:
      every_steps: steps between checkpoints; 0 saves only at the end.
      keep: newest checkpoints that are kept.
      keep_best: checkpoints with the lowest validation loss that are kept as well.
    """

    every_steps: int = 100
    keep: int = 2
    keep_best: int = 1

    def __post_init__(self) -> None:
        _check_counts(self, "checkpoint", "every_steps", "keep_best", at_least=0)
        _check_counts(self, "checkpoint", "keep", at_least=1)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is printed and how often; metrics.jsonl has a line for every step whatever is chosen here.

    Attributes:
      log_every: steps between printed lines.
      validate_every: steps between validations; 0 validates only at the end.
      validation_batches: steps' worth of held-out sequences that one validation reads at most.
      progress: "auto" draws a progress bar on a terminal and plain lines elsewhere.
    """

    log_every: int = 10
    validate_every: int = 100
    validation_batches: int = 16
    progress: Literal["auto", "bar", "plain", "none"] = "auto"

    def __post_init__(self) -> None:
        _check_counts(self, "log", "log_every", "validation_batches", at_least=1)
        _check_counts(self, "log", "validate_every", at_least=0)
        _check_choice(self, "log", "progress", get_args(LogConfig.__annotations__["progress"]))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. What is not here is not configurable.

    Attributes:
      model: what is trained.
      plan: how it is laid out; None lets the planner choose for the devices that are found.
      out: run directory, with run.json, metrics.jsonl and checkpoints/.
      steps: length of the run, counted from its very beginning.
      seed: seed of the initial parameters.
      dtype: type of activations and matrix products; parameters, moments and reductions are float32.
      platform: name or path of the machine description; "auto" recognises the machine by its devices.
    """

    model: ModelConfig
    plan: Plan | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    out: str = "runs/default"
    steps: int = 300
    seed: int = 0
    dtype: Dtype = "float32"
    platform: str = "auto"

    def __post_init__(self) -> None:
        _check_text(self, "", "out", "platform")
        _check_counts(self, "", "steps", at_least=1)
        _check_counts(self, "", "seed", at_least=0)
        _check_choice(self, "", "dtype", get_args(Dtype))
        if self.plan is not None:
            self._check_plan(self.plan)

    def _check_plan(self, plan: Plan) -> None:
        for name in ("batch_size", "seq_len"):
            if getattr(plan, name) != getattr(self.data, name):
                raise ValueError(
                    f"plan.{name} and data.{name} must agree, got {getattr(plan, name)} and "
                    f"{getattr(self.data, name)}; set data.{name} and let the plan follow"
                )
        if plan.num_layers != self.model.num_layers:
            raise ValueError(
                f"plan.layers_per_stage {plan.layers_per_stage} holds {plan.num_layers} layers but model "
                f"{self.model.name} has {self.model.num_layers}; make them add up"
            )
        if self.model.num_experts % plan.expert:
            raise ValueError(
                f"the expert axis must divide the {self.model.num_experts} experts of model {self.model.name}, "
                f"got plan.expert = {plan.expert}; use a divisor of {self.model.num_experts}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Positions of one step over all devices, padding included."""
        return self.data.batch_size * self.data.seq_len

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the inverse of `from_dict`."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        for name in _SECTIONS:
            values[name] = dataclasses.asdict(values[name])
        values["model"] = self.model.to_dict()
        values["plan"] = None if self.plan is None else self.plan.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Builds the configuration that `to_dict` wrote.

        Raises:
          ValueError: for a missing, unknown or impossible field; the sentence names it.
        """
        fields = _known_fields(cls, values, where="configuration")
        if "model" not in fields:
            raise ValueError("a configuration needs the field 'model'")
        fields["model"] = ModelConfig.from_dict(fields["model"])
        if fields.get("plan") is not None:
            fields["plan"] = Plan.from_dict(fields["plan"])
        for name, section in _SECTIONS.items():
            if name in fields:
                fields[name] = section(**_known_fields(section, fields[name], where=name))
        return cls(**fields)


_SECTIONS = {
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}


def _known_fields(cls: type, values: Any, *, where: str) -> dict[str, Any]:
    """Returns the keyword arguments for `cls`, lists as tuples, after checking that each field exists."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be an object, got {values!r}")
    known = {entry.name for entry in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where} has no field '{unknown[0]}'; its fields are {', '.join(sorted(known))}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _path(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _check_text(owner: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{_path(section, name)} must be a non-empty string, got {value!r}")


def _check_counts(owner: Any, section: str, *names: str, at_least: int) -> None:
    for name in names:
        value = getattr(owner, name)
        if type(value) is not int or value < at_least:
            raise ValueError(
                f"{_path(section, name)} must be a whole number of at least {at_least}, got {value!r}"
            )


def _check_numbers(
    owner: Any,
    section: str,
    *names: str,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    bounds = {"above": above, "of at least": at_least, "of at most": at_most}
    rule = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    for name in names:
        value = getattr(owner, name)
        in_range = _is_number(value) and not (
            (above is not None and value <= above)
            or (at_least is not None and value < at_least)
            or (at_most is not None and value > at_most)
        )
        if not in_range:
            raise ValueError(f"{_path(section, name)} must be a number {rule}, got {value!r}")


def _check_choice(owner: Any, section: str, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in choices:
        raise ValueError(f"{_path(section, name)} must be one of {', '.join(choices)}, got {value!r}")
