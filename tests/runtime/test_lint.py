"""The deadlock check: accepts what meets, refuses what may wait for ever."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from piperjax.runtime.lint import check_no_deadlock, collectives

MESH = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("pipe", "data"), axis_types=(AxisType.Auto,) * 2)


def jaxpr_of(body):
    mapped = jax.shard_map(body, mesh=MESH, in_specs=P("pipe", "data"), out_specs=P("pipe", "data"))
    return jax.make_jaxpr(mapped)(jnp.ones((2, 2)))


def add_over(axes, x):
    return x + lax.pcast(lax.psum(x, axes), axes, to="varying")


def test_a_collective_outside_branches_is_counted():
    counts = check_no_deadlock(jaxpr_of(lambda x: add_over(("pipe", "data"), x)))
    assert counts[("psum_invariant", ("data", "pipe"))] == 1


def test_a_branch_by_pipe_may_reduce_over_data():
    def body(x):
        return lax.cond(lax.axis_index("pipe") == 0, lambda x: add_over(("data",), x), lambda x: x, x)

    (found,) = collectives(jaxpr_of(body))
    assert found.divergent_axes == {"pipe"}
    assert not found.may_deadlock


def test_a_branch_by_pipe_must_not_reduce_over_pipe():
    def body(x):
        return lax.cond(lax.axis_index("pipe") == 0, lambda x: add_over(("pipe",), x), lambda x: x, x)

    with pytest.raises(
        ValueError, match=r"psum_invariant over \['pipe'\] under a predicate that varies over"
    ):
        check_no_deadlock(jaxpr_of(body))


def test_a_hidden_reduction_of_a_gradient_is_found():
    # The weight is the same on all devices, so its gradient contains an all-reduce: inside a branch it deadlocks.
    weight = jnp.float32(3.0)

    def body(x):
        def train(x):
            return x + lax.pcast(jax.grad(lambda w: (w * x).sum())(weight), ("pipe", "data"), to="varying")

        return lax.cond(lax.axis_index("pipe") == 0, train, lambda x: x, x)

    with pytest.raises(ValueError, match="may wait for devices in another branch"):
        check_no_deadlock(jaxpr_of(body))


def test_a_loop_whose_trips_differ_must_not_hold_a_collective_over_the_same_axis():
    def body(x):
        trips = lax.axis_index("pipe") + 1
        return lax.fori_loop(0, trips, lambda _, x: add_over(("pipe",), x), x)

    with pytest.raises(ValueError, match="may wait for devices in another branch"):
        check_no_deadlock(jaxpr_of(body))


def test_a_permute_waits_for_all_devices_even_in_a_branch_by_another_axis():
    def body(x):
        def swap(x):
            return lax.ppermute(x, "data", [(0, 1), (1, 0)])

        return lax.cond(lax.axis_index("pipe") == 0, swap, lambda x: x, x)

    with pytest.raises(
        ValueError, match=r"ppermute over \['data'\] under a predicate that varies over \['pipe'\]"
    ):
        check_no_deadlock(jaxpr_of(body))
