"""This file is steps whose memory is predicted and compiled: a scaled model, a plan, and a dtype."""

import dataclasses
from collections.abc import Callable, Iterator

from models.config import DenseFFN, GroupedQueryAttention, LayerConfig, ModelConfig
from models.presets import preset
from piperjax.planner.dispatchers import Way
from piperjax.planner.plan import Plan
from piperjax.schedules import registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One step to compile."""

    model: ModelConfig
    plan: Plan
    dtype: str

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that say which case it is."""
        plan = self.plan
        return (
            self.model.name,
            f"{plan.pipe}x{plan.data}x{plan.expert}",
            plan.schedule,
            "-".join(map(str, plan.layers_per_stage)),
            plan.memory_mode,
            plan.vocabulary,
            "overlap" if plan.overlap else "",
            _capacity(plan),
            plan.gradient_dtype,
            str(Way(plan.dispatch, plan.dispatch_chunks)),
            f"{plan.num_microbatches}x{plan.microbatch_size // (plan.data * plan.expert)}x{plan.seq_len}",
            self.dtype,
        )


COLUMNS = (
    *(
        "model",
        "pipe x data x expert",
        "schedule",
        "layers per stage",
        "memory mode",
        "vocabulary",
        "overlap",
    ),
    *("capacity", "gradients", "dispatch", "microbatches x sequences x length", "dtype"),
)


def _capacity(plan: Plan) -> str:
    if not plan.capacity_factor:
        return "dropless"
    return f"{plan.capacity_factor:g}" + (" passes" if plan.overflow == "passes" else "")


def scaled(
    name: str, *, d_model: int = 320, num_layers: int = 4, num_experts: int = 8, **changes
) -> ModelConfig:
    """A preset at a size that compiles quickly: widths in proportion to `d_model`, fewer layers and experts."""
    model = preset(name)
    ratio = d_model / model.d_model

    def width(features: int) -> int:
        return max(16, round(features * ratio / 16) * 16) if features else 0

    def layer(one: LayerConfig) -> LayerConfig:
        groups, qk_norm, bias = 1, "none", "none"
        if isinstance(one.attention, GroupedQueryAttention):
            groups = min(4, one.attention.num_heads // one.attention.num_kv_heads)
            qk_norm, bias = one.attention.qk_norm, one.attention.bias
        attention = GroupedQueryAttention(
            num_heads=4, num_kv_heads=4 // groups, head_dim=d_model // 4, qk_norm=qk_norm, bias=bias
        )
        ffn = one.ffn
        if isinstance(ffn, DenseFFN):
            return LayerConfig(attention=attention, ffn=dataclasses.replace(ffn, d_ff=width(ffn.d_ff)))
        # So few experts are not enough for groups.
        router = dataclasses.replace(ffn.router, num_groups=1, groups_per_token=1)
        ffn = dataclasses.replace(
            ffn,
            router=router,
            num_experts=num_experts,
            experts_per_token=min(ffn.experts_per_token, num_experts // 2),
            d_ff=width(ffn.d_ff),
            shared_d_ff=width(ffn.shared_d_ff),
            dense_residual_d_ff=width(ffn.dense_residual_d_ff),
        )
        return LayerConfig(attention=attention, ffn=ffn)

    layers = tuple(layer(one) for one in model.layers[:num_layers])
    fields = {"vocab_size": 2048, **changes}
    return dataclasses.replace(model, d_model=d_model, layers=layers, **fields)


def case(model: ModelConfig, mesh: tuple[int, int, int] = (1, 1, 1), **options) -> Case:
    """A case from a mesh (pipe, data, expert) and whatever differs from the usual."""
    pipe, data, expert = mesh
    factors = options.pop("expert_factors", (1, 1, expert))
    dtype, sequences = options.pop("dtype", "bfloat16"), options.pop("sequences", 2)
    schedule = registry.canonical(options.pop("schedule", "one_f_one_b"))
    num_microbatches = options.pop("num_microbatches", 2 * pipe if pipe > 1 else 4)
    stages = pipe * registry.chunks_of(schedule, options.get("num_chunks", 0))
    quotient, rest = divmod(model.num_layers, stages)
    default_stages = tuple(quotient + (stage < rest) for stage in range(stages))
    plan = Plan(
        pipe=pipe,
        data=data,
        expert=expert,
        expert_factors=factors,
        schedule=schedule,
        num_microbatches=num_microbatches,
        layers_per_stage=options.pop("layers_per_stage", default_stages),
        batch_size=num_microbatches * sequences * data * expert,
        seq_len=options.pop("seq_len", 128),
        **options,
    )
    return Case(model=model, plan=plan, dtype=dtype)


def in_both_dtypes(case: Callable[..., Case], scaled: Callable[..., ModelConfig]) -> Iterator[Case]:
    """Families whose memory differs most, of a size: `case` and `scaled`, or what takes their place."""
    for dtype in ("float32", "bfloat16"):
        yield case(scaled("deepseek_moe_16b", num_layers=6, num_experts=16), (2, 1, 4), dtype=dtype)
        yield case(scaled("arctic", num_layers=4), (2, 2, 2), dtype=dtype)
        yield case(scaled("small", embeddings="tied"), (1, 4, 1), dtype=dtype)
