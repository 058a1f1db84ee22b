"""The grouped matmul equals a masked matmul per group, whatever lies in rows past the groups."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meshes.axes import AXES, BATCH
from meshes.mesh import build_mesh
from piperjax.runtime.grouped_matmul import grouped_matmul

ROOT = Path(__file__).resolve().parents[2]
# Rows, and sizes of groups: some empty, one with everything, none with anything, none of them multiples of a block.
GROUPS = {
    "uneven": (100, [10, 0, 37, 1, 9]),
    "full": (64, [13, 51]),
    "one has all": (70, [0, 70, 0]),
    "nothing": (20, [0, 0]),
    "one row": (1, [1]),
    "fewer rows than a block": (7, [3, 2]),
    "larger than a block": (700, [300, 129, 128, 31]),
    "a small part is live": (4096, [3, 0, 5, 2]),
}


def arrays(R, sizes, *, D=12, F=9, dtype="float32", dead=np.nan):
    """x, w, dy and group sizes; rows of x and dy past the groups are `dead`."""
    rng = np.random.default_rng(R)
    x, w, dy = (rng.normal(size=shape) for shape in ((R, D), (len(sizes), D, F), (R, F)))
    x[sum(sizes) :] = dy[sum(sizes) :] = dead
    return *(jnp.asarray(array, dtype) for array in (x, w, dy)), jnp.asarray(sizes, jnp.int32)


def truth(x, w, dy, sizes):
    """Result and gradients in float64 by numpy, group by group."""
    x, w, dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for g, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[g] = x[rows] @ w[g], dy[rows] @ w[g].T, x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


def assert_close(found, wanted, relative):
    for one, other in zip(found, wanted, strict=True):
        one = np.asarray(one, np.float64)
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= relative * max(np.abs(other).max(), 1e-30)  # NaN fails too


@jax.jit
def value_and_gradients(x, w, dy, sizes):
    y, vjp = jax.vjp(grouped_matmul, x, w, sizes)
    dx, dw, _ = vjp(dy)
    return y, dx, dw


@pytest.mark.parametrize("groups", GROUPS)
def test_equals_numpy_and_never_reads_dead_rows(groups):
    R, sizes = GROUPS[groups]
    given = arrays(R, sizes)
    assert_close(value_and_gradients(*given), truth(*given), 1e-5 / 4)


@pytest.mark.parametrize(("dtype", "relative"), [("bfloat16", 1e-2), ("float16", 2e-3), ("float64", 1e-14)])
def test_dtypes(dtype, relative):
    with jax.enable_x64(dtype == "float64"):
        given = arrays(300, [100, 0, 77, 90], dtype=dtype)
        found = value_and_gradients(*given)
        assert {str(array.dtype) for array in found} == {dtype}
        assert_close(found, truth(*given), relative)


def test_bfloat16_rounds_once():
    x, w, dy, sizes = arrays(2048, [2048], D=256, dtype="bfloat16")
    _, _, dw = value_and_gradients(x, w, dy, sizes)
    wide = np.asarray(x, np.float32).T @ np.asarray(dy, np.float32)
    # Added up over 16 blocks in bfloat16, almost no sum would be right to the last bit.
    assert (
        np.mean(np.asarray(dw[0], np.float32) == np.asarray(jnp.asarray(wide, jnp.bfloat16), np.float32))
        > 0.99
    )


@pytest.mark.parametrize("shared", ["own weights", "one copy of the weights"])
def test_varies_over_mesh_axes_inside_scan_and_cond(shared):
    mesh = build_mesh(pipe=2, data=1, expert_factors=(1, 2, 2))
    R, G, D, F = 40, 3, 6, 5
    axes = ("pipe", *BATCH)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8 * R, D)), jnp.float32)
    own = shared == "own weights"
    w = jnp.asarray(rng.normal(size=(8 * G if own else G, D, F)), jnp.float32)
    sizes = jnp.asarray(rng.integers(0, R // G, (8 * G,)), jnp.int32)

    def per_device(multiply, x, w, sizes):
        def step(total, scale):
            y = lax.cond(
                sizes[0] > 3,  # differs between devices
                lambda: multiply(x * scale, w, sizes),
                lambda: multiply(x, w * scale, sizes),
            )
            return total + jnp.sum(jnp.square(y)), None

        start = lax.pcast(jnp.zeros(()), AXES, to="varying")
        return lax.scan(step, start, jnp.asarray([1.0, 2.0]))[0][None]

    def loss(multiply, x, w, sizes):
        body = jax.shard_map(
            functools.partial(per_device, multiply),
            mesh=mesh,
            in_specs=(jax.P(axes), jax.P(axes) if own else jax.P(), jax.P(axes)),
            out_specs=jax.P(axes),
        )
        return body(x, w, sizes).sum()

    def plain(x, w, sizes):
        group = (jnp.arange(R)[:, None] >= jnp.cumsum(sizes)[None, :]).sum(1)
        products = jnp.einsum("rd,rdf->rf", x, w[jnp.minimum(group, G - 1)], precision="highest")
        return jnp.where((group < G)[:, None], products, 0)

    found, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(loss, multiply), argnums=(0, 1)))(x, w, sizes)
        for multiply in (grouped_matmul, plain)
    )
    assert_close(jax.tree.leaves(found), [np.asarray(a) for a in jax.tree.leaves(wanted)], 1e-5)


def test_nothing_large_is_copied_in_the_loops():
    R, G, D, F = 512, 8, 64, 128
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((R, D), (G, D, F), (R, F))]
    program = value_and_gradients.lower(*shapes, jax.ShapeDtypeStruct((G,), jnp.int32))
    text = program.compile().as_text()
    assert " while(" in text
    copied = [
        np.prod([int(n) for n in match[1].split(",")])
        for match in re.finditer(r"= \w+\[([\d,]+)\]\S* copy\(", text)
    ]
    assert max(copied, default=0) < 16 * D, "a loop copies what it should change in place"
    assert not re.search(r"\bscatter\(", text)


def test_temporary_memory_does_not_grow_with_groups_or_rows():
    def temporary_bytes(R, G):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((R, 64), (G, 64, 32))]
        program = jax.jit(grouped_matmul).lower(*shapes, jax.ShapeDtypeStruct((G,), jnp.int32))
        return program.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(65536, 64) <= temporary_bytes(4096, 4) + 4096 < 200_000


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm"])
def test_one_traced_step_lowers_for_every_platform(platform):
    mesh = build_mesh(pipe=2, data=1, expert_factors=(1, 2, 2))
    spec = jax.P(("pipe", *BATCH))

    @jax.jit
    def step(x, w, sizes):
        def loss(x, w, sizes):
            return jnp.sum(jnp.square(grouped_matmul(x, w, sizes)))[None]

        total = jax.shard_map(loss, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
        return jax.grad(lambda x, w: total(x, w, sizes).sum(), argnums=(0, 1))(x, w)

    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8 * 256, 64), (8 * 4, 64, 96))]
    text = (
        step.trace(*shapes, jax.ShapeDtypeStruct((8 * 4,), jnp.int32))
        .lower(lowering_platforms=(platform,))
        .as_text()
    )
    kernels, loops = (
        len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", text)),
        text.count("stablehlo.while"),
    )
    if platform == "cpu":
        assert (kernels, loops) == (0, 6)
    else:
        assert (kernels, loops) == (3, 0)  # result, gradient of x, gradient of w


def test_several_platforms_lower_into_one_module():
    x, w, _, sizes = arrays(64, [20, 30])
    traced = jax.jit(grouped_matmul).trace(x, w, sizes)
    text = traced.lower(lowering_platforms=("cuda", "rocm")).as_text()
    assert text.count("xla.gpu.triton") == 2


def test_float64_has_no_kernel_and_loops_everywhere():
    with jax.enable_x64(True):
        x, w, _, sizes = arrays(64, [20, 30], dtype="float64")
        text = jax.jit(grouped_matmul).trace(x, w, sizes).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" not in text
    assert "stablehlo.while" in text


def test_pallas_is_not_imported_without_a_gpu():
    program = """
import sys, jax.numpy as jnp
from piperjax.runtime.grouped_matmul import grouped_matmul
grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.asarray([1, 2], jnp.int32)).block_until_ready()
sys.exit(any(name.startswith("jax.experimental.pallas") for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("shapes", "dtypes", "says"),
    [
        (((4, 3), (2, 4, 5), (2,)), "ffi", r"got \[4, 3\], \[2, 4, 5\] and \[2\]"),
        (((4, 3), (2, 3, 5), (3,)), "ffi", r"got \[4, 3\], \[2, 3, 5\] and \[3\]"),
        (((4,), (2, 4, 5), (2,)), "ffi", r"takes x \[R, D\], w \[G, D, F\] and group_sizes \[G\], got \[4\]"),
        (((4, 3), (2, 3, 5), (2,)), "fei", "got float32, float16 and int32; cast them first"),
        (((4, 3), (2, 3, 5), (2,)), "iii", "one floating dtype"),
        (((4, 3), (2, 3, 5), (2,)), "fff", "group_sizes of int32"),
    ],
)
def test_mistakes_are_named(shapes, dtypes, says):
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(grouped_matmul, *(np.zeros(s, d) for s, d in zip(shapes, dtypes, strict=True)))
