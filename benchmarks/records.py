"""Published measurements as runs that can be priced: what a row says, and what is known of the framework it ran on.

A row is a JSON object of one of the forms below; what a form leaves unsaid is filled in here, the same for all its
rows. A row that cannot be understood becomes a reason, never a traceback.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.frameworks import Run, Software
from meshes.platform import Platform, known_platforms, load_platform
from models import cost
from models.config import GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN
from models.presets import PRESETS, preset

# Megatron Bridge. The same configuration became faster from release to release, in software. One number per release,
# the same for all models and platforms, stands for it: seconds of everything that is not a product, over those of fused
# kernels that never wait. It fell by half in 26.06, on Blackwell; the H100 is as fast in 26.06 as in 26.04.
BRIDGE_STREAMS = {"25.11": 2.6, "26.02": 2.3, "26.04": 2.1, "26.06": 0.9}
BRIDGE_HOPPER_RELEASE = "26.04"
# Recipes for Hopper run the exchanges of one microbatch beside the products of another; those for NVL72 need not.
BRIDGE_HOPPER_EXPOSED = 0.65
# Experts that drop what exceeds their capacity have static shapes, so that nothing waits for row counts; such runs
# use plain all-to-alls.
DROPPING = Software(streams=0.9, exposed=1.0, dispatcher="flat")
# Groups of experts that routing limits a token to; recipes put one on each node.
# Primus: seconds that the host needs for a layer; with less than two sequences of 4,096 tokens on a device, steps of
# DeepSeek-V2-Lite do not become shorter. DeepEP hides or saves this part of the exchanges.
PRIMUS_HOST_SECONDS = 14e-3
PRIMUS_DEEPEP_EXPOSED = 0.6


class UnknownRowError(ValueError):
    """A row that cannot be priced, and why."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One published measurement.

    Attributes:
      label: model, size and variant, for the table.
      platform: name of the machine's file.
      unit: "tokens/s" or "TFLOP/s", per device.
      published: what was measured, in that unit.
      run: what was run.
    """

    label: str
    platform: str
    unit: str
    published: float
    run: Run

    def __post_init__(self):
        if not isinstance(self.published, int | float) or not self.published > 0:
            raise UnknownRowError(f"what was measured must be a positive number, got {self.published!r}")


def read(row: Mapping[str, Any]) -> Record:
    """The measurement of a row.

    Raises:
      UnknownRowError: if its form, model, platform or parallelism is not known.
    """
    source = str(row.get("source") or row.get("src") or "")
    try:
        if "tokens_per_second_per_device" in row:
            return _bridge(row, source)
        if "2504.14960" in source and "mfu" in row:
            return _folding(row)
        if "Primus" in source and "tok_s_gpu" in row:
            return _primus(row)
        if "Primus" in source and "schedule" in row:
            # benchmarks/published_schedules.py compares the order of these.
            raise UnknownRowError("neither microbatches nor sequence length are published")
    except KeyError as error:
        raise UnknownRowError(f"the row has no field {error}") from None
    except UnknownRowError:
        raise
    except (ValueError, TypeError) as error:
        raise UnknownRowError(str(error)) from None
    raise UnknownRowError("not a form of measurement of throughput with known parallelism")


def platform_of(text: str) -> Platform:
    """The machine whose kind of device a text names, such as "H100-80 SXM" or "gb300".

    Raises:
      UnknownRowError: if no file describes it.
    """
    words = re.findall(r"[a-z]+\d+[a-z]*|frontier", str(text).lower())
    words = ["frontier" if word == "mi250x" else word for word in words]
    for name in known_platforms():
        if name.split("_")[0] in words:
            return load_platform(name)
    raise UnknownRowError(f"no platform file describes {text!r}")


def model_of(name: str) -> ModelConfig:
    """The model of a row.

    Raises:
      UnknownRowError: if there is no such preset.
    """
    plain = str(name).lower().replace("-", "_").replace(".", "_")
    if plain in PRESETS:
        return preset(plain)
    if plain in _OTHERS:
        return _OTHERS[plain]()
    raise UnknownRowError(f"no model named {name!r} is described")


def _fine_grained_8x22b() -> ModelConfig:
    """Mixtral 8x22B with every expert cut in eight, and eight times as many chosen."""
    whole = preset("mixtral_8x22b")
    layer = whole.layers[0]
    ffn = dataclasses.replace(layer.ffn, num_experts=64, experts_per_token=8, d_ff=layer.ffn.d_ff // 8)
    layers = (dataclasses.replace(layer, ffn=ffn),) * whole.num_layers
    return dataclasses.replace(whole, name="mixtral_8x22b_g8t8", layers=layers)


def _llama3_8x70b() -> ModelConfig:
    """Llama 3 70B with eight copies of every feed-forward part, two chosen."""
    attention = GroupedQueryAttention(num_heads=64, num_kv_heads=8, head_dim=128)
    ffn = MoEFFN(num_experts=8, experts_per_token=2, d_ff=28672)
    layers = (LayerConfig(attention=attention, ffn=ffn),) * 80
    return ModelConfig(name="llama3_8x70b", d_model=8192, vocab_size=128_256, layers=layers)


def _gpt_oss_120b() -> ModelConfig:
    """With full attention in every layer; half of them see 128 tokens only, which saves 5 % of the FLOP at 4,096."""
    attention = GroupedQueryAttention(num_heads=64, num_kv_heads=8, head_dim=64, bias="all")
    ffn = MoEFFN(num_experts=128, experts_per_token=4, d_ff=2880)
    layers = (LayerConfig(attention=attention, ffn=ffn),) * 36
    return ModelConfig(name="gpt_oss_120b", d_model=2880, vocab_size=201_088, layers=layers)


_OTHERS = {
    "gpt_oss_120b": _gpt_oss_120b,
    "mixtral_8x22b_g8t8": _fine_grained_8x22b,
    "llama3_8x70b": _llama3_8x70b,
}


def _dtype(precision: str) -> str:
    text = str(precision).upper()
    if text in ("BF16", "FP16/BF16", "UNSPECIFIED"):
        return "bfloat16"
    if "FP8" in text:
        return "float8_e4m3fn"
    raise UnknownRowError(f"precision {precision!r} is not described")


def _whole(row: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = row[name] if default is None else row.get(name) or default
    if type(value) is not int or value < 1:
        raise UnknownRowError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _bridge(row: Mapping[str, Any], source: str) -> Record:
    """Megatron Bridge: DeepSeek-V3 trains its prediction layer unless the variant says otherwise."""
    platform, model, variant = (
        platform_of(row["platform"]),
        model_of(row["model"]),
        str(row.get("variant", "")),
    )
    if model.name == "deepseek_v3" and "w/o" not in variant:
        model = dataclasses.replace(model, prediction_layers=1)
    release = re.search(r"\b(\d\d\.\d\d)", source)
    software = bridge_software(release.group(1) if release else "", platform.name)
    drops = "tokendrop" in variant
    run = Run(
        model=model,
        platform=platform,
        devices=_whole(row, "devices"),
        **{name: _whole(row, name, 1) for name in ("tensor", "context", "pipe", "virtual", "expert")},
        microbatch=_whole(row, "microbatch"),
        global_batch=_whole(row, "global_batch"),
        seq_len=_whole(row, "seq"),
        dtype=_dtype(row.get("precision", "BF16")),
        capacity_factor=1.0 if drops else 0.0,
        software=DROPPING if drops else software,
    )
    label = f"{row['model']} {row.get('precision', '')} {row['devices']} devices {release.group(0) if release else ''}"
    return Record(
        label=label + " drops" * drops,
        platform=platform.name,
        unit="tokens/s",
        published=row["tokens_per_second_per_device"],
        run=run,
    )


def bridge_software(release: str, platform: str) -> Software:
    """Habits of a release of Megatron Bridge: those of the last known one before it, or of the first."""
    hopper = platform.startswith("h")
    known = [r for r in BRIDGE_STREAMS if r <= release and not (hopper and r > BRIDGE_HOPPER_RELEASE)]
    streams = BRIDGE_STREAMS[max(known, default=min(BRIDGE_STREAMS))]
    return Software(
        streams=streams, exposed=BRIDGE_HOPPER_EXPOSED if hopper else 1.0, dispatcher="halo2_dedup"
    )


def degrees(text: str) -> dict[str, int]:
    """Degrees of parallelism in a text such as "TP2 EP8 PP8 ETP1"."""
    return {word: int(number) for word, number in re.findall(r"\b([A-Z]+)(\d+)\b", text)}


def _folding(row: Mapping[str, Any]) -> Record:
    """MoE Parallel Folding (arXiv 2504.14960), Table 3: dropping experts, microbatches of one sequence."""
    par = degrees(row["par"])
    model, platform = model_of(row["model"]), platform_of(row["hw"])
    run = Run(
        model=model,
        platform=platform,
        devices=row["gpus"],
        tensor=par.get("TP", 1),
        pipe=par.get("PP", 1),
        expert=par.get("EP", 1),
        expert_tensor=par.get("ETP", par.get("TP", 1)),
        global_batch=row["gbs"],
        seq_len=row["seq"],
        dtype=_dtype(row["prec"]),
        capacity_factor=row["cap_factor"],
        gathers_parameters="FSDP" in row["strategy"],
        software=DROPPING,
    )
    flop = cost.flop_per_token(model, row["seq"]).step
    return Record(
        label=f"{row['model']} {row['strategy']} {row['par']} {row['gpus']} devices",
        platform=platform.name,
        unit="tokens/s",
        published=row["mfu"] / 100 * row["peak"] * 1e12 / flop,
        run=run,
    )


def _primus(row: Mapping[str, Any]) -> Record:
    """Primus on MI355X: rows are variants, each on top of those before it in its table."""
    par, variant = degrees(row["par"]), row["variant"]
    chunks = re.search(r"VPP(\d+)", variant)
    virtual = int(chunks.group(1)) if chunks else (3 if variant == "+sync-free" else 1)
    run = Run(
        model=model_of(row["model"]),
        platform=platform_of(row["hw"]),
        devices=row["gpus"],
        tensor=par.get("TP", 1),
        pipe=par.get("PP", 1),
        virtual=virtual if par.get("PP", 1) > 1 else 1,
        expert=par.get("EP", 1),
        microbatch=row.get("mbs") or par.get("MBS", 1),
        # Not published for the small model, and without a pipeline it matters little.
        global_batch=row.get("gbs") or 8 * row["gpus"] * row["mbs"],
        seq_len=row["seq"],
        dtype=_dtype(row["prec"]),
        software=_primus_software(row["model"], variant),
    )
    return Record(
        label=f"{row['model']} {run.microbatch} x {row['seq']} {row['gpus']} devices {variant}",
        platform=run.platform.name,
        unit="tokens/s",
        published=row["tok_s_gpu"],
        run=run,
    )


def _primus_software(model: str, variant: str) -> Software:
    """Optimisations in the order in which each table adds them; those of Bridge's releases without and with waits."""
    order = {
        "deepseek-v2-lite": ("baseline", "+loss fusion", "+DeepEP", "+sync-free", "+NUMA/launch", "MBS14"),
        "deepseek-v2": (
            "1F1B base",
            "+loss fusion",
            "+DeepEP",
            "+launch/NUMA",
            "+VPP3",
            "+sync-free",
            "+VPP5",
        ),
    }[model]
    if variant not in order:
        raise UnknownRowError(f"variant {variant!r} of Primus is not described; there are {', '.join(order)}")
    reached = order.index(variant)
    return Software(
        streams=DROPPING.streams if reached >= order.index("+sync-free") else BRIDGE_STREAMS["26.02"],
        exposed=PRIMUS_DEEPEP_EXPOSED if reached >= order.index("+DeepEP") else 1.0,
        host_seconds=PRIMUS_HOST_SECONDS,
    )
