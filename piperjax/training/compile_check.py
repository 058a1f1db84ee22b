"""This file compares what the planner predicts for a step with what the compiler makes of it, without allocating."""

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from piperjax.planner.backends import installed_cpu
from piperjax.planner.executed import executed_flop
from piperjax.planner.memory import RankMemory, estimate_memory
from piperjax.runtime import absent_gpus
from piperjax.runtime.compiled import CompiledMemory, CompiledWork, memory_of, work_of
from piperjax.runtime.executor import BATCH_FIELDS, Executor
from piperjax.training.config import TrainConfig
from piperjax.training.metrics import gib, si
from piperjax.training.optimizer import init_moments
from piperjax.training.state import (
    TrainState,
    make_train_step,
    replicated,
    router_bias_shape,
    state_shardings,
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One step, predicted and compiled; everything is per device.

    Attributes:
      predicted: of the pipe rank that needs most.
      memory: as compiled.
      state_bytes: by name, bytes of the arguments: parameters, moments, batch.
      predicted_flop: of matrix products.
      work: as compiled; None if it was not counted.
    """

    predicted: RankMemory
    memory: CompiledMemory
    state_bytes: dict[str, int]
    predicted_flop: float
    work: CompiledWork | None

    @property
    def memory_error(self) -> float:
        """Predicted over compiled bytes, minus one; reserve does not count, the compiler knows nothing of it."""
        return (self.predicted.total - self.predicted.reserve) / self.memory.total - 1

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        sent = {} if self.work is None else self.work.sent_bytes
        return {
            "predicted_bytes": self.predicted.terms,
            "predicted_total_bytes": self.predicted.total,
            "compiled_bytes": {
                "arguments": self.memory.arguments,
                "outputs": self.memory.outputs,
                "aliased": self.memory.aliased,
                "temporaries": self.memory.temporaries,
            },
            "compiled_total_bytes": self.memory.total,
            "memory_error": self.memory_error,
            "argument_bytes": self.state_bytes,
            "predicted_flop": self.predicted_flop,
            "compiled_flop": None if self.work is None else self.work.flop,
            "sent_bytes": {f"{axes}: {operation}": size for (axes, operation), size in sent.items()},
        }

    def line(self) -> str:
        """One line for the start of a run."""
        predicted, compiled = self.predicted.total - self.predicted.reserve, self.memory.total
        return (
            f"memory    per device {gib(predicted)} predicted, {gib(compiled)} compiled ({self.memory_error:+.1%}); "
            f"{self._largest()}"
        )

    def _largest(self) -> str:
        terms = sorted(self.predicted.terms.items(), key=lambda item: -item[1])[:3]
        return "largest: " + ", ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in terms)

    def lines(self) -> list[str]:
        """A table."""
        terms, memory = self.predicted.terms, self.memory
        temporary = [name for name in terms if name not in ("parameters", "moments", "batch", "reserve")]
        predicted_temporary = sum(terms[name] for name in temporary)
        rows = [
            ("parameters", terms["parameters"], self.state_bytes["parameters"]),
            ("moments", terms["moments"], self.state_bytes["moments"]),
            ("batch", terms["batch"], self.state_bytes["batch"]),
            ("temporaries", predicted_temporary, memory.temporaries),
            *((f"  {name.replace('_', ' ')}", terms[name], None) for name in temporary if terms[name]),
            ("total", self.predicted.total - self.predicted.reserve, memory.total),
        ]
        lines = [f"{'memory per device':<22}{'predicted':>12}{'compiled':>12}"]
        lines += [_row(name, predicted, compiled) for name, predicted, compiled in rows]
        if self.work is not None:
            lines += ["", f"{'per device and step':<22}{'predicted':>12}{'compiled':>12}"]
            error = f"{self.predicted_flop / self.work.flop - 1:+8.1%}" if self.work.flop else ""
            lines.append(
                f"{'FLOP of products':<22}{si(self.predicted_flop):>12}{si(self.work.flop):>12}{error}"
            )
            lines += ["", f"{'sent per device':<22}{'':>12}{'compiled':>12}"]
            lines += [
                f"{axes + ': ' + operation:<34}{gib(size):>12}"
                for (axes, operation), size in sorted(self.work.sent_bytes.items(), key=lambda item: -item[1])
            ]
        return lines


def _row(name: str, predicted: float, compiled: float | None) -> str:
    if compiled is None:
        return f"{name:<22}{gib(predicted):>12}"
    error = f"{predicted / compiled - 1:+8.1%}" if compiled else ""
    return f"{name:<22}{gib(predicted):>12}{gib(compiled):>12}{error}"


def abstract_state(executor: Executor) -> TrainState:
    """Shapes and shardings of a training state; nothing is allocated."""
    shardings, params, everywhere = state_shardings(executor), executor.abstract_params, replicated(executor)
    moments = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(init_moments, params),
        shardings.moments,
    )
    bias = jax.ShapeDtypeStruct(router_bias_shape(executor.config), jnp.float32, sharding=everywhere)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return TrainState(step=step, params=params, moments=moments, router_bias=bias)


def abstract_batch(executor: Executor) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a batch."""
    plan = executor.plan
    shape = (plan.num_microbatches, plan.microbatch_size, plan.seq_len)
    return {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name == "weights" else jnp.int32, sharding=executor.batch_sharding
        )
        for name in BATCH_FIELDS
    }


def compile_step(
    executor: Executor, config: TrainConfig, *, gpu: absent_gpus.Target | None = None
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """Compiles the train step for the executor's devices; returns it and how many seconds each part took.

    Args:
      gpu: what the devices are if they are not here.
    """
    start = time.perf_counter()
    arguments = (abstract_state(executor), abstract_batch(executor), jax.ShapeDtypeStruct((), jnp.int32))
    step = make_train_step(executor, config)
    if gpu is None:
        lowered, options = step.lower(*arguments), None
    else:
        lowered = step.trace(*arguments).lower(lowering_platforms=(gpu.backend,))
        options = absent_gpus.compiler_options(gpu.backend)
    traced = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    return compiled, {"trace": traced - start, "compile": time.perf_counter() - traced}


def compare(
    executor: Executor, compiled: jax.stages.Compiled, *, reserve_bytes: float = 0, with_work: bool = False
) -> Comparison:
    """Sets the planner's prediction beside a compiled train step.

    Args:
      executor: what was compiled.
      compiled: the train step.
      reserve_bytes: what the device keeps for itself.
      with_work: also count FLOP and bytes sent, which reads the text of the whole program.
    """
    plan = executor.plan
    backend = "cpu" if executor.mesh.devices.flat[0].platform == "cpu" else "gpu"
    ranks = estimate_memory(
        executor.config,
        plan,
        dtype=executor.dtype,
        master_dtype=executor.master_dtype,
        backend=installed_cpu() if backend == "cpu" else backend,
        reserve_bytes=reserve_bytes,
    )
    state = abstract_state(executor)
    return Comparison(
        predicted=max(ranks, key=lambda rank: rank.total),
        memory=memory_of(compiled),
        state_bytes={
            "parameters": _bytes(state.params),
            "moments": _bytes(state.moments),
            "batch": _bytes(abstract_batch(executor)),
        },
        predicted_flop=executed_flop(executor.config, plan, backend=backend),
        work=work_of(compiled, executor) if with_work else None,
    )


def _bytes(tree: Any) -> int:
    """Bytes of one device's share."""
    leaves = jax.tree.leaves(tree)
    return sum(
        jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype).size * leaf.dtype.itemsize
        for leaf in leaves
    )
