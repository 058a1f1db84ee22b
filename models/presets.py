"""This file is the list of named models: each function returns a `ModelConfig`, `preset(name)` finds one.

Published models follow their config.json on Hugging Face; where a model has a feature that `ModelConfig`
cannot express, the docstring says what is left out.
"""

import difflib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from models.config import (
    DenseFFN,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    ModelConfig,
    MoEFFN,
    Router,
)

Attention = GroupedQueryAttention | LatentAttention


@lru_cache(maxsize=64)
def preset(name: str) -> ModelConfig:
    """Returns the named model, the same object every time: what is remembered by model need not compare layers.

    Raises:
      ValueError: if there is none of that name; the sentence names the nearest one and lists all.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no model named '{name}'; did you mean '{nearest}'? There are {', '.join(PRESETS)}")
    return PRESETS[name]()


def named_model(name: str) -> ModelConfig:
    """Returns a preset, or the model described in a JSON file.

    Raises:
      ValueError: if there is no such model, or the file cannot be read.
    """
    if not name.endswith(".json"):
        return preset(name)
    try:
        return ModelConfig.from_dict(json.loads(Path(name).read_text()))
    except OSError as error:
        raise ValueError(f"cannot read model file {name}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"model file {name} is not valid JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"model file {name}: {error}") from error


def tiny() -> ModelConfig:
    """2.8M parameters, 1.1M active, over bytes and an end of document; trains in minutes on 2 CPU cores."""
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=32)
    router = Router(z_loss_coefficient=0.001)
    moe = MoEFFN(num_experts=8, experts_per_token=2, d_ff=256, router=router)
    layers = _layers(attention, DenseFFN(d_ff=512), moe, num_dense=1, num_layers=4)
    return ModelConfig(name="tiny", d_model=128, vocab_size=257, layers=layers)


def small() -> ModelConfig:
    """102M parameters, 35M active; 16M are the tied embedding of a 32,000-token vocabulary."""
    attention = GroupedQueryAttention(num_heads=8, num_kv_heads=4, head_dim=64, qk_norm="head")
    router = Router(z_loss_coefficient=0.001)
    moe = MoEFFN(num_experts=16, experts_per_token=2, d_ff=448, router=router)
    layers = _layers(attention, DenseFFN(d_ff=1536), moe, num_dense=1, num_layers=8)
    return ModelConfig(name="small", d_model=512, vocab_size=32_000, layers=layers, embeddings="tied")


def peers_bench() -> ModelConfig:
    """The model of the speed comparison with other trainers: 4 MoE layers, small enough for one CPU core."""
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=4, head_dim=16)
    moe = MoEFFN(num_experts=8, experts_per_token=2, d_ff=128)
    layers = _layers(attention, None, moe, num_layers=4)
    return ModelConfig(name="peers_bench", d_model=64, vocab_size=256, layers=layers)


# The paper's families (Piper, arXiv:2605.05049). Published are sequence length, d_model, expert d_ff, E, k, L
# and a total. The totals come out with 4 D^2 parameters of attention per layer (as many key-value heads as
# heads), two-matrix experts everywhere, no shared expert and no embeddings; those of X-MoE in units of 2^30
# (10.1, 55.2, 201.4, 545.4), those of weak scaling in units of 10^9 (110, 862, 1700). Head width 128, the
# balancing loss and the vocabulary of 32,000 tokens are our assumptions.


def xmoe_small() -> ModelConfig:
    """X-MoE Small, 10.1 x 2^30 parameters; sequences of 2048."""
    return _paper_model("xmoe_small", d_model=2048, d_ff=1408, num_experts=64, k=6, num_layers=28)


def xmoe_medium() -> ModelConfig:
    """X-MoE Medium, 55.2 x 2^30 parameters; sequences of 4096."""
    return _paper_model("xmoe_medium", d_model=5120, d_ff=1536, num_experts=128, k=6, num_layers=28)


def xmoe_large() -> ModelConfig:
    """X-MoE Large, 201.4 x 2^30 parameters; sequences of 4096."""
    return _paper_model("xmoe_large", d_model=7168, d_ff=2048, num_experts=256, k=8, num_layers=28)


def xmoe_super() -> ModelConfig:
    """X-MoE Super, 545.4 x 2^30 parameters; sequences of 4096."""
    return _paper_model("xmoe_super", d_model=7168, d_ff=2560, num_experts=256, k=8, num_layers=61)


def weak_110b() -> ModelConfig:
    """Weak scaling, 110B parameters, trained on 64 devices in the paper."""
    return _paper_model("weak_110b", d_model=5120, d_ff=20480, num_experts=16, k=2, num_layers=32)


def weak_862b() -> ModelConfig:
    """Weak scaling, 862B parameters, trained on 512 devices in the paper."""
    return _paper_model("weak_862b", d_model=5120, d_ff=20480, num_experts=128, k=2, num_layers=32)


def weak_1_7t() -> ModelConfig:
    """Weak scaling, 1.7T parameters, trained on 1024 devices in the paper."""
    return _paper_model("weak_1_7t", d_model=5120, d_ff=20480, num_experts=256, k=2, num_layers=32)


def mixtral_8x7b() -> ModelConfig:
    """Mixtral 8x7B, 46.7B parameters, 12.9B active (arXiv:2401.04088)."""
    attention = GroupedQueryAttention(num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=1e6)
    router = Router(aux_loss_coefficient=0.02)
    moe = MoEFFN(num_experts=8, experts_per_token=2, d_ff=14336, router=router)
    layers = _layers(attention, None, moe, num_layers=32)
    return ModelConfig(name="mixtral_8x7b", d_model=4096, vocab_size=32_000, layers=layers)


def mixtral_8x22b() -> ModelConfig:
    """Mixtral 8x22B base, 140.6B parameters, 39.2B active."""
    attention = GroupedQueryAttention(num_heads=48, num_kv_heads=8, head_dim=128, rope_theta=1e6)
    router = Router(aux_loss_coefficient=0.001)
    moe = MoEFFN(num_experts=8, experts_per_token=2, d_ff=16384, router=router)
    layers = _layers(attention, None, moe, num_layers=56)
    return ModelConfig(name="mixtral_8x22b", d_model=6144, vocab_size=32_000, layers=layers)


def deepseek_moe_16b() -> ModelConfig:
    """DeepSeekMoE 16B, 16.4B parameters, 2.8B active (arXiv:2401.06066)."""
    attention = GroupedQueryAttention(num_heads=16, num_kv_heads=16, head_dim=128)
    router = Router(gates="raw", aux_loss_coefficient=0.001)
    moe = MoEFFN(num_experts=64, experts_per_token=6, d_ff=1408, shared_d_ff=2 * 1408, router=router)
    layers = _layers(attention, DenseFFN(d_ff=10944), moe, num_dense=1, num_layers=28)
    return ModelConfig(
        name="deepseek_moe_16b", d_model=2048, vocab_size=102_400, layers=layers, norm_eps=1e-6
    )


def deepseek_v2() -> ModelConfig:
    """DeepSeek-V2, 236B parameters, 21B active (arXiv:2405.04434)."""
    router = Router(
        gates="raw",
        scaling_factor=16.0,
        aux_loss_coefficient=0.003,
        num_groups=8,
        groups_per_token=3,
        scored_per_group=1,
    )
    moe = MoEFFN(num_experts=160, experts_per_token=6, d_ff=1536, shared_d_ff=2 * 1536, router=router)
    layers = _layers(_latent(128), DenseFFN(d_ff=12288), moe, num_dense=1, num_layers=60)
    return ModelConfig(name="deepseek_v2", d_model=5120, vocab_size=102_400, layers=layers, norm_eps=1e-6)


def deepseek_v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite, 15.7B parameters, 2.7B active with embeddings (arXiv:2405.04434, appendix B)."""
    router = Router(gates="raw", aux_loss_coefficient=0.001)
    moe = MoEFFN(num_experts=64, experts_per_token=6, d_ff=1408, shared_d_ff=2 * 1408, router=router)
    layers = _layers(_latent(16, q_rank=0), DenseFFN(d_ff=10944), moe, num_dense=1, num_layers=27)
    return ModelConfig(
        name="deepseek_v2_lite", d_model=2048, vocab_size=102_400, layers=layers, norm_eps=1e-6
    )


def deepseek_v3() -> ModelConfig:
    """DeepSeek-V3, 671B parameters, 37.6B active (arXiv:2412.19437).

    Left out: the multi-token prediction layer, the per-sequence loss.
    """
    router = _bias_balanced(2.5, num_groups=8, groups_per_token=4)
    moe = MoEFFN(num_experts=256, experts_per_token=8, d_ff=2048, shared_d_ff=2048, router=router)
    layers = _layers(_latent(128), DenseFFN(d_ff=18432), moe, num_dense=3, num_layers=61)
    return ModelConfig(name="deepseek_v3", d_model=7168, vocab_size=129_280, layers=layers, norm_eps=1e-6)


def kimi_k2() -> ModelConfig:
    """Kimi K2, 1.03T parameters, 32.9B active (arXiv:2507.20534)."""
    moe = MoEFFN(
        num_experts=384, experts_per_token=8, d_ff=2048, shared_d_ff=2048, router=_bias_balanced(2.827)
    )
    attention = _latent(64, rope_theta=50_000.0)
    layers = _layers(attention, DenseFFN(d_ff=18432), moe, num_dense=1, num_layers=61)
    return ModelConfig(name="kimi_k2", d_model=7168, vocab_size=163_840, layers=layers, norm_eps=1e-6)


def qwen2_57b_a14b() -> ModelConfig:
    """Qwen2-57B-A14B, 57.4B parameters, 14.2B active (arXiv:2407.10671)."""
    attention = GroupedQueryAttention(num_heads=28, num_kv_heads=4, head_dim=128, rope_theta=1e6, bias="qkv")
    moe = MoEFFN(
        num_experts=64,
        experts_per_token=8,
        d_ff=2560,
        shared_d_ff=20480,
        shared_gate="sigmoid",
        router=Router(gates="raw", aux_loss_coefficient=0.001),
    )
    layers = _layers(attention, None, moe, num_layers=28)
    return ModelConfig(name="qwen2_57b_a14b", d_model=3584, vocab_size=151_936, layers=layers, norm_eps=1e-6)


def qwen3_30b_a3b() -> ModelConfig:
    """Qwen3-30B-A3B, 30.5B parameters, 3.4B active (arXiv:2505.09388)."""
    return _qwen3("qwen3_30b_a3b", d_model=2048, num_heads=32, d_ff=768, num_layers=48)


def qwen3_235b_a22b() -> ModelConfig:
    """Qwen3-235B-A22B, 235B parameters, 22.2B active (arXiv:2505.09388)."""
    return _qwen3("qwen3_235b_a22b", d_model=4096, num_heads=64, d_ff=1536, num_layers=94)


def llama4_scout() -> ModelConfig:
    """Llama 4 Scout, text only, 107.8B parameters, 17.2B active.

    Left out: layers without rotary positions, chunked attention, norms of q and k without weights, and that a
    gate multiplies what enters an expert instead of what leaves it.
    """
    router = Router(score="sigmoid", gates="raw", aux_loss_coefficient=0.001)
    moe = MoEFFN(num_experts=16, experts_per_token=1, d_ff=8192, shared_d_ff=8192, router=router)
    layers = _layers(_llama4_attention(), None, moe, num_layers=48)
    return ModelConfig(name="llama4_scout", d_model=5120, vocab_size=202_048, layers=layers)


def llama4_maverick() -> ModelConfig:
    """Llama 4 Maverick, text only, 400.7B parameters, 17.2B active; every second layer has experts.

    Left out: what `llama4_scout` leaves out.
    """
    router = Router(score="sigmoid", gates="raw", aux_loss_coefficient=0.001)
    moe = MoEFFN(num_experts=128, experts_per_token=1, d_ff=8192, shared_d_ff=8192, router=router)
    pair = _layers(_llama4_attention(), DenseFFN(d_ff=16384), moe, num_dense=1, num_layers=2)
    return ModelConfig(name="llama4_maverick", d_model=5120, vocab_size=202_048, layers=pair * 24)


def arctic() -> ModelConfig:
    """Snowflake Arctic, 478.6B parameters; a dense part of width 7168 beside the experts of every layer.

    Left out: its experts take the input of the layer, before attention.
    """
    attention = GroupedQueryAttention(num_heads=56, num_kv_heads=8, head_dim=128)
    router = Router(aux_loss_coefficient=0.001)
    moe = MoEFFN(num_experts=128, experts_per_token=2, d_ff=4864, dense_residual_d_ff=7168, router=router)
    layers = _layers(attention, None, moe, num_layers=35)
    return ModelConfig(name="arctic", d_model=7168, vocab_size=32_000, layers=layers)


def olmoe_1b_7b() -> ModelConfig:
    """OLMoE-1B-7B, 6.9B parameters, 1.3B active (arXiv:2409.02060)."""
    attention = GroupedQueryAttention(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="full")
    router = Router(gates="raw", aux_loss_coefficient=0.01, z_loss_coefficient=0.001)
    moe = MoEFFN(num_experts=64, experts_per_token=8, d_ff=1024, router=router)
    layers = _layers(attention, None, moe, num_layers=16)
    return ModelConfig(name="olmoe_1b_7b", d_model=2048, vocab_size=50_304, layers=layers)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    function.__name__: function
    for function in (
        tiny,
        small,
        peers_bench,
        xmoe_small,
        xmoe_medium,
        xmoe_large,
        xmoe_super,
        weak_110b,
        weak_862b,
        weak_1_7t,
        mixtral_8x7b,
        mixtral_8x22b,
        deepseek_moe_16b,
        deepseek_v2,
        deepseek_v2_lite,
        deepseek_v3,
        kimi_k2,
        qwen2_57b_a14b,
        qwen3_30b_a3b,
        qwen3_235b_a22b,
        llama4_scout,
        llama4_maverick,
        arctic,
        olmoe_1b_7b,
    )
}


def _layers(
    attention: Attention, dense: DenseFFN | None, moe: MoEFFN, *, num_dense: int = 0, num_layers: int
) -> tuple[LayerConfig, ...]:
    """Returns `num_dense` dense layers, then MoE layers up to `num_layers`."""
    first = (LayerConfig(attention=attention, ffn=dense),) * num_dense if dense else ()
    return first + (LayerConfig(attention=attention, ffn=moe),) * (num_layers - len(first))


def _paper_model(
    name: str, *, d_model: int, d_ff: int, num_experts: int, k: int, num_layers: int
) -> ModelConfig:
    attention = GroupedQueryAttention(num_heads=d_model // 128, num_kv_heads=d_model // 128, head_dim=128)
    moe = MoEFFN(num_experts=num_experts, experts_per_token=k, d_ff=d_ff, num_matrices=2)
    layers = _layers(attention, None, moe, num_layers=num_layers)
    return ModelConfig(name=name, d_model=d_model, vocab_size=32_000, layers=layers)


def _qwen3(name: str, *, d_model: int, num_heads: int, d_ff: int, num_layers: int) -> ModelConfig:
    attention = GroupedQueryAttention(
        num_heads=num_heads, num_kv_heads=4, head_dim=128, rope_theta=1e6, qk_norm="head"
    )
    router = Router(aux_loss_coefficient=0.001)
    moe = MoEFFN(num_experts=128, experts_per_token=8, d_ff=d_ff, router=router)
    layers = _layers(attention, None, moe, num_layers=num_layers)
    return ModelConfig(name=name, d_model=d_model, vocab_size=151_936, layers=layers, norm_eps=1e-6)


def _latent(num_heads: int, *, q_rank: int = 1536, rope_theta: float = 10_000.0) -> LatentAttention:
    """Returns the latent attention of the DeepSeek family, which differs in heads and query rank only."""
    return LatentAttention(
        num_heads=num_heads,
        q_rank=q_rank,
        kv_rank=512,
        nope_dim=128,
        rope_dim=64,
        v_dim=128,
        rope_theta=rope_theta,
    )


def _bias_balanced(scaling_factor: float, *, num_groups: int = 1, groups_per_token: int = 1) -> Router:
    """Returns the router of DeepSeek-V3: sigmoid scores, normalised gates, balancing bias, no loss."""
    return Router(
        score="sigmoid",
        balance="bias",
        scaling_factor=scaling_factor,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
    )


def _llama4_attention() -> GroupedQueryAttention:
    return GroupedQueryAttention(num_heads=40, num_kv_heads=8, head_dim=128, rope_theta=500_000.0)
