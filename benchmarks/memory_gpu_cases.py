"""Steps whose memory is predicted and compiled for GPUs that are not here: as `memory_cases`, four times as large.

Kernels of GPUs take workspaces and alignments of some MiB, of which smaller steps would consist.
"""

from collections.abc import Iterator

from benchmarks import memory_cases
from benchmarks.memory_cases import Case
from models.config import ModelConfig
from piperjax.schedules import registry

SEQ_LEN = 1024


def scaled(name: str, **changes) -> ModelConfig:
    """A preset with 1,024 features and 8,192 tokens in its vocabulary."""
    return memory_cases.scaled(name, **{"d_model": 1024, "vocab_size": 8192, **changes})


def case(model: ModelConfig, mesh: tuple[int, int, int] = (1, 1, 1), **options) -> Case:
    """A case of sequences of 1,024, where nothing else is said."""
    return memory_cases.case(model, mesh, **{"seq_len": SEQ_LEN, **options})


def cases() -> Iterator[Case]:
    """Every schedule, memory mode, dispatcher, families of models, overlap, both dtypes, up to 64 devices."""
    mixtral = scaled("mixtral_8x7b", num_layers=8)
    for schedule in registry.names():
        if schedule != "auto":
            yield case(mixtral, (4, 1, 2), schedule=schedule)
    yield case(mixtral, (4, 1, 2), schedule="zb_v", dtype="float32")
    for memory_mode in ("stage", "named", "products", "stash"):
        yield case(scaled("qwen3_30b_a3b", num_experts=16), (2, 2, 4), memory_mode=memory_mode)
        yield case(scaled("xmoe_small"), (2, 1, 2), memory_mode=memory_mode)
    for memory_mode in ("named", "products", "stash"):
        yield case(scaled("weak_1_7t"), (2, 1, 2), schedule="zb_h1", memory_mode=memory_mode)
        yield case(scaled("mixtral_8x7b"), (2, 1, 2), schedule="zb_v", memory_mode=memory_mode)
    yield from _families()
    yield from _meshes()
    yield from _dispatchers()
    yield from _overlap()


def _families() -> Iterator[Case]:
    """Models as they differ: dense prologue, alternating layers, shared and residual parts, norms, biases, ties."""
    yield from memory_cases.in_both_dtypes(case, scaled)
    yield case(scaled("llama4_maverick", num_layers=8), (4, 1, 2))
    yield case(scaled("qwen2_57b_a14b"), (2, 1, 4))
    yield case(scaled("olmoe_1b_7b", num_experts=16), (2, 4, 1))
    yield case(scaled("arctic", num_layers=5), (2, 2, 2), layers_per_stage=(3, 2))


def _meshes() -> Iterator[Case]:
    """Devices, sequence lengths, vocabularies, capacities, narrow sums."""
    mixtral, weak = scaled("mixtral_8x7b"), scaled("weak_862b")
    yield case(mixtral, (1, 1, 1))
    yield case(mixtral, (1, 1, 8), sequences=4)
    yield case(mixtral, (1, 8, 1))
    yield case(mixtral, (4, 4, 4))
    yield case(scaled("weak_862b", num_layers=16), (16, 2, 2), sequences=1)
    for memory_mode in ("layer", "products", "stash"):
        yield case(weak, (2, 1, 1), seq_len=4096, memory_mode=memory_mode)
    for vocabulary in ("split", "whole"):
        yield case(scaled("mixtral_8x7b", vocab_size=96_000), (2, 1, 2), vocabulary=vocabulary)
    yield case(scaled("mixtral_8x7b", vocab_size=96_000), (2, 1, 2), dtype="float32")
    yield case(weak, (2, 1, 4), capacity_factor=1.25, sequences=4)
    yield case(mixtral, (2, 2, 2), gradient_dtype="bfloat16")
    yield case(scaled("mixtral_8x7b", num_layers=8), (4, 1, 2), gradient_dtype="bfloat16", schedule="zb_v")


def _dispatchers() -> Iterator[Case]:
    """Dispatchers, between two nodes of four devices or four of two, chunks, and later passes."""
    deepseek, mixtral = scaled("deepseek_moe_16b", num_experts=16), scaled("mixtral_8x7b")
    eight = dict(expert_factors=(1, 2, 4))
    yield case(deepseek, (1, 1, 8), dispatch="halo2", **eight)
    yield case(deepseek, (1, 1, 8), dispatch="halo3", expert_factors=(1, 4, 2))
    for memory_mode in ("layer", "named", "products", "stash"):
        yield case(deepseek, (1, 1, 8), dispatch="halo2_dedup", memory_mode=memory_mode, **eight)
    yield case(mixtral, (2, 1, 4), dispatch="halo2_dedup", expert_factors=(1, 2, 2))
    yield case(deepseek, (1, 1, 8), dispatch="halo2_dedup", dispatch_chunks=4, **eight)
    yield case(deepseek, (1, 1, 8), dispatch="flat", dispatch_chunks=2, **eight)
    yield case(deepseek, (1, 1, 8), dispatch="halo3_dedup", **eight)
    limited = dict(dispatch="halo2_dedup", capacity_factor=1.25)
    yield case(deepseek, (1, 1, 8), **limited, **eight)
    yield case(deepseek, (1, 1, 8), **limited, **eight, overflow="passes")
    passes = dict(capacity_factor=1.25, overflow="passes")
    yield case(mixtral, (2, 1, 4), **passes, schedule="zb_h1")
    yield case(deepseek, (2, 1, 4), **passes, memory_mode="stash")


def _overlap() -> Iterator[Case]:
    """A forward beside a backward, in stages of two layers and of one."""
    mixtral = scaled("mixtral_8x7b")
    for memory_mode in ("layer", "named", "products", "stash"):
        yield case(mixtral, (2, 1, 2), overlap=True, memory_mode=memory_mode)
    yield case(mixtral, (4, 1, 2), overlap=True, memory_mode="named")
    yield case(mixtral, (2, 1, 2), overlap=True, schedule="interleaved", num_chunks=2, memory_mode="products")
