"""Tokens in chunks: the same results, and exchanges of one chunk that need not wait for the experts of another."""

import jax
import numpy as np
import pytest

from benchmarks.dispatch_cases import Case, check, masked_multiply
from meshes.axes import BATCH, EXPERT
from models.moe import weigh
from piperjax.runtime.dispatch import DISPATCHERS, make_experts
from piperjax.runtime.grouped_matmul import grouped_matmul
from piperjax.runtime.program import is_variable, trace
from piperjax.runtime.varying import vary

CASE = Case(P=8, E=16, k=3, factors=(1, 2, 4))


@pytest.mark.parametrize(
    ("dispatch", "chunks"),
    [
        ("halo2", 4),
        # Two chunks of it go every day in test_dispatch_passes.py.
        pytest.param("halo2_dedup", 2, marks=pytest.mark.slow),
        pytest.param("flat", 2, marks=pytest.mark.slow),
        pytest.param("halo3", 3, marks=pytest.mark.slow),
        pytest.param("halo2_dedup", 4, marks=pytest.mark.slow),
        pytest.param("halo3_dedup", 3, marks=pytest.mark.slow),
    ],
)
def test_chunks_equal_the_dense_sum(dispatch, chunks):
    run = CASE.compiled(make_experts(dispatch, EXPERT, 0.0, chunks=chunks), masked_multiply)
    check(CASE, run, np.random.default_rng(0), routings=("zipf", "all to one expert", "one node only"))


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_chunks_that_do_not_divide_are_refused(dispatch):
    experts = make_experts(dispatch, EXPERT, 0.0, chunks=5)
    arrays = CASE.arrays(np.random.default_rng(0))
    ids = np.zeros((len(arrays["x"]), CASE.k), np.int32)
    with pytest.raises(ValueError, match="must divide the 12 tokens of a microbatch on a device, got 5"):
        jax.eval_shape(
            CASE.function(experts, masked_multiply), arrays["x"], arrays["gates"], arrays["w"], ids
        )


def is_exchange(equation, axis):
    return equation.primitive.name in ("all_gather", "all_to_all") and axis in equation.params["axis_name"]


def waited_for(equations, is_counted):
    """For every exchange of rows between nodes, in the order of the program: which operations of a kind it waits for.

    These are numbered as they come.
    """
    before, counted, found = {}, 0, []
    for equation in equations:
        waits = frozenset().union(*(before.get(v, frozenset()) for v in equation.invars if is_variable(v)))
        if is_counted(equation):
            waits, counted = waits | {counted}, counted + 1
        elif is_exchange(equation, "expert_node"):
            found.append((equation.primitive.name, waits))
        before |= dict.fromkeys(equation.outvars, waits)
    return found


def test_exchanges_between_nodes_wait_for_experts_two_chunks_back_only():
    chunks, traced = 4, []
    experts = make_experts("halo2_dedup", EXPERT, 0.0, chunks=chunks)

    def per_device(x, gates, w, ids):
        def layer(x, gates, w):
            def expert_ffn(rows, sizes, gates):
                return weigh(grouped_matmul(rows, w, sizes), gates)

            return experts(expert_ffn, x, ids, gates, CASE.E)[0]

        def both(x, gates, w, dy):
            y, vjp = jax.vjp(layer, x, gates, w)
            return [y, *vjp(dy)]

        traced.append(trace(both, *vary((x, gates, w, x))))
        return x

    arrays = CASE.arrays(np.random.default_rng(0))
    ids = np.zeros((len(arrays["x"]), CASE.k), np.int32)
    spec = jax.P(BATCH)
    mapped = jax.shard_map(
        per_device, mesh=CASE.mesh(), in_specs=(spec, spec, jax.P(EXPERT), spec), out_specs=spec
    )
    jax.eval_shape(mapped, arrays["x"], arrays["gates"], arrays["w"], ids)
    found = waited_for(traced[0].equations, lambda equation: equation.primitive.name == "multiply")
    sent = [waits for name, waits in found if name == "all_gather"]
    returned = [waits for name, waits in found if name == "all_to_all"]
    # Forward: chunk c is sent beside the product of c - 1, and collected beside that of c + 1.
    assert [max(waits, default=-1) for waits in sent[:chunks]] == [-1, -1, 0, 1]
    assert [max(waits) for waits in returned[:chunks]] == [0, 1, 2, 3]
    # Backward likewise from the last chunk on: gradients of results are sent, those of tokens collected.
    # (Products of forward are made by then.)
    backward = [{product for product in waits if product >= chunks} for waits in sent[chunks:]]
    assert [max(waits, default=-1) for waits in backward] == [-1, -1, 4, 5]
    assert [max(waits) for waits in returned[chunks:]] == [4, 5, 6, 7]
    # What leaves beside a product leaves when its rows have come to their device, or backward its gradients: two
    # exchanges inside the nodes for every chunk before, and one. The first and the last have no product beside them.
    found = waited_for(traced[0].equations, lambda equation: is_exchange(equation, "expert_local"))
    sent = [max(waits, default=-1) for name, waits in found if name == "all_gather"]
    returned = [max(waits) for name, waits in found if name == "all_to_all"]
    assert sent == [-1, 0, 2, 4, -1, 8, 10, 12]
    assert returned == [2, 4, 6, 7, 10, 12, 14, 15]
