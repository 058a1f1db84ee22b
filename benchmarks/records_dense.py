"""Published measurements of dense models, and of DeepSeek-V3 on its own cluster: schedules, recomputation, FSDP.

Dense models say how fast products, attention and memory of a device are without anything of experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.frameworks import Run, Software
from benchmarks.record import (
    Record,
    UnknownRowError,
    degrees,
    dtype_of,
    model_of,
    platform_of,
    positive,
    whole,
)
from models.config import DenseFFN, GroupedQueryAttention, LayerConfig, ModelConfig

# Layers, width, heads, words. Zero Bubble (arXiv 2401.10241), Table 3: models like GPT-3, whose words are taken; with
# them, but not with 32,000, the last rank is as much slower in 1.5B, and not in 6.2B, as their rates say. llm-foundry's
# yamls of MPT. Korthikanti et al. (arXiv 2205.05198), Table 3.
GPTS = {
    "gpt-1.5b": (22, 2304, 24, 50_304),
    "gpt-6.2b": (30, 4096, 32, 50_304),
    "gpt-14.6b": (46, 5120, 40, 50_304),
    "gpt-28.3b": (62, 6144, 48, 50_304),
    "mpt-125m": (12, 768, 12, 50_368),
    "mpt-350m": (24, 1024, 16, 50_368),
    "mpt-760m": (24, 1536, 12, 50_368),
    "mpt-1b": (24, 2048, 16, 50_368),
    "mpt-3b": (32, 2560, 20, 50_368),
    "mpt-7b": (32, 4096, 32, 50_368),
    "mpt-13b": (40, 5120, 40, 50_368),
    "mpt-30b": (48, 7168, 56, 50_368),
    "mpt-70b": (80, 8192, 64, 50_368),
    "megatron-22b": (48, 6144, 64, 51_200),
    "megatron-175b": (96, 12_288, 96, 51_200),
    "megatron-530b": (105, 20_480, 128, 51_200),
    "megatron-1t": (128, 25_600, 160, 51_200),
}
# Sequences and tokens of a microbatch in Zero Bubble, Table 3.
ZERO_BUBBLE_SEQUENCES = {"gpt-1.5b": 6, "gpt-6.2b": 3, "gpt-14.6b": 1, "gpt-28.3b": 1}
ZERO_BUBBLE_TOKENS = 1024
ZERO_BUBBLE_SCHEDULES = {
    "1F1B": "interleaved",
    "1F1B-I": "interleaved",
    "ZB-H1": "zb_h1",
    "ZB-1p": "zb_h1",
    "ZB-H2": "zb_h2",
    "ZB-2p": "zb_2p",
    "ZB-V": "zb_v",
}
# Fitted: seconds of everything that is no product, as of Megatron Bridge's releases; norms, biases and activations are
# kernels of their own. Attention of llm-foundry is an early FlashAttention in Triton, slower than the later ones that
# the files of platforms have; Megatron of 2022 wrote all S^2 pairs to memory.
MEGATRON = Software(streams=1.3)
MEGATRON_2022 = MEGATRON._replace(attention=0.13)
FOUNDRY = {
    name: Software(streams=1.35, attention=part) for name, part in (("a100_pod", 0.54), ("h100_pod", 0.29))
}
# DeepSeek-V3's own framework: 20 of 132 units of a device carry exchanges, which are hidden (arXiv 2412.19437, 3.2).
DEEPSEEK = Software(
    streams=0.9, exposed=0.0, products=112 / 132, attention=112 / 132, dispatcher="halo2_dedup"
)


def form_of(source: str, row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Record] | None:
    """What reads a row of one of these sources; None if it is of none of them."""
    if "2401.10241" in source and "samples_per_gpu_s" in row:
        return _zero_bubble
    if "llm-foundry" in source and "tok_s_gpu" in row:
        return _foundry
    if "2205.05198" in source and "step_s" in row:
        return _korthikanti
    if "ISCA" in source and "step_s" in row:
        return _deepseek
    return None


def gpt(name: str) -> ModelConfig:
    """A dense model of `GPTS`: GELU, every head with keys of its own, embedding and head not tied.

    Raises:
      UnknownRowError: if there is none of that name.
    """
    if str(name).lower() not in GPTS:
        raise UnknownRowError(f"no model named {name!r} is described")
    depth, width, heads, words = GPTS[str(name).lower()]
    attention = GroupedQueryAttention(num_heads=heads, num_kv_heads=heads, head_dim=width // heads)
    layer = LayerConfig(attention=attention, ffn=DenseFFN(d_ff=4 * width, num_matrices=2))
    return ModelConfig(name=str(name).lower(), d_model=width, vocab_size=words, layers=(layer,) * depth)


def _zero_bubble(row: Mapping[str, Any]) -> Record:
    """Zero Bubble, Table 4: samples per second and device; 1F1B-I has a layer a stage, embedding and head counted."""
    model, platform, par = gpt(row["model"]), platform_of(row["hw"]), degrees(row["par"])
    schedule, pipe = str(row["schedule"]), par.get("PP", 1)
    if schedule not in ZERO_BUBBLE_SCHEDULES:
        raise UnknownRowError(f"schedule {schedule!r} is not one of {', '.join(ZERO_BUBBLE_SCHEDULES)}")
    if model.name not in ZERO_BUBBLE_SEQUENCES:
        raise UnknownRowError(f"how many sequences a microbatch of {row['model']!r} had is not published")
    microbatch = ZERO_BUBBLE_SEQUENCES[model.name]
    run = Run(
        model=model,
        platform=platform,
        devices=whole(row, "gpus"),
        pipe=pipe,
        virtual=(model.num_layers + 2) // pipe if schedule == "1F1B-I" else 1,
        microbatch=microbatch,
        global_batch=microbatch * whole(row, "microbatches"),
        seq_len=ZERO_BUBBLE_TOKENS,
        dtype="float16",
        schedule=ZERO_BUBBLE_SCHEDULES[schedule],
        software=MEGATRON,
    )
    label = f"{row['model']} {row['par']} {schedule} {row['microbatches']} microbatches"
    return _record(label, run, positive("what was measured", row["samples_per_gpu_s"]) * run.seq_len)


def _foundry(row: Mapping[str, Any]) -> Record:
    """MosaicML llm-foundry: parameters gathered layer by layer."""
    platform = platform_of(row["hw"])
    if platform.name not in FOUNDRY:
        raise UnknownRowError(f"nothing is known of the attention of llm-foundry on {platform.name}")
    run = Run(
        model=gpt(row["model"]),
        platform=platform,
        devices=whole(row, "gpus"),
        microbatch=whole(row, "mbs"),
        global_batch=whole(row, "gbs"),
        seq_len=whole(row, "seq"),
        memory_mode=_memory_mode(row),
        gathers_parameters=True,
        software=FOUNDRY[platform.name],
    )
    label = f"{row['model']} {row['mbs']} x {row['seq']} {row['gpus']} devices, recomputes {row['recompute']}"
    return _record(label, run, positive("what was measured", row["tok_s_gpu"]))


def _korthikanti(row: Mapping[str, Any]) -> Record:
    """Korthikanti et al., Table 5: seconds of a step of Megatron in 2022; what is recomputed is all or attention."""
    par = degrees(row["par"])
    run = Run(
        model=gpt(row["model"]),
        platform=platform_of(row["hw"]),
        devices=whole(row, "gpus"),
        tensor=par.get("TP", 1),
        pipe=par.get("PP", 1),
        virtual=par.get("VPP", 1),
        microbatch=whole(row, "mbs"),
        global_batch=whole(row, "gbs"),
        seq_len=whole(row, "seq"),
        memory_mode=_memory_mode(row),
        software=MEGATRON_2022,
    )
    tokens = run.global_batch * run.seq_len / run.devices
    label = f"{row['model']} {row['par']} recomputes {row['recompute']}"
    return _record(label, run, tokens / positive("what was measured", row["step_s"]))


def _deepseek(row: Mapping[str, Any]) -> Record:
    """DeepSeek-V3 (arXiv 2505.09343, Table 4): seconds of a step; microbatches of one sequence."""
    par, platform = degrees(row["par"]), platform_of(row["hw"])
    run = Run(
        model=replace(model_of(row["model"]), prediction_layers=1),
        platform=platform,
        devices=whole(row, "gpus"),
        pipe=par.get("PP", 1),
        expert=par.get("EP", 1),
        global_batch=whole(row, "gbs", 15_360),
        seq_len=whole(row, "seq", 4096),
        dtype=dtype_of(row.get("prec", "fp8"), platform),
        schedule="dualpipe",
        software=DEEPSEEK,
    )
    label = f"{row['model']} {row['par']} {row['hw']}"
    tokens = run.global_batch * run.seq_len / run.devices
    return _record(label, run, tokens / positive("what was measured", row["step_s"]))


def _record(label: str, run: Run, published: float) -> Record:
    return Record(label=label, platform=run.platform.name, unit="tokens/s", published=published, run=run)


def _memory_mode(row: Mapping[str, Any]) -> str:
    """Of a plan, by what a row says is computed again."""
    modes = {"none": "stash", "layers": "layer", "attention": "products"}
    if row["recompute"] not in modes:
        raise UnknownRowError(f"recompute must be one of {', '.join(modes)}, got {row['recompute']!r}")
    return modes[row["recompute"]]
