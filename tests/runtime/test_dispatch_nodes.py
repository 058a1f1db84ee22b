"""Rows that cross to a node once give the results and gradients of the dense sum, and cross no more often."""

import functools

import numpy as np
import pytest

from benchmarks.dispatch_cases import Case, check, masked_multiply
from meshes.axes import EXPERT
from piperjax.runtime.dispatch import make_experts
from piperjax.runtime.dispatch_nodes_limited import limits
from piperjax.runtime.dispatcher import Sharing

# Fewer and more experts on a device than a token takes; every axis alone and together.
CASES = [
    Case(P=8, E=16, k=4, factors=(2, 2, 2)),
    Case(P=8, E=8, k=3, factors=(1, 2, 4)),
    Case(P=8, E=32, k=2, factors=(1, 4, 2)),
    Case(P=4, E=8, k=2, factors=(2, 2, 1)),
    Case(P=4, E=8, k=2, factors=(1, 1, 4)),
    Case(P=1, E=8, k=2, factors=(1, 1, 1)),
]


def sharing_of(case, capacity_factor):
    return Sharing(
        axes=EXPERT, sizes=case.factors, num_experts=case.E, experts_per_token=case.k, num_tokens=case.T,
        capacity_factor=capacity_factor,
    )  # fmt: skip


def simulate_drops(case, ids, *, capacity_factor):
    """Which slots find room [tokens, k]: token by token, device by device, every limit counted for itself."""
    sharing = sharing_of(case, capacity_factor)
    limit, local = limits(sharing), case.factors[2]
    kept = np.ones(ids.shape, bool)
    for source in range(case.P * case.data):
        on_node, on_device, copies = [0] * sharing.num_nodes, [0] * case.P, [0] * case.P
        for token in range(source * case.T, (source + 1) * case.T):
            device_of = ids[token] // sharing.experts_per_device
            for node in set(device_of // local):
                on_node[node] += 1
            for device in set(device_of):
                on_device[device] += 1
                copies[device] += int((device_of == device).sum())
                fits = (
                    on_node[device // local] <= limit.node
                    and on_device[device] <= limit.device
                    and copies[device] <= limit.copies
                )
                kept[token, device_of == device] = fits
    return kept


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.factors}-E{case.E}-k{case.k}")
def test_equals_the_dense_sum(case):
    check(
        case,
        case.compiled(make_experts("halo2_dedup", EXPERT, 0.0), masked_multiply),
        np.random.default_rng(0),
    )


@pytest.mark.parametrize("capacity_factor", [0.6, 1.25])
@pytest.mark.parametrize(
    "case", CASES[:3] + CASES[5:], ids=lambda case: f"{case.factors}-E{case.E}-k{case.k}"
)
def test_limits_drop_later_tokens_and_count_them(case, capacity_factor):
    run = case.compiled(make_experts("halo2_dedup", EXPERT, capacity_factor), masked_multiply)
    kept_of = functools.partial(simulate_drops, case, capacity_factor=capacity_factor)
    check(case, run, np.random.default_rng(1), kept_of=kept_of)
