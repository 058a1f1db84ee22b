"""Schedules of chunked dispatch, as XLA compiles it for 4 nodes of 8 H100 that are not there (`absent_gpus`).

A layer of experts in 4 chunks, forward, and with gradients. Operations that matter, in order of launch:

    N+ N-   an exchange of rows between nodes starts, ends         L+ L-   one inside nodes
    N! L!   one that nothing can run beside                        G       a product of experts

In the first and the last chunk of each pass there may be nothing to put beside products, or no products to put beside.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from benchmarks.alltoall_cells import Layer, Variant
from benchmarks.alltoall_programs import SPEC, dispatching, ffn
from meshes.mesh import build_mesh
from piperjax.runtime import absent_gpus
from piperjax.runtime.hlo import Instruction, first_group, parse
from piperjax.runtime.xla_flags import FLAGS

NODES, LOCAL = 4, 8
CHUNKS = 4
# One that is always there has rows of its own, the other as many as are balanced: without drops, flat needs 64 T.
WAYS = (Variant("flat", 1.5, CHUNKS), Variant("halo2_dedup", 0.0, CHUNKS))
LAYER = Layer(num_experts=64, experts_per_token=6, tokens=2048, d_model=2048, ways=WAYS)
D_FF = 1408
PRODUCT = re.compile(r"__triton_(nested_)?gemm|__cublas|cutlass|xla\.gpu\.triton")
EXCHANGES = ("all-to-all", "all-gather", "ragged-all-to-all")
# Ids and counts of rows travel by themselves in some dispatchers.
ROWS_ELEMENTS = 100_000
LIMIT = "xla_gpu_experimental_parallel_collective_overlap_limit"


def our_flags() -> dict[str, str]:
    """The flags that a step adds to XLA_FLAGS on CUDA."""
    return {flag.name: flag.value for flag in FLAGS["cuda"]}


def launches(way: Variant, mesh: Mesh, flags: Mapping[str, str], *, gradients: bool) -> list[str]:
    """Exchanges and products of a layer in order of launch, compiled with these flags."""
    layer = dispatching(LAYER, way, mesh, ffn)

    def loss(x, gates, w_in, w_out, ids):
        y, _ = layer(x, ids, gates, w_in, w_out)
        return 0.5 * jnp.square(y.astype(jnp.float32)).sum()

    E, k, D, T = LAYER.num_experts, LAYER.experts_per_token, LAYER.d_model, LAYER.tokens * mesh.size
    kinds = jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.int32
    shapes = (T, D), (T, k), (E, D, D_FF), (E, D_FF, D), (T, k)
    arguments = [
        jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, SPEC))
        for shape, kind in zip(shapes, kinds, strict=True)
    ]
    function = jax.grad(loss, argnums=(0, 1, 2, 3)) if gradients else _reordered(layer)
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    options = {name: absent_gpus.option(value) for name, value in flags.items()}
    module = parse(lowered.compile(compiler_options=absent_gpus.OPTIONS | options).as_text())
    return events(module.computations[module.entry])


def _reordered(layer: Callable) -> Callable:
    return lambda x, gates, w_in, w_out, ids: layer(x, ids, gates, w_in, w_out)


def events(instructions: Sequence[Instruction]) -> list[str]:
    """What of a scheduled computation is an exchange of rows or a product."""
    found, started = [], {}
    for one in instructions:
        kind = one.operation.removesuffix("-start").removesuffix("-done")
        if one.operation.endswith("-done") and one.operands and one.operands[0] in started:
            found.append(started[one.operands[0]] + "-")
        elif kind in EXCHANGES and not one.operation.endswith("-done"):
            if _largest_array(one) >= ROWS_ELEMENTS:
                level = "N" if len({device // LOCAL for device in first_group(one)}) > 1 else "L"
                started[one.name] = level
                found.append(level + ("+" if one.operation.endswith("-start") else "!"))
        elif one.operation in ("custom-call", "fusion") and PRODUCT.search(one.rest):
            found.append("G")
    return _joined(found)


def _largest_array(one: Instruction) -> int:
    shapes = re.findall(r"\w+\[([\d,]*)\]", one.shape)
    return max(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)


def _joined(found: list[str]) -> list[str]:
    """Exchanges that end as soon as they have started, as N! or L!."""
    joined: list[str] = []
    for event in found:
        if joined and event[1:] == "-" and joined[-1] == event[0] + "+":
            joined[-1] = event[0] + "!"
        else:
            joined.append(event)
    return joined


def beside(found: Sequence[str]) -> tuple[int, int]:
    """(products with an exchange between nodes under way, products)."""
    under_way = hidden = products = 0
    for event in found:
        under_way += {"N+": 1, "N-": -1}.get(event, 0)
        if event == "G":
            products, hidden = products + 1, hidden + (under_way > 0)
    return hidden, products


def run(judge: Callable[[str, float, float, bool], bool]) -> bool:
    """Prints the schedules with our flags and what other flags make of them, and says whether the bar is met."""
    mesh = build_mesh(
        pipe=1,
        data=1,
        expert_factors=(1, NODES, LOCAL),
        devices=absent_gpus.devices(absent_gpus.target("h100"), NODES * LOCAL, LOCAL),
    )
    ours = our_flags()
    print(
        f"schedules for {NODES} nodes of {LOCAL} H100 with " + ", ".join(f"{k}={v}" for k, v in ours.items())
    )
    met = True
    for way in WAYS:
        for gradients in (False, True):
            passes = "forward and backward" if gradients else "forward"
            found = launches(way, mesh, ours, gradients=gradients)
            (hidden, total), whole = beside(found), way._replace(chunks=1)
            print(f"{way}, {passes}: {' '.join(found)}")
            if way.dispatch == "halo2_dedup":
                other = {LIMIT + "=1": (way, ours | {LIMIT: "1"}), "one chunk": (whole, ours)}
                for name, (variant, flags) in other.items():
                    count, of = beside(launches(variant, mesh, flags, gradients=gradients))
                    print(f"    with {name}: {count} of {of} products beside an exchange between nodes")
            # The products of one chunk of forward may be before or after all exchanges.
            met &= judge(
                f"products beside an exchange between nodes, {way}, {passes}",
                hidden / total,
                1 - 1 / CHUNKS,
                True,
            )
    return met
