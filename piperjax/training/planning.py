"""This file is how a run comes by its plan: a plan file, the resumed run, flags, and the planner for the rest."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from meshes.platform import Platform
from models.config import ModelConfig
from piperjax.planner.candidates import WISHES
from piperjax.planner.explain import PART_WORDS
from piperjax.planner.plan import Plan
from piperjax.planner.search import Candidate, Choice, choose_plan
from piperjax.training.config import TrainConfig
from piperjax.training.overrides import Tree, override, parse

AXIS_FLAGS = {"pipe": "--pipe", "data": "--data-parallel", "expert": "--expert"}
SIZES = frozenset(AXIS_FLAGS)
# Fields on which other fields of a plan depend.
STRUCTURE = SIZES | {"schedule", "num_chunks", "num_microbatches"}


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """A plan that was written by `python -m piperjax plan --out`, perhaps on another machine.

    Attributes:
      path: of the file, for messages.
      plan: the plan.
      model: name of the model that it was made for, "" where the file does not say.
      platform: name of the machine that it was made for, "" likewise.
    """

    path: str
    plan: Plan
    model: str = ""
    platform: str = ""

    def check(self, model: ModelConfig, num_devices: int, *, batch_size: int, seq_len: int) -> None:
        """Compares with what there is.

        Raises:
          ValueError: if the plan is for another number of devices, layers or sequences, or divides experts unevenly.
        """
        plan = self.plan
        made_for = f"--plan {self.path} is for"
        if plan.num_devices != num_devices:
            raise ValueError(
                f"{made_for} pipe {plan.pipe} x data {plan.data} x expert {plan.expert} = {plan.num_devices} devices, "
                f"but there are {num_devices}; use as many, or leave --plan out"
            )
        for name, flag, found in (("batch_size", "--batch", batch_size), ("seq_len", "--seq", seq_len)):
            if getattr(plan, name) != found:
                raise ValueError(
                    f"{made_for} {name} = {getattr(plan, name)}, got {found}; use {flag} {getattr(plan, name)}"
                )
        name = f" ({self.model})" if self.model else ""
        if plan.num_layers != model.num_layers:
            raise ValueError(
                f"{made_for} a model{name} of {plan.num_layers} layers, but {model.name} has {model.num_layers}; "
                "plan for this model, or name the other by --model"
            )
        if plan.expert > 1 and (not model.num_experts or model.num_experts % plan.expert):
            raise ValueError(
                f"{made_for} expert = {plan.expert}, which does not divide the {model.num_experts} experts of "
                f"{model.name}; plan for this model, or name another{name} by --model"
            )


def read_plan_file(path: str) -> PlanFile:
    """Reads a plan: the fields of `Plan`, or an object that holds them as "plan" and says what they are for.

    Raises:
      ValueError: if there is none, or it is no plan.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read plan file {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(
            f"plan file {path} is not valid JSON ({error}); write one with `python -m piperjax plan --out {path}`"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("config"), Mapping):
        content = content["config"]  # The run.json of a run.
    outer = content if isinstance(content, Mapping) else {}
    values = outer.get("plan", content)
    if not isinstance(values, Mapping):
        raise ValueError(
            f"plan file {path} holds no plan; write one with `python -m piperjax plan --out {path}`"
        )
    try:
        plan = Plan.from_dict(dict(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"plan file {path}: {error}") from None
    wrapped = values is not content
    return PlanFile(
        path=path,
        plan=plan,
        model=_name(outer.get("model")) if wrapped else "",
        platform=_name(outer.get("platform")) if wrapped else "",
    )


def _name(described: Any) -> str:
    """A name, or the name inside of a description."""
    name = described.get("name", "") if isinstance(described, Mapping) else described
    return name if isinstance(name, str) else ""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan of a run.

    Attributes:
      plan: the plan.
      notes: why it is this one, for people; a few lines, or none where it was given.
    """

    plan: Plan
    notes: tuple[str, ...] = ()


def without_plan(tree: Tree) -> tuple[Tree, Tree]:
    """Splits what --set changes into fields of the configuration and fields of the plan, which is made last.

    Raises:
      ValueError: if the plan itself is given a value.
    """
    changes = tree.get("plan", {})
    if not isinstance(changes, dict):
        raise ValueError(
            "plan is a group of fields; set plan.memory_mode, plan.capacity_factor, ... or use flags"
        )
    return {name: value for name, value in tree.items() if name != "plan"}, changes


def requested_sizes(args: argparse.Namespace) -> dict[str, int]:
    """Returns the axis sizes that were given, -1 for one that takes the devices which are left.

    Raises:
      ValueError: if --mesh is not understood, a size is impossible, two of them are -1, or --plan says them already.
    """
    sizes = {axis: getattr(args, flag[2:].replace("-", "_")) for axis, flag in AXIS_FLAGS.items()}
    sizes = {axis: size for axis, size in sizes.items() if size is not None}
    if args.plan is not None:
        _check_alone(args, sizes)
    if args.mesh not in (None, "auto"):
        if sizes:
            raise ValueError(
                f"--mesh {args.mesh} and {AXIS_FLAGS[next(iter(sizes))]} contradict; give one of them"
            )
        sizes = _parsed_mesh(args.mesh)
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"{AXIS_FLAGS[axis]} must be at least 1, or -1 to take what is left, got {size}")
    if args.microbatches is not None and args.microbatches < 1:
        raise ValueError(f"--microbatches must be at least 1, got {args.microbatches}")
    if list(sizes.values()).count(-1) > 1:
        raise ValueError("only one axis can be -1, the one that takes the devices which are left")
    return sizes


def _check_alone(args: argparse.Namespace, sizes: Mapping[str, int]) -> None:
    given = [AXIS_FLAGS[axis] for axis in sizes]
    others = {"--mesh": args.mesh, "--schedule": args.schedule, "--microbatches": args.microbatches}
    given += [flag for flag, value in others.items() if value is not None]
    if given:
        raise ValueError(
            f"--plan {args.plan} already says what {given[0]} says; give one of them, or change a field of the plan "
            "by --set plan.FIELD=VALUE"
        )


def _parsed_mesh(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXIS_FLAGS or not size.removeprefix("-").isdigit():
            raise ValueError(f"--mesh must be auto or sizes such as pipe=2,expert=4,data=1, got '{text}'")
        sizes[axis] = int(size)
    return sizes


def make_plan(
    args: argparse.Namespace,
    config: TrainConfig,
    platform: Platform,
    num_devices: int,
    *,
    changes: Tree,
    plan_file: PlanFile | None = None,
) -> Planned:
    """Returns the plan: that of a file, else that of the resumed run where it fits the devices, else the planner's.

    Args:
      args: flags, which the planner obeys.
      config: the rest of the configuration; its plan is that of the resumed run.
      platform: the machine.
      num_devices: devices of the mesh.
      changes: --set plan.FIELD=VALUE as a tree, which the planner obeys too.
      plan_file: what --plan names.

    Raises:
      ValueError: if no plan is possible; says what would be.
    """
    batch, seq_len = config.data.batch_size, config.data.seq_len
    if plan_file is not None:
        plan_file.check(config.model, num_devices, batch_size=batch, seq_len=seq_len)
        made_on = f", made for {plan_file.platform}" if plan_file.platform else ""
        note = f"given by {plan_file.path}{made_on}"
        return Planned(plan=override(plan_file.plan, changes, where="plan"), notes=(note,))
    sizes = _filled(requested_sizes(args), num_devices)
    flags = {"schedule": args.schedule, "num_microbatches": args.microbatches}
    asked, rest = _parsed(changes)
    wished = sizes | {name: value for name, value in flags.items() if value is not None} | asked
    resumed = config.plan
    if resumed is not None:
        fits = resumed.num_devices == num_devices and not SIZES & wished.keys()
        if fits and not STRUCTURE & wished.keys():
            return Planned(plan=override(resumed, changes, where="plan"))
        wished = _kept(resumed, wished, fits=fits) | wished
    found = planned(config, platform, num_devices, wished=wished)
    return replace(found, plan=override(found.plan, rest, where="plan"))


def planned(
    config: TrainConfig, platform: Platform, num_devices: int, *, wished: Mapping[str, Any] | None = None
) -> Planned:
    """Returns the planner's choice and what it says about it.

    Raises:
      ValueError: if no plan is possible.
    """
    chosen = choose_plan(
        config.model,
        platform,
        num_devices,
        batch_size=config.data.batch_size,
        seq_len=config.data.seq_len,
        dtype=config.dtype,
        wished=wished,
    )
    return Planned(plan=chosen.plan, notes=_reasons(chosen))


def _reasons(chosen: Choice) -> tuple[str, ...]:
    """Why this plan, and why not the next."""
    if chosen.result is None:
        return (f"by a simple rule, because {chosen.reason}",)
    best, *others = chosen.result.ranked
    plans = chosen.result.num_plans
    meshes = chosen.result.num_meshes
    counted = f"{plans:,} plan{'s' * (plans != 1)} on {meshes} mesh{'es' * (meshes != 1)}"
    notes = [f"{best.mesh}: the quickest of {counted}, {best.time.step_seconds:.3g} s a step predicted"]
    if others:
        notes.append(
            f"{others[0].mesh} would take {others[0].margin:.1%} longer: {_difference(best, others[0])}"
        )
    given_up = ", ".join(f"{name} {getattr(best.plan, name)}" for name in chosen.result.given_up)
    if given_up:
        notes.append(f"{given_up}: nothing fits otherwise")
    return tuple(notes)


def _difference(best: Candidate, other: Candidate) -> str:
    """What the other plan spends more on."""
    parts = best.time.parts.keys() | other.time.parts.keys()
    more = {part: other.time.parts.get(part, 0.0) - best.time.parts.get(part, 0.0) for part in sorted(parts)}
    part = max(more, key=more.__getitem__)
    return f"{more[part]:.2g} s more of {PART_WORDS.get(part, part)}"


def _kept(resumed: Plan, wished: Mapping[str, Any], *, fits: bool) -> dict[str, Any]:
    """What a resumed run keeps where its plan cannot stay as it is: a capacity limit, or it would be another model.

    The dtype of its gradients stays as well. Where only the schedule or the microbatches were asked to change, the rest
    does, too.
    """
    names = {"capacity_factor", "overflow", "gradient_dtype"}
    if fits:
        names = set(WISHES) - {"overlap"}
        names -= {"num_chunks"} if "schedule" in wished else set()
    return {name: getattr(resumed, name) for name in names}


def _parsed(changes: Tree) -> tuple[dict[str, Any], Tree]:
    """Splits --set plan.FIELD=VALUE into values that the planner obeys, and the fields that are set afterwards."""
    kinds = get_type_hints(Plan)
    wishes, rest = {}, {}
    for name, text in changes.items():
        if name in WISHES and isinstance(text, str):
            wishes[name] = parse(text, kinds[name], where=f"plan.{name}")
        else:
            rest[name] = text
    return wishes, rest


def _filled(sizes: dict[str, int], num_devices: int) -> dict[str, int]:
    """Replaces -1 by the devices that the other axes leave, axes not given counting 1."""
    if -1 not in sizes.values():
        return sizes
    filled = dict.fromkeys(AXIS_FLAGS, 1) | sizes
    taken = math.prod(size for size in filled.values() if size != -1)
    if num_devices % taken:
        axis = next(axis for axis, size in sizes.items() if size == -1)
        others = " x ".join(f"{name} {size}" for name, size in filled.items() if size != -1)
        raise ValueError(
            f"{AXIS_FLAGS[axis]} -1 cannot take what is left: {others} = {taken} does not divide the "
            f"{num_devices} devices"
        )
    return {axis: num_devices // taken if size == -1 else size for axis, size in filled.items()}
