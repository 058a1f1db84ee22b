"""Profiles of single layers on one node of Frontier: forward milliseconds of products, attention and exchanges.

X-MoE's authors measured them for a planner of theirs, with timers around parts of a layer. What its host waits for is
outside of these, so elementwise work is that of fused kernels. All rows are counted, although some were dropped.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.frontier_runs import XMOE
from benchmarks.record import UnknownRowError, platform_of, positive, whole
from meshes.platform import Platform
from models.config import GroupedQueryAttention, LayerConfig, MoEFFN
from piperjax.planner.network import dispatch_transfer
from piperjax.planner.work import layer_work

PARTS = ("query_key_value", "attention", "attention_output", "dispatch", "experts", "combine")
HEAD_DIM = 128  # as their table of models has it
DTYPE = "float16"
# Around every group of experts: their activation, and rows brought into their order.
OF_EXPERTS = ("experts activation", "group rows by expert")


class Profile(NamedTuple):
    """A profile beside its prediction.

    Attributes:
      label: shape of the layer.
      published, predicted: milliseconds of all parts.
      note: predicted over published, by part.
    """

    label: str
    published: float
    predicted: float
    note: str


def profiled_layer(row: Mapping[str, Any]) -> Profile:
    """A row with `forward_ms` by `PARTS`, and the shape of a layer in `hp`: d, ff, E and k.

    Raises:
      UnknownRowError: if it says too little, or something that cannot be.
    """
    shape, measured = row.get("hp"), row.get("forward_ms")
    if not isinstance(shape, dict) or not isinstance(measured, dict):
        raise UnknownRowError("a profile of a layer has its shape in hp and milliseconds in forward_ms")
    if set(measured) != set(PARTS):
        raise UnknownRowError(f"forward_ms must have {', '.join(PARTS)}, got {', '.join(map(str, measured))}")
    D, d_ff, E, k = (whole(shape, name) for name in ("d", "ff", "E", "k"))
    devices, sequences, seq_len = (whole(row, name) for name in ("gpus", "microbatch", "seq"))
    if E % devices or k > E or D % HEAD_DIM:
        raise UnknownRowError(
            f"{E} experts, {k} per token, on {devices} devices, and {D} features in heads of {HEAD_DIM} do not divide"
        )
    heads = D // HEAD_DIM
    layer = LayerConfig(
        attention=GroupedQueryAttention(num_heads=heads, num_kv_heads=heads, head_dim=HEAD_DIM),
        ffn=MoEFFN(num_experts=E, experts_per_token=k, d_ff=d_ff, num_matrices=2),
    )
    found = _forward_seconds(platform_of(row["hw"]), D, layer, devices, sequences * seq_len, seq_len)
    published = {part: positive(part, measured[part]) for part in PARTS}
    return Profile(
        label=f"X-MoE d{D} ff{d_ff} E{E} k{k}, {sequences} x {seq_len}",
        published=sum(published.values()),
        predicted=1e3 * sum(found.values()),
        note=", ".join(f"{part} {1e3 * found[part] / published[part]:.2f}" for part in PARTS),
    )


def _forward_seconds(
    platform: Platform, d_model: int, layer: LayerConfig, devices: int, tokens: int, seq_len: int
) -> dict[str, float]:
    """Seconds of the parts, with X-MoE's products and its flat, uneven exchanges."""
    device, ffn = platform.device, layer.ffn
    work = layer_work(d_model, layer, tokens=tokens, seq_len=seq_len, expert=devices)
    products = {
        p.name: device.product_seconds(
            p.rows, p.columns, p.depth, dtype=DTYPE, grouped=p.groups > 0, groups=max(p.groups, 1)
        )
        / XMOE.products
        for p in work.products
    }
    around = sum(
        device.elementwise_seconds(s.kind, s.forward_bytes) for s in work.streams if s.name in OF_EXPERTS
    )
    exchange = dispatch_transfer(
        platform,
        expert_factors=platform.expert_factors(expert=devices, pipe=1, data=1),
        tokens=tokens,
        row_bytes=2 * d_model,
        num_experts=ffn.num_experts,
        experts_per_token=ffn.experts_per_token,
        dispatcher=XMOE.dispatcher,
        rows="exact",
    ).seconds
    return {
        "query_key_value": products["query, key, value"],
        "attention": device.attention_seconds(
            work.attention_flop, seq_len=seq_len, head_dim=work.head_dim, dtype=DTYPE
        ),
        "attention_output": products["attention output"],
        "dispatch": exchange,
        "experts": products["experts up"] + products["experts down"] + around,
        "combine": exchange,
    }
