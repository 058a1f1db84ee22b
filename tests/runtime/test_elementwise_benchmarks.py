"""Bodies of elementwise benchmarks: they compute what they are named after, on as many bytes as are counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshes.device import ELEMENTWISE
from models.layers import Rotation, activate, rms_norm, rotary
from piperjax.runtime.elementwise_benchmarks import BODIES, HEAD_DIM, WIDTH, elementwise_operands

ROWS = 6


def operands(kind):
    """Random operands, and the zero among them."""
    rng = np.random.default_rng(0)
    shapes = elementwise_operands(BODIES[kind], 4 * ROWS * WIDTH)
    return [
        jnp.asarray(rng.normal(size=shape), dtype) if dtype == "float32" else jnp.zeros(shape, dtype)
        for shape, dtype in shapes
    ]


def turned(x, cos, sin):
    heads = x.reshape(1, ROWS, WIDTH // HEAD_DIM, HEAD_DIM)
    return rotary(heads, Rotation(cos[None, :, None], sin[None, :, None])).reshape(x.shape)


def gathered(tokens):
    """Row r is a copy of token (7919 r % 6) // 2, and 7919 = 6 * 1319 + 5."""
    return tokens[np.array([5 * r % ROWS for r in range(ROWS)]) // 2]


EXPECTED = {
    "norm": lambda zero, x, y, scale: (x + y, rms_norm(x + y, scale, 1e-5)),
    "norm_gradient": lambda x, dx, dy, scale: jax.vjp(lambda x, s: (x, rms_norm(x, s, 1e-5)), x, scale)[1](
        (dx, dy)
    ),
    "rotary": turned,
    "rotary_gradient": lambda dy, cos, sin: jax.vjp(lambda x: turned(x, cos, sin), dy)[1](dy)[0],
    "activation": lambda hidden: activate(hidden, 3),
    "activation_gradient": lambda hidden, dy: jax.vjp(lambda x: activate(x, 3), hidden)[1](dy)[0],
    "rows": lambda zero, x: gathered(x[: ROWS // 2]),
    "rows_gradient": lambda zero, dy: jax.vjp(gathered, jnp.zeros((ROWS // 2, WIDTH)))[1](dy)[0],
    "layout": lambda x: x.T.reshape(-1),
}


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_bodies_compute_what_they_are_named_after(kind):
    found, expected = (jax.tree.leaves(run(*operands(kind))) for run in (BODIES[kind].run, EXPECTED[kind]))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_every_kind_is_measured():
    assert tuple(BODIES) == ELEMENTWISE


@pytest.mark.parametrize("kind", ["norm", "norm_gradient", "rotary", "activation", "layout"])
def test_counted_are_operands_and_results(kind):
    """Each once, scales and angles aside."""
    given = operands(kind)
    results = jax.tree.leaves(BODIES[kind].run(*given))
    arrays = sum(array.size for array in (*given, *results) if array.size >= ROWS * WIDTH) / (ROWS * WIDTH)
    assert BODIES[kind].num_arrays == arrays
