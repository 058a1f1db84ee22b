"""Dispatch equals the sum over all experts weighted by a dense gate matrix: results, gradients and drop counts.

On simulated devices, inside shard_map with check_vma=True. Each device has tokens of its own.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.dispatch_cases import (
    Case,
    D,
    assert_close,
    check,
    check_dead_rows,
    masked_multiply,
    route,
    truth,
)
from meshes.axes import EXPERT
from models.moe import weigh
from piperjax.runtime.dispatch import DISPATCHERS, make_experts
from piperjax.runtime.dispatcher import Dispatcher
from piperjax.runtime.grouped_matmul import grouped_matmul

GRID = [(P, E, k) for P in (1, 2, 4, 8) for E in (8, 16) for k in (1, 2, 4)]
# Several devices with either number of experts; every k twice or more.
DAILY = [(1, 8, 4), (2, 8, 1), (2, 16, 4), (4, 16, 1), (4, 8, 2), (8, 8, 4), (8, 16, 2)]


def simulate_drops(case, ids, *, capacity_factor):
    """Which slots find room, [tokens, k]: first come, first served, in order of token and slot."""
    kept = np.ones(ids.shape, bool)
    capacity = math.ceil(capacity_factor * case.T * case.k / case.P)
    for device in range(case.P * case.data):
        used = [0] * case.P
        for token in range(device * case.T, (device + 1) * case.T):
            for slot in range(case.k):
                target = ids[token, slot] // (case.E // case.P)
                kept[token, slot] = used[target] < capacity
                used[target] += 1
    return kept


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case(*which), marks=[] if which in DAILY else [pytest.mark.slow], id="P{}-E{}-k{}".format(*which)
        )
        for which in GRID
    ],
)
def test_equals_the_dense_sum(case):
    run = case.compiled(make_experts("flat", EXPERT, 0.0), masked_multiply)
    check(case, run, np.random.default_rng(0))


def test_equals_the_dense_sum_with_grouped_matmul_over_data_and_experts():
    case = Case(P=4, E=8, k=2, data=2)
    run = case.compiled(make_experts("flat", EXPERT, 0.0), grouped_matmul)
    check(case, run, np.random.default_rng(1))


@pytest.mark.parametrize("P", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_equals_the_dense_sum_in_float64(P):
    with jax.enable_x64(True):
        case = Case(P=P, E=8, k=2, dtype="float64")
        run = case.compiled(make_experts("flat", EXPERT, 0.0), grouped_matmul)
        check(case, run, np.random.default_rng(2), forward=1e-12, backward=1e-12)


@pytest.mark.parametrize(
    ("P", "k", "capacity_factor"),
    [
        (1, 2, 0.5),
        pytest.param(1, 2, 1.0, marks=pytest.mark.slow),
        (2, 4, 0.75),
        pytest.param(4, 1, 1.0, marks=pytest.mark.slow),
        pytest.param(4, 2, 1.25, marks=pytest.mark.slow),
        (8, 2, 1.25),
        pytest.param(4, 2, 100.0, marks=pytest.mark.slow),
    ],
)
def test_capacity_drops_later_tokens_and_counts_them(P, k, capacity_factor):
    case = Case(P=P, E=8, k=k)
    run = case.compiled(make_experts("flat", EXPERT, capacity_factor), masked_multiply)
    check(
        case,
        run,
        np.random.default_rng(3),
        kept_of=functools.partial(simulate_drops, case, capacity_factor=capacity_factor),
    )


@pytest.mark.parametrize(
    ("P", "capacity_factor"), [(4, 0.0), (4, 0.75), pytest.param(2, 0.0, marks=pytest.mark.slow)]
)
def test_dead_rows_full_of_nan_change_nothing(monkeypatch, P, capacity_factor):
    case = Case(P=P, E=8, k=2)
    experts = make_experts("flat", EXPERT, capacity_factor)
    seen = []

    def multiply(rows, w, sizes):
        jax.debug.callback(lambda rows: seen.append(np.isnan(rows).any()), rows)
        return grouped_matmul(rows, w, sizes)

    check_dead_rows(case, experts, multiply, np.random.default_rng(4), monkeypatch)
    jax.effects_barrier()
    assert any(seen), "the poison did not reach the experts: this test tests nothing"


@pytest.mark.parametrize(
    ("factors", "capacity_factor"),
    [
        ((1, 2, 4), 0.0),
        ((2, 2, 2), 1.0),
        pytest.param((2, 2, 2), 0.0, marks=pytest.mark.slow),
        pytest.param((1, 4, 1), 0.0, marks=pytest.mark.slow),
    ],
)
def test_phases_change_no_bit(factors, capacity_factor):
    case = Case(P=math.prod(factors), E=8, k=2, factors=factors)
    rng = np.random.default_rng(8)
    arrays = case.arrays(rng)
    ids = route(rng, "zipf", len(arrays["x"]), case.E, case.k)
    flat, *others = (
        case.compiled(make_experts(name, EXPERT, capacity_factor), masked_multiply)(arrays, ids)
        for name in ("flat", "halo2", "halo3")
    )
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, flat)


def lowered(case, experts, *, gradient):
    shapes = {name: array.astype(case.dtype) for name, array in case.arrays(np.random.default_rng(0)).items()}
    ids = np.zeros((case.T * case.P, case.k), np.int32)
    function = case.function(experts, grouped_matmul)
    if gradient:
        return jax.jit(jax.grad(lambda *args: function(*args, ids)[0].sum(), argnums=(0, 1, 2))).lower(
            shapes["x"], shapes["gates"], shapes["w"]
        )
    return jax.jit(function).lower(shapes["x"], shapes["gates"], shapes["w"], ids)


@functools.cache
def gradient_texts(P, capacity_factor):
    """The gradient of eight experts on P devices as it is written, and as it is compiled."""
    program = lowered(Case(P=P, E=8, k=2), make_experts("flat", EXPERT, capacity_factor), gradient=True)
    return program.as_text(), program.compile().as_text()


def count_ops(text, name):
    """Operations in StableHLO ("stablehlo.all_to_all") or in HLO ("all-to-all(", asynchronous or not)."""
    stable = len(re.findall(rf'"?stablehlo\.{name}"?\b', text))
    return stable or len(re.findall(rf"\b{name.replace('_', '-')}(?:-start)?\(", text))


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
def test_two_all_to_alls_of_rows_each_way_and_one_of_counts(capacity_factor):
    case = Case(P=4, E=8, k=2)
    experts = make_experts("flat", EXPERT, capacity_factor)
    forward = lowered(case, experts, gradient=False)
    assert count_ops(forward.as_text(), "all_to_all") == 3
    for text in gradient_texts(4, capacity_factor):
        assert count_ops(text, "all_to_all") == 3 + 2


@pytest.mark.parametrize(
    ("P", "capacity_factor"),
    [pytest.param(1, 0.0, marks=pytest.mark.slow), (1, 0.5), (4, 0.0), (4, 1.0)],
)
def test_no_scatter_forward_or_backward(P, capacity_factor):
    for text in gradient_texts(P, capacity_factor):
        assert count_ops(text, "gather") > 0
        assert count_ops(text, "scatter") == 0


def test_one_device_moves_nothing_and_pads_nothing():
    case = Case(P=1, E=8, k=2)
    shapes = []

    def multiply(rows, w, sizes):
        shapes.append(rows.shape)
        return grouped_matmul(rows, w, sizes)

    experts = make_experts("flat", EXPERT, 0.0)
    assert "all_to_all" not in lowered(case, experts, gradient=True).as_text()
    arrays = case.arrays(np.random.default_rng(0))
    ids = np.zeros((case.T, case.k), np.int32)
    jax.eval_shape(case.function(experts, multiply), arrays["x"], arrays["gates"], arrays["w"], ids)
    assert shapes == [(12 * 2, D)]


def test_runs_outside_of_any_mesh():
    case = Case(P=1, E=8, k=2)
    rng = np.random.default_rng(5)
    arrays = case.arrays(rng)
    ids = route(rng, "random", case.T, case.E, case.k)
    experts = make_experts("flat", (), 0.0)
    y, dropped = jax.jit(
        lambda x, gates, w: experts(
            lambda rows, n, g: weigh(jnp.tanh(grouped_matmul(rows, w, n)), g), x, ids, gates, case.E
        )
    )(arrays["x"], arrays["gates"], arrays["w"])
    assert_close(y, truth(arrays, ids)[0], 1e-6)
    assert dropped == 0


def test_experts_may_live_anywhere():
    case = Case(P=4, E=8, k=2)
    rng = np.random.default_rng(6)
    arrays = case.arrays(rng)
    ids = route(rng, "zipf", len(arrays["x"]), case.E, case.k)
    (y, _), (dx, dgates, dw) = case.compiled(make_experts("flat", EXPERT, 0.0), grouped_matmul)(arrays, ids)
    physical = rng.permutation(case.E)
    moved = arrays | {
        "w": arrays["w"][np.argsort(physical)]
    }  # physical expert p holds what belongs to its logical one
    experts = functools.partial(make_experts("flat", EXPERT, 0.0), placement=jnp.asarray(physical, jnp.int32))
    (y2, _), (dx2, dgates2, dw2) = case.compiled(experts, grouped_matmul)(moved, ids)
    for found, wanted in ((y2, y), (dx2, dx), (dgates2, dgates), (np.asarray(dw2)[physical], dw)):
        np.testing.assert_array_equal(found, wanted)


def test_bfloat16_is_added_up_in_float32():
    T, k, E = 64, 4, 8
    rng = np.random.default_rng(7)
    x, ids = rng.normal(size=(T, D)), route(rng, "random", T, E, k)
    gates = rng.uniform(size=(T, k)).astype(np.float32)
    x = jnp.asarray(x, jnp.bfloat16)
    y, _ = make_experts("flat", (), 0.0)(lambda rows, sizes, gates: weigh(rows, gates), x, ids, gates, E)
    expected = sum(np.asarray(weigh(x, gates[:, j]), np.float32) for j in range(k))
    assert y.dtype == jnp.bfloat16
    # One rounding to bfloat16 at the end, beside those of what experts return.
    np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.bfloat16))


def test_a_dispatcher_is_a_value(monkeypatch):
    def send(x, expert_ids, gates, sharing):
        return x, (sharing.axes == () and sharing.capacity_factor == 2.0 and sharing.num_experts == 8, gates)

    nowhere = Dispatcher(
        name="nowhere",
        num_rows=lambda sharing: 1,
        admit=lambda expert_ids, sharing: None,
        send=send,
        work=lambda ffn, arrived, sharing: arrived,
        collect=lambda results, kept, sharing: jnp.where(kept[0], results, 0),
    )
    monkeypatch.setitem(DISPATCHERS, "nowhere", nowhere)
    x = np.ones((4, D), np.float32)
    y, overflow = make_experts("nowhere", (), 2.0)(None, x, jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 2)), 8)
    np.testing.assert_array_equal(y, x)
    assert overflow == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("flatt", (), 0.0),
            "no dispatcher named 'flatt'; there are flat, halo2, halo3, halo2_dedup, halo3_dedup; did you mean 'flat'?",
        ),
        (("flat", (), -1.0), "capacity_factor must be 0"),
        (("flat", (), math.nan), "capacity_factor must be 0"),
        (("flat", (), 0.0, 0), "dispatch_chunks must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        make_experts(*arguments[:3], **(dict(chunks=arguments[3]) if arguments[3:] else {}))


def test_a_placement_of_other_experts_is_refused():
    experts, ids = make_experts("flat", (), 0.0), jnp.zeros((4, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"must hold the 8 experts of the model, got \[2\]"):
        experts(None, jnp.ones((4, D)), ids, jnp.ones((4, 2)), 8, placement=jnp.array([1, 0]))


def test_experts_must_divide_over_devices():
    case = Case(P=4, E=8, k=2)
    experts = make_experts("flat", EXPERT, 0.0)
    with pytest.raises(ValueError, match="got 6 experts on 4 devices"):
        lowered(case, lambda ffn, x, ids, gates, _: experts(ffn, x, ids, gates, 6), gradient=False)
