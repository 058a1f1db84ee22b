"""The GPU kernels, interpreted on CPU, equal the block loop; their block table covers every row once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piperjax.runtime import grouped_matmul_triton as triton
from piperjax.runtime.grouped_matmul import grouped_matmul, multiply_blocks, weight_gradient_blocks

SHAPES = {
    "uneven, with dead rows": (100, 20, 33, [10, 0, 40, 7]),
    "full tiles": (256, 64, 128, [128, 128]),
    "several tiles each way": (300, 140, 150, [150, 20, 129]),
    "a block past the end": (150, 17, 16, [149, 0]),
    "nothing": (50, 16, 16, [0, 0, 0]),
}


def arrays(name, dtype):
    R, D, F, sizes = SHAPES[name]
    rng = np.random.default_rng(R)
    x, w, dy = (rng.normal(size=shape) for shape in ((R, D), (len(sizes), D, F), (R, F)))
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    return *(jnp.asarray(array, dtype) for array in (x, w, dy)), jnp.asarray(sizes, jnp.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_equal_the_loop(name, dtype):
    x, w, dy, sizes = arrays(name, dtype)
    pairs = [
        (
            triton.multiply(rows, w, sizes, transposed=transposed, interpret=True),
            multiply_blocks(rows, w, sizes, transposed=transposed),
        )
        for rows, transposed in ((x, False), (dy, True))
    ]
    pairs.append((triton.weight_gradient(x, dy, sizes, interpret=True), weight_gradient_blocks(x, dy, sizes)))
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype == dtype
        found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
        tolerance = 1e-5 if dtype == "float32" else 1e-2  # one rounding to bfloat16
        assert np.abs(found - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-30)


@pytest.mark.parametrize("block", [16, 32, 128])
def test_blocks_cover_every_row_once_and_lie_in_one_group(block):
    rng = np.random.default_rng(block)
    R = 500
    for sizes in (*rng.multinomial(R, rng.dirichlet(np.full(6, 0.5)), size=10), np.zeros(6, int)):
        sizes = sizes * (rng.uniform(size=6) < 0.8)
        group, first, end = map(
            np.asarray, triton.block_table(jnp.asarray(sizes, jnp.int32), num_rows=R, block=block)
        )
        owner = np.repeat(np.arange(len(sizes) + 1), [*sizes, R - sizes.sum()])
        covered = np.zeros(R, int)
        for g, start, stop in zip(group, first, end, strict=True):
            rows = slice(start, min(start + block, stop))
            covered[rows] += 1
            assert (owner[rows] == g).all()
        assert (covered == 1).all()


def test_which_dtypes_have_kernels():
    assert all(triton.supports(jnp.dtype(name)) for name in ("float32", "bfloat16", "float16"))
    assert not triton.supports(jnp.dtype("float64"))


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_lower(platform, dtype):
    x, w, dy, sizes = arrays("several tiles each way", dtype)
    step = jax.jit(lambda x, w, dy: jax.vjp(grouped_matmul, x, w, sizes)[1](dy)[:2])
    text = step.trace(x, w, dy).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("xla.gpu.triton") == 2  # both gradients; the result itself is not asked for
