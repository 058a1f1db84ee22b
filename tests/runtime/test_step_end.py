"""What is done once per step: sums of gradients in 16 bits are those in 32, rounded."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.cases import compiled_step, make_executor, moe_model
from piperjax.runtime.step_end import added
from tests.runtime.executor_cases import executor_for, gradients_of, model, plan_for, reference

# Half of the distance between neighbours of 8 bits.
ROUNDING = 2.0**-9


def found_gradients(plan, dtype):
    config = model(num_layers=plan.num_layers)
    executor = executor_for(config, dataclasses.replace(plan, gradient_dtype=dtype))
    grads, _ = gradients_of(executor)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(executor.to_logical(grads)))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def is_wide(path):
    return re.search(r"norm'|bias'|'router'|'embedding'", path) is not None


def rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(M=8), marks=pytest.mark.slow),
        dict(schedule="zb_h1", expert=2, data=2, M=8, vocabulary="whole"),
        pytest.param(
            dict(schedule="interleaved", layers_per_stage=(1, 1, 1, 1), expert=2, data=2, dispatch_chunks=2),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one_f_one_b", "zb_h1", "interleaved"],
)
def test_sums_in_16_bits_equal_one_device_but_for_their_roundings(options):
    plan = plan_for(model(), pipe=2, **options)
    narrow = found_gradients(plan, "bfloat16")
    truths = jax.tree_util.tree_leaves_with_path(reference(model(), plan.num_microbatches)[3])
    roundings = plan.num_microbatches + plan.data * plan.expert
    for path, truth in ((jax.tree_util.keystr(path), leaf) for path, leaf in truths):
        assert narrow[path].dtype == (jnp.float32 if is_wide(path) else jnp.bfloat16), path
        error = rms(narrow[path].astype(np.float32) - truth) / rms(truth)
        # Roundings are independent of one another; norms, routers and the embedding have none.
        assert error <= (1e-5 if is_wide(path) else ROUNDING * np.sqrt(roundings)), f"{path}: {error:.2e}"
        # Of so many, some differ from the sum rounded once: the sums themselves were narrow.
        assert is_wide(path) or error > ROUNDING, f"{path}: {error:.2e}"


# Every day its sums are compared above, and what rounds them below.
@pytest.mark.slow
def test_of_one_microbatch_gradients_are_those_in_float32_rounded_once():
    plan = plan_for(model(num_layers=2), M=1)
    wide, narrow = (found_gradients(plan, dtype) for dtype in ("float32", "bfloat16"))
    for path, leaf in narrow.items():
        # Two programs, which the compiler may fuse in two ways: the last bits in float32 may differ before they round.
        slack = 1e-6 * np.abs(wide[path]).max()
        least, most = ((wide[path] + sign * slack).astype(leaf.dtype) for sign in (-1, 1))
        assert np.all((least <= leaf) & (leaf <= most)), path


def test_a_sum_is_rounded_once():
    total, gradient = jnp.bfloat16(256), jnp.float32(1.5)
    # To neighbours 2 apart: rounded first, the gradient of 1.0039 would be 1, and the sum stay 256.
    assert added(total, gradient) == 258 and added(total, gradient).dtype == jnp.bfloat16
    assert added(total, jnp.float32(1.0039)) == 258
    assert added(jnp.float32(256), gradient) == 257.5


def test_accumulators_of_a_compiled_step_are_as_narrow_as_the_plan_says():
    def carried(dtype):
        config, options = moe_model(num_layers=2), dict(schedule="zb_h1", gradient_dtype=dtype)
        executor = make_executor(config, pipe=2, num_microbatches=4, **options)
        text = compiled_step(executor).as_text()
        # That over ticks carries most.
        loop = max(re.findall(r"= (\(.*) while\(", text), key=len)
        experts = jax.tree.leaves(executor.abstract_params["layers"]["moe"]["ffn"]["experts"])
        shapes = {",".join(map(str, (1, *leaf.shape[1:]))) for leaf in experts}
        return [sum(loop.count(f"{dtype}[{shape}]") for shape in shapes) for dtype in ("f32", "bf16")]

    (wide, none), (weights, narrow) = carried("float32"), carried("bfloat16")
    assert none == 0 and narrow == 2 and wide - weights == 2
