"""Bytes that dispatch and combine send, from the compiled program, beside the closed form; and that they are right.

Compared: what a device sends to other nodes and inside its own, for E=256 and k=8. One copy of a token for each expert
off the node is k (N - 1)/N copies, one for each node `expected_nodes` (N - 1)/N; buffers of balanced size (capacity 1)
hold just that.
Dropless buffers hold the worst case: T min(k, E/P) rows for every device, but with de-duplication T for every node.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.alltoall_cells import Layer, Variant
from benchmarks.alltoall_model import Shape, shaped_platform
from benchmarks.alltoall_programs import SMALL_D_FF, dispatching, ffn
from benchmarks.dispatch_cases import Case, check, masked_multiply
from meshes.axes import EXPERT
from meshes.mesh import build_mesh, simulate_devices
from piperjax.planner.network import DISPATCHERS, dispatch_transfer, expected_nodes
from piperjax.runtime.dispatch import make_experts
from piperjax.runtime.hlo import ITEMSIZES, Instruction, Module, first_group, parse

LOCAL = 8
E, K, T, D = 256, 8, 16, 4096
FEWER = {2: 3.8, 4: 2.1}
Judge = Callable[[str, float, float, bool], bool]


def sent_bytes_by_level(module: Module, nodes: int, local: int) -> dict[str, float]:
    """Bytes that a device sends in the collectives of a program, on average: "node" inside, "wire" between nodes."""
    sent = {"node": 0.0, "wire": 0.0}
    for visit in module.visits():
        one = visit.instruction
        if one.operation in ("all-to-all", "all-gather"):
            # The result of an all-gather has a part of each member, who sends its own to all others.
            group = first_group(one)
            part = visit.times * _buffer_bytes(one) / len(group)
            node_of = [device // local for device in group]
            # Every member sends a part to each other one.
            pairs = [(a == b) for i, a in enumerate(node_of) for j, b in enumerate(node_of) if i != j]
            sent["node"] += part * sum(pairs) / len(group)
            sent["wire"] += part * (len(pairs) - sum(pairs)) / len(group)
        elif one.operation == "collective-permute":
            for source, target in permuted_pairs(one):
                if source != target:
                    level = "node" if source // local == target // local else "wire"
                    sent[level] += visit.times * _buffer_bytes(one) / (nodes * local)
    return sent


def permuted_pairs(one: Instruction) -> list[tuple[int, int]]:
    """(source, target) of every message of a permutation."""
    listed = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.rest)
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", listed[1])]


def _buffer_bytes(one: Instruction) -> float:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", one.shape)
    return float(
        sum(
            ITEMSIZES[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))
            for dtype, shape in arrays
        )
    )


def compiled_bytes(way: Variant, num_nodes: int) -> dict[str, float]:
    """What a device sends in dispatch and combine, there and back."""
    mesh = build_mesh(
        pipe=1, data=1, expert_factors=(1, num_nodes, LOCAL), devices=jax.devices()[: num_nodes * LOCAL]
    )
    cell = Layer(num_experts=E, experts_per_token=K, tokens=T, d_model=D, ways=(way,))
    shapes = (
        (T * mesh.size, D),
        (T * mesh.size, K),
        (T * mesh.size, K),
        (E, D, SMALL_D_FF),
        (E, SMALL_D_FF, D),
    )
    kinds = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.float32)
    arguments = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    compiled = jax.jit(dispatching(cell, way, mesh, ffn)).lower(*arguments).compile()
    return sent_bytes_by_level(parse(compiled.as_text()), num_nodes, LOCAL)


def closed_bytes(way: Variant, num_nodes: int) -> dict[str, float]:
    """The same by the planner's closed form, of rows alone."""
    shape = Shape(nodes=num_nodes, local=LOCAL, bytes_per_second=25e6, cores=1)
    one_way = dispatch_transfer(
        shaped_platform(
            shape,
            inside_bytes_per_second=1e9,
            between_bytes_per_second=1e9,
            message_seconds=1e-6,
            latency_seconds=1e-6,
        ),
        expert_factors=(1, num_nodes, LOCAL),
        tokens=T,
        row_bytes=4 * D,
        num_experts=E,
        experts_per_token=K,
        dispatcher=way.dispatch,
        chunks=way.chunks,
        capacity_factor=way.capacity_factor,
    )
    return {level: 2 * one_way.bytes_by_level[level] for level in ("node", "wire")}


def variants() -> list[Variant]:
    """Every dispatcher, dropless and of balanced size, and one in chunks."""
    ways = [Variant(name, capacity) for name in DISPATCHERS for capacity in (0.0, 1.0)]
    return [*ways, *(Variant(name, 0.0, 2) for name in DISPATCHERS)]


def check_results() -> None:
    """Compares results and every gradient with the dense computation, on 4 nodes of 8 devices."""
    case = Case(P=4 * LOCAL, E=64, k=6, T=4, factors=(1, 4, LOCAL))
    for name in DISPATCHERS:
        experts = make_experts(name, EXPERT, 0.0)
        check(
            case,
            case.compiled(experts, masked_multiply),
            np.random.default_rng(0),
            routings=("random", "zipf"),
        )
        print(f"{name:14s} equals the dense computation: results to 1e-6, every gradient to 1e-5")


def run(judge: Judge) -> bool:
    """Prints what is sent, and says whether the bars are met."""
    simulate_devices(4 * LOCAL)
    check_results()
    print(f"\nMB that a device sends there and back, E={E}, k={K}, {T} tokens of {4 * D} B")
    print(
        f"{'nodes':>5s}  {'variant':28s}{'wire':>10s}{'closed':>10s}{'error':>8s}{'inside':>10s}{'closed':>10s}"
    )
    worst, balanced = dict(wire=0.0, node=0.0), {}
    for num_nodes in FEWER:
        for way in variants():
            found, closed = compiled_bytes(way, num_nodes), closed_bytes(way, num_nodes)
            error = found["wire"] / closed["wire"] - 1
            worst = {
                level: max(least, abs(found[level] / closed[level] - 1)) for level, least in worst.items()
            }
            balanced[num_nodes, str(way)] = found["wire"]
            print(f"{num_nodes:5d}  {way!s:28s}{found['wire'] / 1e6:10.3f}{closed['wire'] / 1e6:10.3f}{error:8.2%}"
                  f"{found['node'] / 1e6:10.3f}{closed['node'] / 1e6:10.3f}")  # fmt: skip
    print()
    met = judge("compiled bytes between nodes over the closed form", 1 + worst["wire"], 1.01, False)
    met &= judge("compiled bytes inside the nodes over the closed form", 1 + worst["node"], 1.01, False)
    for num_nodes, bar in FEWER.items():
        exact = K / expected_nodes(E, K, num_nodes)
        met &= judge(
            f"one copy per expert over one per node, {num_nodes} nodes, closed form", exact, bar, True
        )
        for suffix, what in ((" capacity 1", "buffers of balanced size"), ("", "dropless buffers")):
            ratio = balanced[num_nodes, f"flat{suffix}"] / balanced[num_nodes, f"halo2_dedup{suffix}"]
            met &= judge(f"flat over halo2_dedup, {num_nodes} nodes, compiled, {what}", ratio, bar, True)
    return met
