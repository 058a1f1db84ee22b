"""What tests of the executor share: a small model, plans, and the comparison with one device.

Truth is `models.transformer.reference_step` under plain `jax.grad`: no pipeline, no dispatch, no sorting.
Slot buffers start as NaN, so anything read before it was written would show.
"""

import functools
from dataclasses import replace

import jax
import numpy as np

from meshes.axes import EXPERT
from meshes.mesh import build_mesh
from models import transformer
from models.config import DenseFFN, GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN, Router
from piperjax.planner.plan import Plan
from piperjax.runtime.executor import Executor
from piperjax.runtime.lint import check_no_deadlock, collectives
from piperjax.schedules import registry

BATCH_SIZE, SEQ_LEN = 64, 12


def model(*, dense_layers=1, num_layers=4, embeddings="untied", balance="aux_loss", score="softmax"):
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="head")
    router = Router(balance=balance, score=score, aux_loss_coefficient=0.05, z_loss_coefficient=0.01)
    moe = MoEFFN(num_experts=8, experts_per_token=2, d_ff=24, shared_d_ff=16, router=router)
    layers = [LayerConfig(attention=attention, ffn=DenseFFN(d_ff=40))] * dense_layers
    layers += [LayerConfig(attention=attention, ffn=moe)] * (num_layers - dense_layers)
    # 61 does not divide by the pipe ranks: the last vocabulary shard is padded.
    return ModelConfig(name="test", d_model=24, vocab_size=61, layers=tuple(layers), embeddings=embeddings)


def plan_for(
    config, *, schedule="one_f_one_b", pipe=1, expert=1, data=1, M=4, layers_per_stage=None, **others
):
    quotient, rest = divmod(config.num_layers, pipe)
    stages = layers_per_stage or tuple(quotient + (stage < rest) for stage in range(pipe))
    return Plan(
        pipe=pipe,
        data=data,
        expert=expert,
        expert_factors=(1, 1, expert) if expert < 4 else (1, 2, expert // 2),
        schedule=schedule,
        num_microbatches=M,
        layers_per_stage=stages,
        batch_size=BATCH_SIZE,
        seq_len=SEQ_LEN,
        **others,
    )


def executor_for(config, plan, **options):
    mesh = build_mesh(
        pipe=plan.pipe,
        data=plan.data,
        expert_factors=plan.expert_factors,
        devices=jax.devices()[: plan.num_devices],
    )
    return Executor(config, plan, mesh, buffer_fill=float("nan"), **options)


@functools.cache
def batch_for(vocab_size, M):
    rng = np.random.default_rng(7)
    shape = (M, BATCH_SIZE // M, SEQ_LEN)
    flat = (BATCH_SIZE, SEQ_LEN)  # The same sequences for every M.
    segments = 1 + np.cumsum(rng.random(flat) < 0.15, axis=-1)
    positions = np.zeros(flat, int)
    for t in range(1, SEQ_LEN):
        positions[:, t] = np.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
    batch = {
        "tokens": rng.integers(0, vocab_size, flat),
        "targets": rng.integers(0, vocab_size, flat),
        "positions": positions,
        "segment_ids": segments,
    }
    batch = {name: array.astype(np.int32).reshape(shape) for name, array in batch.items()}
    return batch | {"weights": (rng.random(flat) < 0.9).astype(np.float32).reshape(shape)}


def router_bias_for(config):
    shape = (len(config.moe_layers), config.num_experts)
    return np.random.default_rng(3).normal(0, 0.05, shape).astype(np.float32)


@functools.cache
def initial_params(config, seed):
    # Compiled, as the executor does it: operation by operation the last bit may differ.
    with jax.enable_x64(False):
        return jax.device_get(jax.jit(lambda: transformer.init_params(config, seed))())


def initial_params_in(config, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), initial_params(config, 0))


@functools.cache
def reference(config, M, dtype="float32"):
    """(cross entropy, aux loss, load, gradients) of one device: sums over microbatches of what is compiled once."""
    params, bias, batch = (
        initial_params_in(config, dtype),
        router_bias_for(config),
        batch_for(config.vocab_size, M),
    )

    def loss(params, rows, share):
        step = transformer.reference_step(config, params, bias, rows)
        cross_entropy, aux_loss = share * step.cross_entropy, step.aux_loss / M
        return cross_entropy + aux_loss, (cross_entropy, aux_loss, step.load)

    gradient, parts = jax.jit(jax.grad(loss, has_aux=True)), []
    for microbatch in range(M):
        rows = {name: array[microbatch : microbatch + 1] for name, array in batch.items()}
        share = np.asarray(rows["weights"].sum(dtype=float) / batch["weights"].sum(dtype=float), dtype)
        parts.append(jax.device_get(gradient(params, rows, share)))
    grads, (cross_entropy, aux_loss, load) = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    return float(cross_entropy), float(aux_loss), load, grads


def gradients_of(executor, placement=None):
    """(gradients, statistics) of a step that was seen not to deadlock before it ran."""
    config, batch = executor.config, batch_for(executor.config.vocab_size, executor.plan.num_microbatches)
    # Moving parameters into place compiles in a fraction of the time that drawing them there takes; that these are the
    # same is a test of its own.
    params = executor.from_logical(initial_params_in(config, executor.master_dtype), placement)
    batch = jax.device_put(batch, executor.batch_sharding)
    arguments = (params, router_bias_for(config), batch, placement)
    traced = jax.jit(executor.gradients).trace(*arguments)
    wide = {axis for axis, size in executor.mesh.shape.items() if size > 1}  # Over others nothing diverges.
    found = [replace(one, divergent_axes=one.divergent_axes & wide) for one in collectives(traced.jaxpr)]
    assert not [one for one in found if one.may_deadlock]
    joined = {one.name for one in found if one.axes & set(EXPERT)}
    # Rows travel, by permutes if not by all-to-all: what was looked through was the program.
    assert joined & {"all_to_all", "ppermute"} or executor.plan.expert == 1 or not config.moe_layers
    return traced.lower().compile()(*arguments)


def check_equal(config, plan, *, tolerance, dtype="float32", placement=None):
    executor = executor_for(config, plan, dtype=dtype, master_dtype=dtype)
    grads, stats = gradients_of(executor, placement)
    cross_entropy, aux_loss, load, expected = reference(config, plan.num_microbatches, dtype)
    assert abs(float(stats.loss) - cross_entropy) <= tolerance * cross_entropy
    assert abs(float(stats.aux_loss) - aux_loss) <= tolerance * max(aux_loss, 1e-3)
    assert np.array_equal(np.asarray(stats.load), load)
    assert plan.overflow == "passes" or float(stats.overflow) == 0
    found = jax.device_get(executor.to_logical(grads, placement))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, leaf), truth in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        error = np.abs(leaf - truth).max() / np.abs(truth).max()
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"


def check_schedule(
    schedule, memory_mode, *, pipe=2, expert=2, data=2, M=None, tolerance=1e-5, vocabulary="split", **options
):
    stages = pipe * registry.chunks_of(schedule)
    config = model(num_layers=max(4, stages), **options)
    quotient, rest = divmod(config.num_layers, stages)
    plan = plan_for(
        config,
        schedule=schedule,
        memory_mode=memory_mode,
        pipe=pipe,
        expert=expert,
        data=data,
        M=M or (8 if schedule == "dualpipe_v" or pipe > 2 else 4),
        layers_per_stage=tuple(quotient + (stage < rest) for stage in range(stages)),
        vocabulary=vocabulary,
    )
    check_equal(config, plan, tolerance=tolerance)


def abstract_arguments(executor):
    config, plan = executor.config, executor.plan
    batch = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=executor.batch_sharding)
        for name, array in batch_for(config.vocab_size, plan.num_microbatches).items()
    }
    return executor.abstract_params, router_bias_for(config), batch


def check_cannot_deadlock(schedule, mesh, memory_mode, **options):
    pipe, expert, data = mesh
    stages = pipe * registry.chunks_of(schedule)
    config = model(num_layers=stages)
    plan = plan_for(
        config, schedule=schedule, pipe=pipe, expert=expert, data=data, M=8, memory_mode=memory_mode,
        layers_per_stage=(1,) * stages, **options,
    )  # fmt: skip
    executor = executor_for(config, plan)
    counts = check_no_deadlock(jax.make_jaxpr(executor.gradients)(*abstract_arguments(executor)))
    assert sum(number for (name, _), number in counts.items() if name == "all_to_all") > 0 or expert == 1
    evaluation = jax.make_jaxpr(executor.evaluate)(*abstract_arguments(executor))
    check_no_deadlock(evaluation)
