"""Micro-benchmarks of devices: products are what they are named, and every task gives samples of what was asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshes.device import ELEMENTWISE
from piperjax.runtime import microbenchmarks
from piperjax.runtime.microbenchmarks import Heads, Layer, Shapes, compute_tasks, shapes_for
from piperjax.runtime.stopwatch import Stopwatch

QUICKEST = Stopwatch(repeats=1, target_seconds=1e-4)
SHAPES = Shapes(
    layers=(Layer(8, 16, 32), Layer(16, 16, 16), Layer(4, 16, 32, groups=2)),
    heads=(Heads(1, 16, 4, 8),),
    stream_bytes=(2**10,),
    working_bytes=2**12,
    copy_bytes=(2**10,),
    dtypes=("float32", "bfloat16"),
    fresh_bytes=(2**12,),
    elementwise_bytes=(2**12,),
)


@pytest.mark.parametrize("groups", [0, 3])
def test_products_are_what_they_are_named(groups):
    layer = Layer(4, 8, 6, groups)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(4 * max(groups, 1), 8)), rng.normal(size=(4 * max(groups, 1), 6))
    w = rng.normal(size=(groups, 8, 6) if groups else (8, 6))
    blocks = np.arange(4 * max(groups, 1)).reshape(-1, 4)
    weights = w if groups else w[None]
    expected = {
        "forward": np.concatenate([x[rows] @ weight for rows, weight in zip(blocks, weights, strict=True)]),
        "input_gradient": np.concatenate(
            [dy[rows] @ weight.T for rows, weight in zip(blocks, weights, strict=True)]
        ),
        "weight_gradient": np.stack([x[rows].T @ dy[rows] for rows in blocks]).reshape(w.shape),
    }
    given = {"forward": (x, w), "input_gradient": (w, dy), "weight_gradient": (x, dy)}
    for part, value in expected.items():
        body, operands, (m, n, k) = microbenchmarks._product(layer, part, "float32")
        arrays = [jnp.asarray(array, jnp.float32) for array in given[part]]
        assert [(array.shape, "float32") for array in arrays] == operands
        np.testing.assert_allclose(body(*arrays), value, rtol=1e-5, atol=1e-5)
        assert m * n * k == 4 * 8 * 6
        assert {"forward": (4, 6, 8), "input_gradient": (4, 8, 6), "weight_gradient": (8, 6, 4)}[part] == (
            m,
            n,
            k,
        )


def test_every_task_gives_its_samples():
    fields = {}
    for task in compute_tasks(SHAPES, QUICKEST, jax.devices()[:2]):
        found = task.run()
        fields.setdefault(task.field, []).extend(found if isinstance(found, list) else [found])
    assert set(fields) == {
        "call_seconds",
        "launch_seconds",
        "products",
        "attention",
        "alone",
        "streams",
        "elementwise",
        "fresh",
        "copies",
    }
    assert min(fields["call_seconds"] + fields["launch_seconds"]) > 0
    products = fields["products"]
    # The second dtype gets every third layer.
    assert [sum(s.dtype == dtype for s in products) for dtype in SHAPES.dtypes] == [9, 3]
    assert {s.groups for s in products} == {0, 2}
    assert [(s.backward, s.seq_len, s.head_dim) for s in fields["attention"]] == 2 * [
        (False, 16, 8),
        (True, 16, 8),
    ]
    # The causal half of scores and their product with the values: 2 S S N H.
    assert {s.flop for s in fields["attention"]} == {2 * 16 * 16 * 4 * 8}
    assert [s.num_bytes for s in fields["streams"] + fields["copies"]] == [2**11, 2**10]
    counted = {s.kind: s.num_bytes / 2**12 for s in fields["elementwise"]}
    assert set(counted) == set(ELEMENTWISE)
    # A gated activation reads two arrays and writes one; six are counted for its gradient, as in `planner.work`.
    assert (counted["activation"], counted["activation_gradient"], counted["norm"]) == (3, 6, 4)
    samples = fields["elementwise"] + products + fields["attention"] + fields["streams"] + fields["copies"]
    assert all(0 < sample.seconds < 5 for sample in samples)
    assert all(min(pair) > 0 for pair in fields["alone"])


def test_one_device_is_not_compared_with_itself():
    assert "alone" not in {task.field for task in compute_tasks(SHAPES, QUICKEST, jax.devices()[:1])}


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_quick_suites_are_parts_of_full_ones(backend):
    quick, full = shapes_for(backend, quick=True), shapes_for(backend, quick=False)
    for name in ("layers", "heads", "stream_bytes", "copy_bytes"):
        assert set(getattr(quick, name)) < set(getattr(full, name))
        assert len(getattr(quick, name)) <= 7
    assert {bool(layer.groups) for layer in quick.layers} == {False, True}
