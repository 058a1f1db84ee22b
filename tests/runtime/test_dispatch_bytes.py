"""What dispatchers send between nodes, read off the compiled program, is what the plan's prices say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.dispatch_cases import Case
from meshes.axes import EXPERT
from meshes.device import Device
from meshes.platform import Link, Platform
from piperjax.planner.network import dispatch_transfer
from piperjax.runtime.dispatch import make_experts
from piperjax.runtime.hlo import first_group, parse, sent_bytes

WIDTH, FACTORS = 4096, (1, 2, 4)
TOY = Platform(
    name="toy",
    description="two nodes",
    device=Device(),
    devices_per_node=4,
    links=(
        Link(name="node", devices=4, bytes_per_second=100e9, latency_seconds=1e-6),
        Link(name="fabric", devices=8, bytes_per_second=10e9, latency_seconds=1e-5),
    ),
)


def compiled_text(dispatch, capacity_factor, *, k, gradient):
    case = Case(P=8, E=16, k=k, T=32, factors=FACTORS)
    function = case.function(
        make_experts(dispatch, EXPERT, capacity_factor), lambda rows, w, sizes: rows * w[0, 0, 0]
    )
    shapes = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype)
        for name, a in case.arrays(np.random.default_rng(0)).items()
    }
    x, ids = (
        jax.ShapeDtypeStruct((case.T * case.P, columns), dtype)
        for columns, dtype in ((WIDTH, jnp.float32), (k, jnp.int32))
    )

    def loss(x, gates, w, ids):
        return (function(x, gates, w, ids)[0] ** 2).sum()

    chosen = jax.grad(loss, (0, 1, 2)) if gradient else function
    return case, jax.jit(chosen).lower(x, shapes["gates"], shapes["w"], ids).compile().as_text()


def off_node_bytes(text):
    """Bytes that a device sends to other nodes, on average."""
    total = 0.0
    for visit in parse(text).visits():
        one = visit.instruction
        operation = one.operation.removesuffix("-start")
        if operation not in ("all-to-all", "all-gather", "collective-permute"):
            continue
        if operation == "collective-permute":
            pairs = re.findall(
                r"\{(\d+),(\d+)\}", one.rest.split("source_target_pairs=")[1].split("}}")[0] + "}"
            )
            crossing = sum(int(a) // 4 != int(b) // 4 for a, b in pairs)
            total += visit.times * sent_bytes(one, 2) * crossing / 8
        else:
            group = np.array(first_group(one))
            elsewhere = (group // 4 != group[0] // 4).mean()
            total += visit.times * sent_bytes(one, len(group)) * elsewhere / (1 - 1 / len(group))
    return total


@pytest.mark.parametrize(
    ("dispatch", "capacity_factor"),
    [
        ("flat", 0.0),
        ("halo2", 0.0),
        ("halo3", 0.0),
        ("halo2_dedup", 0.0),
        ("halo2_dedup", 0.75),
        ("halo3_dedup", 0.0),
        ("halo3_dedup", 0.75),
        ("flat", 0.75),
    ],
)
def test_bytes_between_nodes_are_the_closed_form(dispatch, capacity_factor):
    case, text = compiled_text(dispatch, capacity_factor, k=2, gradient=False)
    cost = dispatch_transfer(
        TOY, expert_factors=FACTORS, tokens=case.T, row_bytes=4 * WIDTH, num_experts=case.E, experts_per_token=case.k,
        dispatcher=dispatch, capacity_factor=capacity_factor,
    )  # fmt: skip
    assert off_node_bytes(text) == pytest.approx(2 * cost.bytes_by_level["fabric"], rel=0.01)


@pytest.mark.parametrize(
    ("dispatch", "capacity_factor"),
    [
        pytest.param("halo2_dedup", 0.0, marks=pytest.mark.slow),
        ("halo2_dedup", 0.75),
        pytest.param("halo3_dedup", 0.0, marks=pytest.mark.slow),
        ("halo3_dedup", 0.75),
    ],
)
def test_rows_that_cross_once_need_no_scatter_and_no_empty_message(dispatch, capacity_factor):
    _, text = compiled_text(dispatch, capacity_factor, k=3, gradient=True)
    assert not re.search(r"\bscatter\(", text)
    assert not re.search(r"\[(?:\d+,)*0(?:,\d+)*\]\S* (?:all-|collective-)", text)
    assert "reduce-scatter" not in text


@pytest.mark.slow
def test_each_node_is_sent_a_token_once_whatever_the_number_of_experts():
    sizes = [off_node_bytes(compiled_text("halo2_dedup", 0.0, k=k, gradient=False)[1]) for k in (1, 4)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
