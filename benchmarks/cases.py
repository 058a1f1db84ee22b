"""What the benchmarks share: models to measure, random batches, and a plain step to compare with."""

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from meshes.mesh import build_mesh
from models import transformer
from models.config import DenseFFN, GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN
from models.layers import LayerContext, rotation
from piperjax.planner.plan import Plan
from piperjax.runtime.dispatch import make_experts
from piperjax.runtime.executor import Executor
from piperjax.runtime.grouped_matmul import grouped_matmul
from piperjax.runtime.passes import MEMORY_MODES
from piperjax.schedules import registry

EXECUTOR_FIELDS = {field.name for field in fields(Executor)}


def moe_model(
    *, num_layers=4, d_model=64, d_ff=64, num_experts=8, experts_per_token=2, vocab_size=256
) -> ModelConfig:
    """A model whose layers are all alike."""
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=4, head_dim=d_model // 4)
    ffn = MoEFFN(num_experts=num_experts, experts_per_token=experts_per_token, d_ff=d_ff)
    layer = LayerConfig(attention=attention, ffn=ffn)
    return ModelConfig(name="benchmark", d_model=d_model, vocab_size=vocab_size, layers=(layer,) * num_layers)


def dense_model(*, num_layers=4, d_model=64, d_ff=256, vocab_size=256) -> ModelConfig:
    """The same without experts."""
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=4, head_dim=d_model // 4)
    layer = LayerConfig(attention=attention, ffn=DenseFFN(d_ff=d_ff))
    return ModelConfig(name="benchmark", d_model=d_model, vocab_size=vocab_size, layers=(layer,) * num_layers)


def make_plan(
    config: ModelConfig,
    *,
    pipe=1,
    data=1,
    expert=1,
    num_microbatches=8,
    microbatch_size=1,
    **options,
) -> Plan:
    """A plan of 1F1B with stages of equal length where possible; `microbatch_size` is that of one device."""
    options = {"schedule": "one_f_one_b", "seq_len": 64, "expert_factors": (1, 1, expert)} | options
    stages = pipe * registry.chunks_of(options["schedule"], options.get("num_chunks", 0))
    quotient, rest = divmod(config.num_layers, stages)
    options.setdefault("layers_per_stage", tuple(quotient + (stage < rest) for stage in range(stages)))
    options.setdefault("batch_size", num_microbatches * microbatch_size * data * expert)
    return Plan(pipe=pipe, data=data, expert=expert, num_microbatches=num_microbatches, **options)


def make_executor(config: ModelConfig, **options) -> Executor:
    """An executor of such a plan on the first devices; options that are no plan's are its own."""
    own = {name: options.pop(name) for name in EXECUTOR_FIELDS & options.keys()}
    plan = make_plan(config, **options)
    mesh = build_mesh(
        pipe=plan.pipe,
        data=plan.data,
        expert_factors=plan.expert_factors,
        devices=jax.devices()[: plan.num_devices],
    )
    return Executor(config, plan, mesh, **own)


def random_batch(config: ModelConfig, plan: Plan, *, seed=0) -> dict[str, np.ndarray]:
    """One document per sequence, random tokens."""
    rng = np.random.default_rng(seed)
    shape = (plan.num_microbatches, plan.microbatch_size, plan.seq_len)
    return {
        "tokens": rng.integers(0, config.vocab_size, shape).astype(np.int32),
        "targets": rng.integers(0, config.vocab_size, shape).astype(np.int32),
        "weights": np.ones(shape, np.float32),
        "positions": np.broadcast_to(np.arange(plan.seq_len, dtype=np.int32), shape).copy(),
        "segment_ids": np.ones(shape, np.int32),
    }


def router_bias(config: ModelConfig) -> np.ndarray:
    """No bias."""
    return np.zeros((len(config.moe_layers), config.num_experts), np.float32)


def abstract_batch(executor: Executor) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch, for compiling without running."""
    batch = random_batch(executor.config, executor.plan)
    return {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=executor.batch_sharding) for k, v in batch.items()
    }


def compiled_step(executor: Executor) -> jax.stages.Compiled:
    """The gradient step, compiled and not run."""
    arguments = (executor.abstract_params, router_bias(executor.config), abstract_batch(executor))
    return jax.jit(executor.gradients).lower(*arguments).compile()


def plain_step(config: ModelConfig, *, memory_mode: str = "layer"):
    """A jitted gradient-accumulation loop without any executor: scan over microbatches, scan over layers, jax.grad.

    Uses the same layers, the same experts and the same loss, and recomputes in backward what the executor's memory
    mode does, by `jax.checkpoint`. All layers must be of one kind. Returns a function of (logical params,
    router_bias, batch) -> (gradients, loss).
    """
    (kind,) = config.kinds
    layer = transformer.layer_function(config, kind)
    experts = make_experts("flat", (), 0.0)
    mode = MEMORY_MODES[memory_mode]

    def microbatch_loss(params, bias, rows, scale, num_microbatches):
        turn = rotation(rows["positions"], *config.kinds[kind].attention.rotary)

        def body(carry, inputs):
            x, aux = carry
            weights, layer_bias = inputs
            context = LayerContext(
                rotation=lambda *_: turn,
                segment_ids=rows["segment_ids"],
                router_bias=layer_bias,
                experts=experts,
                grouped_matmul=grouped_matmul,
                all_sum=lambda array: array,
                num_shards=1,
            )
            y, layer_aux, _ = layer(weights, x, context)
            return (y, aux + layer_aux), None

        if mode.policy is not None:
            body = jax.checkpoint(body, policy=mode.policy)

        def layers(x, weights):
            biases = bias if config.moe_layers else jnp.zeros((config.num_layers, 0))
            return lax.scan(body, (x, jnp.zeros((), jnp.float32)), (weights, biases))[0]

        if mode.by_stage:
            layers = jax.checkpoint(layers)
        x = params["embedding"][rows["tokens"]]
        x, aux = layers(x, params["layers"][kind])
        x = transformer.rms_norm(x, params["final_norm"], config.norm_eps)
        logits = jnp.einsum("bsd,vd->bsv", x, params["head"])
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, rows["targets"][..., None], axis=-1)[..., 0]
        loss = (rows["weights"] * (normaliser - target)).sum() * scale
        return loss + aux / num_microbatches, loss

    @jax.jit
    def step(params, bias, batch):
        num_microbatches = batch["tokens"].shape[0]
        scale = 1.0 / batch["weights"].sum()

        def accumulate(carry, rows):
            grads, total = carry
            new, loss = jax.grad(microbatch_loss, has_aux=True)(params, bias, rows, scale, num_microbatches)
            return (jax.tree.map(jnp.add, grads, new), total + loss), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        (grads, loss), _ = lax.scan(accumulate, (zeros, jnp.zeros((), jnp.float32)), batch)
        return grads, loss

    return step
