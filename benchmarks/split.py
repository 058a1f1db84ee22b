"""Bar: a backward in two parts (input gradient, then weight gradient) costs no more than in one.

    python -m benchmarks.split

FLOP are those of the compiled programs of one layer on one device; experts run as dense products, so that every
product is visible to the compiler's count. Bytes are what waits between the passes, per microbatch and layer.
"""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from benchmarks.cases import dense_model, moe_model
from meshes.axes import AXES
from meshes.mesh import build_mesh
from models import transformer
from models.config import ModelConfig
from models.layers import rotation
from piperjax.planner.plan import MEMORY_MODES as NAMES
from piperjax.runtime.passes import MEMORY_MODES, LayerPasses, Surroundings
from piperjax.runtime.varying import vary

BAR = 1.02


def dense_layer() -> ModelConfig:
    """A small model of one dense layer."""
    return dense_model(num_layers=1, d_model=8, d_ff=24)


def passes_of(config: ModelConfig, mode: str, x: jax.Array) -> tuple[LayerPasses, dict, Surroundings]:
    """Per device: the passes of a model's first layer for inputs like `x` [B, S, D], weights and surroundings."""
    kind = next(iter(config.kinds))
    stacked = transformer.init_layers(config, kind, np.zeros(1, np.int32), 0)
    weights = vary(jax.tree.map(lambda leaf: leaf[0].astype(x.dtype), stacked))
    B, S, _ = x.shape
    rotary, positions = config.kinds[kind].attention.rotary, jnp.broadcast_to(jnp.arange(S), (B, S))
    surroundings = vary(
        Surroundings(
            {rotary: rotation(positions, *rotary)},
            jnp.ones((B, S), jnp.int32),
            jnp.zeros(max(config.num_experts, 1), jnp.float32),
        )
    )
    passes = LayerPasses(
        transformer.layer_function(config, kind),
        MEMORY_MODES[mode].policy,
        lambda surroundings: replace(
            transformer.reference_context(positions, surroundings.segment_ids, surroundings.router_bias),
            rotation=lambda *key: surroundings.rotations[key],
        ),
        weights,
        vary(x),
        surroundings,
    )
    return passes, weights, surroundings


def matmul_flop(config: ModelConfig, mode: str, *, num_tokens: int) -> tuple[float, float, float]:
    """FLOP of the whole backward, of the input gradient and of the weight gradient, as compiled."""
    mesh = build_mesh(pipe=1, data=1, expert_factors=(1, 1, 1), devices=jax.devices()[:1])
    x = jnp.zeros((1, num_tokens, config.d_model))

    def measure(which: str) -> float:
        def run(x, gradient, stand_ins):
            passes, weights, surroundings = passes_of(config, mode, x)
            scale = vary(jnp.ones((), jnp.float32))
            if which == "weight_gradient":
                call = passes.weight_gradient(weights, _like(passes.taps, stand_ins), surroundings)
            else:
                kept = _like(passes.kept, stand_ins)
                call = getattr(passes, which)(weights, kept, surroundings, vary(gradient), scale)
            return [leaf[None] for leaf in jax.tree.leaves(call())]

        mapped = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(AXES), check_vma=True)
        compiled = jax.jit(mapped).lower(x, x, jnp.zeros(())).compile()
        return compiled.cost_analysis()["flops"]

    return measure("backward"), measure("input_gradient"), measure("weight_gradient")


def _like(shapes, seed: jax.Array) -> list[jax.Array]:
    """Arrays of given shapes that the compiler cannot fold."""
    return [vary(jnp.broadcast_to(seed.astype(one.dtype), one.shape)) for one in shapes]


def main() -> int:
    """Prints the table and says whether the bar is met."""
    print(f"{'layer':8s}{'memory mode':14s}{'B':>12s}{'I':>12s}{'W':>12s}{'(I + W) / B':>14s}  MFLOP")
    worst = 0.0
    for name, config in (("dense", dense_model(num_layers=1)), ("MoE", moe_model(num_layers=1))):
        for mode in NAMES:
            whole, first, second = matmul_flop(config, mode, num_tokens=256)
            worst = max(worst, (first + second) / whole)
            numbers = "".join(f"{value / 1e6:12.2f}" for value in (whole, first, second))
            print(f"{name:8s}{mode:14s}{numbers}{(first + second) / whole:14.4f}")
    print(f"bar: I + W at most {BAR} B; worst {worst:.4f}: " + ("met" if worst <= BAR else "MISSED"))
    return worst > BAR


if __name__ == "__main__":
    sys.exit(main())
