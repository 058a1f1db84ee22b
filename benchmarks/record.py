"""A published measurement, and the fields of rows that say what was run: numbers, machines, models, degrees, rates."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from benchmarks.frameworks import Run
from meshes.platform import Platform, known_platforms, load_platform
from models import cost
from models.config import GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN
from models.presets import PRESETS, preset

# What is asked in reason; a number beyond is a mistake, and would take forever.
MOST = 10_000_000


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
        positive("what was measured", self.published)


def positive(name: str, value: Any) -> float:
    """A positive finite number.

    Raises:
      UnknownRowError: if it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or not isfinite(value):
        raise UnknownRowError(f"{name} must be a positive number, got {value!r}")
    return value


def platform_of(text: str) -> Platform:
    """The machine that a text names, or whose kind of device it names, such as "LUMI", "H100-80 SXM" or "gb300".

    Raises:
      UnknownRowError: if no file describes it.
    """
    words = re.findall(r"[a-z]+\d*[a-z]*", str(text).lower())
    clusters = [platform for platform in map(load_platform, known_platforms()) if platform.network]
    named = [platform for platform in clusters if platform.name.split("_")[0] in words]
    # A machine that has a name, such as LUMI, rather than one of the same devices.
    named.sort(key=lambda platform: platform.name.endswith(("_pod", "_node")))
    if named or "mi250x" in words:
        return named[0] if named else load_platform("frontier")
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


def dtype_of(precision: Any, platform: Platform) -> str:
    """What products are computed in; 16 bits where a row does not say. There are several kinds of 8 bits."""
    text = str(precision or "unspecified").upper()
    if text in ("BF16", "BFLOAT16", "FP16/BF16", "BF16/FP16", "UNSPECIFIED"):
        return "bfloat16"
    if text in ("FP16", "FLOAT16"):
        return "float16"
    narrow = [dtype for dtype in platform.device.peak_flop_per_second if dtype.startswith("float8")]
    if ("FP8" in text or "FLOAT8" in text) and narrow:
        return narrow[0]
    raise UnknownRowError(f"precision {precision!r} is not described for {platform.name}")


def whole(row: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of a row, or a default where it says nothing.

    Raises:
      UnknownRowError: if it is no number, or one that makes no sense.
      KeyError: if it is missing.
    """
    value = row[name] if default is None else row.get(name) or default
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(number) is not int or not 1 <= number <= MOST:
        raise UnknownRowError(
            f"{name} must be a whole number of at least 1 and at most {MOST:,}, got {value!r}"
        )
    return number


def degrees(text: str) -> dict[str, int]:
    """Degrees of parallelism in a text such as "TP2 EP8 PP8 ETP1".

    Raises:
      UnknownRowError: if it is no text, or a degree is 0.
    """
    if not isinstance(text, str):
        raise UnknownRowError(f"degrees of parallelism must be a text such as 'TP2 EP8', got {text!r}")
    found = {word: int(number) for word, number in re.findall(r"\b([A-Z]+)(\d+)\b", text)}
    for word, number in found.items():
        if not 1 <= number <= MOST:
            raise UnknownRowError(f"{word} must be at least 1, got {word}{number}")
    return found


# Rates by which a row of another form may state its throughput, all per device.
RATES = (
    "tok_s_gpu",
    "tokens_per_second_per_device",
    "tflops",
    "mfu",
    "samples_per_gpu_s",
    "tflops_causal",
    "mfu_causal",
)


def tokens_per_second(row: Mapping[str, Any], run: Run) -> float:
    """Per device, from whichever rate a row has; FLOP are the model's own, causal."""
    flop = cost.flop_per_token(run.model, run.seq_len).step
    name = next((rate for rate in RATES if row.get(rate) is not None), None)
    if name is None:
        raise UnknownRowError("nothing was measured")
    value = positive("what was measured", row[name])
    if name.startswith("mfu"):
        peak = positive(
            "peak", row.get("peak") or run.platform.device.peak_flop_per_second["bfloat16"] / 1e12
        )
        return value / 100 * peak * 1e12 / flop
    if name.startswith("tflops"):
        return value * 1e12 / flop
    return value * (run.seq_len if name == "samples_per_gpu_s" else 1)
