"""Tokens in chunks: the same results, and exchanges of one chunk that need not wait for the experts of another."""

import jax
import numpy as np
import pytest

from benchmarks.dispatch_cases import Case, check, masked_multiply
from meshes.axes import EXPERT
from piperjax.runtime.dispatch import DISPATCHERS, make_experts

CASE = Case(P=8, E=16, k=3, factors=(1, 2, 4))


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("dispatch", ["halo2", "halo2_dedup"])
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
