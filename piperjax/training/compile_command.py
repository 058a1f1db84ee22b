"""This file is `python -m piperjax compile`: compiles a training step for devices that are not there, and checks it."""

import argparse
import json
import math
from typing import Any

from meshes.platform import Platform, known_platforms, load_platform
from piperjax.training import cli
from piperjax.training.overrides import parse_assignments
from piperjax.training.planning import make_plan, read_plan_file, requested_sizes, without_plan

DESCRIPTION = """\
Lower and compile the real training step for devices that need not be here, without allocating anything, and compare
memory, FLOP and communication with the plan's prediction. Takes the flags of train.py that say what is trained, where
and how. Devices are simulated by the CPU; with --target gpu they are the GPUs of --platform, of which none has to be
here, but JAX's plugin for them does (piperjax/runtime/absent_gpus.py). FLOP and communication are compared on the CPU
only: on GPUs products are kernels, of which XLA does not say what they do.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what train.py does not have; the parser already has the rest."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--target",
        choices=("cpu", "gpu"),
        default="cpu",
        help="compile for simulated devices (cpu), or for GPUs",
    )
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
    if args.target == "gpu" and not platform.device.gpu:
        raise ValueError(_no_gpu(platform))
    plan = make_plan(args, config, platform, num_devices, changes=changes, plan_file=plan_file).plan

    import jax

    from meshes.mesh import build_mesh
    from piperjax.runtime import absent_gpus, backend
    from piperjax.runtime.executor import Executor
    from piperjax.training import compile_check

    # Accelerators of this machine stay untouched.
    jax.config.update("jax_platforms", "cpu")
    backend.prepare(plan.num_devices)
    gpu = absent_gpus.target(platform.device.gpu) if args.target == "gpu" else None
    if gpu is None:
        devices = jax.devices("cpu")[: plan.num_devices]
    else:
        devices = absent_gpus.devices(gpu, plan.num_devices, platform.devices_per_node)
    mesh = build_mesh(pipe=plan.pipe, data=plan.data, expert_factors=plan.expert_factors, devices=devices)
    executor = Executor(config.model, plan, mesh, config.dtype)
    compiled, seconds = compile_check.compile_step(executor, config, gpu=gpu)
    comparison = compile_check.compare(executor, compiled, with_work=gpu is None)
    if args.json:
        value = {
            "model": config.model.name,
            "dtype": config.dtype,
            "devices": gpu.name if gpu else "cpu",
            "plan": plan.to_dict(),
            "seconds": seconds,
        }
        print(json.dumps(value | comparison.to_dict(), indent=2))
        return 0
    kind = f"{gpu.name} GPUs" if gpu else "simulated devices"
    print("\n".join(_heading(config, plan, seconds, kind) + comparison.lines()))
    return 0


def _product(sizes: dict[str, int]) -> int:
    """Devices of a mesh whose sizes are all given."""
    if -1 in sizes.values():
        raise ValueError("an axis of -1 takes the devices that are left, so give --devices as well")
    return math.prod(sizes.values())


def _no_gpu(platform: Platform) -> str:
    known = [name for name in known_platforms() if load_platform(name).device.gpu]
    return (
        f"--target gpu needs a --platform whose file says which GPU it has (device.gpu): {', '.join(known)}; "
        f"got {platform.name}"
    )


def _heading(config: Any, plan: Any, seconds: dict[str, float], kind: str) -> list[str]:
    sizes = f"pipe {plan.pipe} x data {plan.data} x expert {plan.expert} = {plan.num_devices} {kind}"
    how = (
        f"{plan.schedule}, {plan.num_microbatches} microbatches, memory mode {plan.memory_mode}, {config.dtype}, "
        f"gradients in {plan.gradient_dtype}"
    )
    took = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return [f"{config.model.name} on {sizes}", how, took, ""]
