"""Benchmarks of collectives: axes follow the levels of a machine, and each body is the collective it is named after."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from meshes.platform import load_platform
from piperjax.planner.network import Group
from piperjax.runtime import exchange_benchmarks as benchmarks
from piperjax.runtime.exchange_benchmarks import Axis, axes_of, exchange_sizes, exchange_tasks
from piperjax.runtime.stopwatch import Stopwatch

CPU8, FRONTIER = load_platform("cpu8"), load_platform("frontier")


@pytest.mark.parametrize(
    ("platform", "num_devices", "sizes"),
    [
        (CPU8, 1, []),
        (CPU8, 2, [(2, 1)]),
        (CPU8, 4, [(2, 1), (2, 2)]),  # the node in two parts
        (CPU8, 8, [(2, 1), (2, 2), (2, 4)]),
        (CPU8, 6, [(2, 1), (3, 2)]),  # nodes of four share no more than two consecutive devices of a block
        (FRONTIER, 64, [(2, 1), (4, 2), (4, 8), (2, 32)]),
    ],
)
def test_axes_follow_the_levels(platform, num_devices, sizes):
    assert [(axis.size, axis.stride) for axis in axes_of(platform, num_devices)] == sizes


def test_links_must_reach_all_devices():
    with pytest.raises(
        ValueError, match="platform 'cpu8' joins at most 8 of the 16 devices; name a platform whose"
    ):
        axes_of(CPU8, 16)


@pytest.mark.parametrize("name", [*benchmarks.COLLECTIVES, "hierarchical"])
def test_bodies_are_what_they_are_named_after(name):
    axes = [Axis("inner", 2, 1), Axis("outer", 4, 2)]
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("outer", "inner"), axis_types=(AxisType.Auto,) * 2)
    body = benchmarks._body(name, axes, 8)
    x = np.arange(8 * 8 * 3, dtype=np.float32).reshape(8, 8, 3)
    if name in ("all_gather", "permute"):
        x = x[:, 0]
    whole = P(("outer", "inner"))
    run = jax.jit(
        jax.shard_map(lambda x: body(x[0])[None], mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    )
    found = np.asarray(run(x))
    expected = {
        "permute": lambda: np.roll(x, 1, axis=0),
        "all_gather": lambda: np.broadcast_to(x.reshape(-1), (8, 24)),
        "reduce_scatter": lambda: x.sum(axis=0, keepdims=True).transpose(1, 0, 2),
        "all_reduce": lambda: np.broadcast_to(x.sum(axis=0), (8, 8, 3)),
        "all_to_all": lambda: x.transpose(1, 0, 2),
        # The same as the flat one.
        "hierarchical": lambda: x.transpose(1, 0, 2).reshape(8, 4, 2, 3),
    }[name]()
    np.testing.assert_array_equal(found, expected)


def test_every_collective_is_measured_over_every_level():
    tasks = exchange_tasks(CPU8, [512], Stopwatch(repeats=1, target_seconds=1e-4), jax.devices())
    samples = [sample for task in tasks for sample in task.run()]
    flat = [sample for sample in samples if sample.collective != "hierarchical"]
    assert {(s.collective, s.groups) for s in flat} == {
        (name, (group,))
        for name in benchmarks.COLLECTIVES
        for group in (Group(2, 1, 8), Group(4, 1, 8), Group(8, 1, 8), Group(2, 4, 8))
    }
    assert [s.groups for s in samples if s not in flat] == [(Group(2, 1, 8), Group(2, 2, 8), Group(2, 4, 8))]
    assert all(s.num_bytes == 512 and 0 < s.seconds < 5 for s in samples)


def test_a_lone_device_exchanges_nothing():
    assert list(exchange_tasks(CPU8, [512], Stopwatch(), jax.devices()[:1])) == []


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_quick_sizes_span_the_range(backend):
    quick, full = (exchange_sizes(quick=quick, backend=backend) for quick in (True, False))
    assert len(quick) < len(full)
    assert min(full) <= min(quick) and 4 * max(quick) >= max(full)
