"""This file is what the compiler says about a step: memory per device, FLOP, and bytes sent along each mesh axis."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from models.config import MoEFFN
from piperjax.planner.kept import Share
from piperjax.planner.row_blocks import block_rows
from piperjax.runtime import hlo
from piperjax.runtime.executor import Executor
from piperjax.runtime.grouped_matmul import MORE_BLOCKS


@dataclass(frozen=True, kw_only=True)
class CompiledMemory:
    """Bytes per device of a compiled program.

    Attributes:
      arguments, outputs, temporaries: what they are called.
      aliased: outputs that take the place of donated arguments.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    @property
    def total(self) -> int:
        """What a device must have."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclass(frozen=True, kw_only=True)
class CompiledWork:
    """Work per device and step, loops counted in full.

    Attributes:
      flop: of matrix products.
      sent_bytes: by (mesh axes joined by "x", collective), bytes that a device sends.
    """

    flop: float
    sent_bytes: Mapping[tuple[str, str], float]


def memory_of(compiled: jax.stages.Compiled) -> CompiledMemory:
    """Reads the compiler's memory analysis."""
    found = compiled.memory_analysis()
    return CompiledMemory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
    )


def work_of(compiled: jax.stages.Compiled, executor: Executor) -> CompiledWork:
    """Counts FLOP and bytes sent in the text of a compiled step, on average over the pipe ranks."""
    module = hlo.parse(compiled.as_text())
    sizes = dict(executor.mesh.shape)
    flop, sent = 0.0, defaultdict(float)
    for visit in module.visits(_weights(executor), unknown_turns=_unknown_turns(executor)):
        flop += module.product_flop(visit)
        operation = visit.instruction.operation.removesuffix("-start")
        if operation in hlo.COLLECTIVES:
            group = hlo.first_group(visit.instruction)
            num_bytes = hlo.sent_bytes(visit.instruction, len(group))
            axes = hlo.axes_of(group, sizes)
            if axes and num_bytes:
                sent[_joined(axes), operation] += visit.times * num_bytes
    return CompiledWork(flop=flop, sent_bytes=dict(sent))


def _joined(axes: tuple[str, ...]) -> str:
    """The expert sub-axes are one axis to the reader."""
    return " x ".join(dict.fromkeys("expert" if axis.startswith("expert") else axis for axis in axes))


def _blocks_per_group(executor: Executor) -> float:
    """Turns of the loop over blocks of rows of one expert, when experts are loaded evenly."""
    plan = executor.plan
    ffn = next((layer.ffn for layer in executor.config.layers if isinstance(layer.ffn, MoEFFN)), None)
    if ffn is None:
        return 1.0
    share = Share.of(plan, executor.dtype)
    # Every chunk of tokens has a loop of its own.
    groups, rows = ffn.num_experts // plan.expert, share.rows(ffn) // plan.dispatch_chunks
    live = min(rows, share.tokens * ffn.experts_per_token // plan.dispatch_chunks)
    return live / groups / block_rows(rows, groups)


# They are the loops right in a pass of a layer; others are in functions of their own.
_LATER_PASSES = re.compile(r"/(forward|backward|weight_gradient)/while$")


def _unknown_turns(executor: Executor) -> hlo.Turns:
    """Turns of loops over layers, on average over ranks and chunks, and of loops over blocks of rows.

    Experts are taken to be loaded evenly, so that no rows wait for later passes.
    """
    blocks, layout, runs = _blocks_per_group(executor), executor.layout, executor.layout.runs
    makes_passes, columns = executor.plan.overflow == "passes", executor.lowered.rank_columns
    ticks, ranks = np.nonzero(_is_on(columns.forward_on) & _is_on(columns.backward_on))

    def turns(scope: str) -> float:
        if makes_passes and _LATER_PASSES.search(scope):
            return 0.0
        if scope.endswith(f"/{MORE_BLOCKS}/while"):
            return max(0.0, blocks - 1)
        found = re.search(r"/(layers|again|pairs|single)_(\w+)/while$", scope)
        if found is None:
            return blocks
        at = layout.kinds.index(found[2])
        of_kind = (runs.count - runs.last if found[1] == "again" else runs.count)[..., at]
        if found[1] in ("layers", "again") or not ticks.size:
            return float(of_kind.mean())
        ahead = of_kind[ranks, np.asarray(columns.forward_chunk)[ticks, ranks]]
        back = of_kind[ranks, np.asarray(columns.backward_chunk)[ticks, ranks], ::-1]
        pairs = float(np.minimum(ahead, back).mean())
        # What the longer of both has more: of forwards and of backwards alike.
        return pairs if found[1] == "pairs" else float((ahead + back).mean()) / 2 - pairs

    return turns


def _is_on(column) -> np.ndarray:
    return np.asarray(column) == 1


def _weights(executor: Executor) -> hlo.Weigh:
    """How often the branches of a step are taken, as its schedule says."""
    columns = executor.lowered.rank_columns
    forward, backward = _is_on(columns.forward_on), _is_on(columns.backward_on)
    overlaps = executor.plan.overlap and executor.lowered.head_comes_first
    both = float((forward & backward).mean()) if overlaps else 0.0
    fractions = {"forward": float(forward.mean()) - both, "backward": float(backward.mean()) - both}
    weight_gradient = (
        float(_is_on(columns.weight_gradient_on).mean()) if columns.weight_gradient_on.size else 0
    )
    ticks, pipe = executor.lowered.num_ticks, executor.plan.pipe
    owners = 1 if executor.plan.vocabulary == "split" else pipe
    vocabulary = executor.plan.num_microbatches / ticks / owners

    def weigh(conditional: hlo.Conditional):
        if conditional.depth != 1:
            return hlo.evenly(conditional)
        scope, on = conditional.branches[1], vocabulary
        if both and "/forward/" in scope and "/backward/" in scope:
            on = both
        elif "/weight_gradient/" in scope:
            on = weight_gradient
        elif "/backward/" in scope:
            on = fractions["backward"]
        elif "/forward/" in scope:
            on = fractions["forward"]
        return [1 - on, on]

    return weigh
