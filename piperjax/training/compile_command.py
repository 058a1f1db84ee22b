"""This file is `python -m piperjax compile`: compiles a training step for devices that are not there, and checks it."""

import argparse
import json
import math
from typing import Any

from meshes.platform import load_platform
from piperjax.training import cli
from piperjax.training.overrides import parse_assignments
from piperjax.training.planning import make_plan, read_plan_file, requested_sizes, without_plan

DESCRIPTION = """\
Lower and compile the real training step for simulated devices, without allocating anything, and compare memory, FLOP
and communication with the plan's prediction. Takes the flags of train.py that say what is trained, where and how.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what train.py does not have; the parser already has the rest."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Compiles and prints; returns the exit code.

    Raises:
      ValueError: if the plan is impossible.
    """
    tree, changes = without_plan(parse_assignments(args.set))
    sizes = requested_sizes(args)
    plan_file = None if args.plan is None else read_plan_file(args.plan)
    config = cli.configuration(args, tree, plan_file)
    config.model.check_trainable()
    num_devices = args.devices or (plan_file.plan.num_devices if plan_file else _product(sizes))
    platform = load_platform("cpu" if config.platform == "auto" else config.platform)
    plan = make_plan(args, config, platform, num_devices, changes=changes, plan_file=plan_file).plan

    import jax

    from meshes.mesh import build_mesh
    from piperjax.runtime import backend
    from piperjax.runtime.executor import Executor
    from piperjax.training import compile_check

    # Accelerators of this machine stay untouched.
    jax.config.update("jax_platforms", "cpu")
    backend.prepare(plan.num_devices)
    mesh = build_mesh(
        pipe=plan.pipe,
        data=plan.data,
        expert_factors=plan.expert_factors,
        devices=jax.devices("cpu")[: plan.num_devices],
    )
    executor = Executor(config.model, plan, mesh, config.dtype)
    compiled, seconds = compile_check.compile_step(executor, config)
    comparison = compile_check.compare(executor, compiled, with_work=True)
    if args.json:
        value = {
            "model": config.model.name,
            "dtype": config.dtype,
            "plan": plan.to_dict(),
            "seconds": seconds,
        }
        print(json.dumps(value | comparison.to_dict(), indent=2))
        return 0
    print("\n".join(_heading(config, plan, seconds) + comparison.lines()))
    return 0


def _product(sizes: dict[str, int]) -> int:
    """Devices of a mesh whose sizes are all given."""
    if -1 in sizes.values():
        raise ValueError("an axis of -1 takes the devices that are left, so give --devices as well")
    return math.prod(sizes.values())


def _heading(config: Any, plan: Any, seconds: dict[str, float]) -> list[str]:
    sizes = (
        f"pipe {plan.pipe} x data {plan.data} x expert {plan.expert} = {plan.num_devices} simulated devices"
    )
    how = (
        f"{plan.schedule}, {plan.num_microbatches} microbatches, memory mode {plan.memory_mode}, {config.dtype}, "
        f"gradients in {plan.gradient_dtype}"
    )
    took = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return [f"{config.model.name} on {sizes}", how, took, ""]
