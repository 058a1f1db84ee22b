"""What dispatchers send between nodes and inside, read off the compiled program, is what the plan's prices say."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.alltoall_bytes import sent_bytes_by_level
from benchmarks.dispatch_cases import Case
from meshes.axes import EXPERT
from meshes.device import Device
from meshes.platform import Link, Platform
from piperjax.planner.network import dispatch_transfer
from piperjax.runtime.dispatch import make_experts
from piperjax.runtime.hlo import parse

WIDTH, TWO_NODES, THREE_NODES = 4096, (1, 2, 4), (1, 3, 2)


def toy(factors):
    _, nodes, local = factors
    return Platform(
        name="toy",
        description="some nodes",
        device=Device(),
        devices_per_node=local,
        links=(
            Link(name="node", devices=local, bytes_per_second=100e9, latency_seconds=1e-6),
            Link(name="wire", devices=nodes * local, bytes_per_second=10e9, latency_seconds=1e-5),
        ),
    )


def compiled_text(dispatch, capacity_factor, *, k, gradient, factors=TWO_NODES):
    devices = math.prod(factors)
    case = Case(P=devices, E=2 * devices, k=k, T=32, factors=factors)
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


@pytest.mark.parametrize(
    ("dispatch", "capacity_factor", "factors"),
    [
        ("flat", 0.0, TWO_NODES),
        ("halo2", 0.0, TWO_NODES),
        ("halo3", 0.0, TWO_NODES),
        ("halo2_dedup", 0.0, TWO_NODES),
        ("halo2_dedup", 0.75, TWO_NODES),
        ("halo3_dedup", 0.0, TWO_NODES),
        ("halo3_dedup", 0.75, TWO_NODES),
        ("flat", 0.75, TWO_NODES),
        # Three nodes in two rounds of two leaders: in one of four places a leader has no pair.
        ("halo3", 0.0, THREE_NODES),
        pytest.param("halo3_dedup", 0.0, THREE_NODES, marks=pytest.mark.slow),
    ],
)
def test_bytes_between_nodes_and_inside_are_the_closed_form(dispatch, capacity_factor, factors):
    case, text = compiled_text(dispatch, capacity_factor, k=2, gradient=False, factors=factors)
    cost = dispatch_transfer(
        toy(factors), expert_factors=factors, tokens=case.T, row_bytes=4 * WIDTH, num_experts=case.E,
        experts_per_token=case.k, dispatcher=dispatch, capacity_factor=capacity_factor,
    )  # fmt: skip
    assert sent_bytes_by_level(parse(text), *factors[1:]) == pytest.approx(
        {level: 2 * cost.bytes_by_level[level] for level in ("node", "wire")}, rel=0.01
    )


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
    texts = (compiled_text("halo2_dedup", 0.0, k=k, gradient=False)[1] for k in (1, 4))
    sizes = [sent_bytes_by_level(parse(text), *TWO_NODES[1:])["wire"] for text in texts]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
