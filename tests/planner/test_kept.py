"""Closed forms of what layers keep against what the passes are found to keep by tracing them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks.cases import make_executor
from models.config import DenseFFN, GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN, Router
from piperjax.planner.dispatchers import named
from piperjax.planner.kept import Share, kept_bytes, tap_bytes
from piperjax.planner.plan import MEMORY_MODES
from piperjax.runtime import passes, step

ATTENTION = GroupedQueryAttention(num_heads=6, num_kv_heads=3, head_dim=14)
FFN = DenseFFN(d_ff=52)
MOE = MoEFFN(num_experts=8, experts_per_token=3, d_ff=62)


def dense(**changes):
    return LayerConfig(attention=dataclasses.replace(ATTENTION, **changes), ffn=FFN)


def moe(**changes):
    return LayerConfig(attention=ATTENTION, ffn=dataclasses.replace(MOE, **changes))


LAYERS = {
    "dense": dense(),
    "head norm": dense(qk_norm="head"),
    "full norm": dense(qk_norm="full"),
    "bias": dense(bias="all"),
    "gelu": LayerConfig(attention=ATTENTION, ffn=DenseFFN(d_ff=52, num_matrices=2)),
    "moe": moe(),
    "gelu experts": moe(num_matrices=2),
    "shared": moe(shared_d_ff=46),
    "gated": moe(shared_d_ff=46, shared_gate="sigmoid"),
    "residual": moe(dense_residual_d_ff=34),
    "z loss": moe(router=Router(z_loss_coefficient=0.1)),
    "raw gates": moe(router=Router(gates="raw")),
    "sigmoid": moe(router=Router(score="sigmoid")),
    "balanced by bias": moe(router=Router(score="sigmoid", balance="bias")),
    "groups": moe(router=Router(score="sigmoid", balance="bias", num_groups=2, groups_per_token=1)),
    "one expert": moe(experts_per_token=1),
}
CASES = [
    dict(expert=1, capacity_factor=0.0, dtype="bfloat16"),
    dict(expert=2, capacity_factor=0.0, dtype="bfloat16"),
    dict(expert=2, capacity_factor=0.0, dtype="float32"),
    dict(expert=2, capacity_factor=1.25, dtype="bfloat16"),
]


class EnoughError(Exception):
    """Ends a trace that has come to what the passes keep and hand over."""


# On four devices, two on each of two nodes.
WAYS = [
    dict(dispatch="flat", dispatch_chunks=4),
    dict(dispatch="halo2_dedup", dispatch_chunks=4),
    dict(dispatch="halo3"),
    dict(dispatch="halo3", dispatch_chunks=2, capacity_factor=1.25),
    dict(dispatch="halo2"),
    dict(dispatch="halo2_dedup"),
    dict(dispatch="halo2_dedup", capacity_factor=1.0),
    dict(dispatch="halo2", capacity_factor=1.25, overflow="passes"),
    dict(dispatch="halo2_dedup", dispatch_chunks=2, capacity_factor=1.0, overflow="passes"),
    dict(dispatch="flat", dispatch_chunks=2),
    dict(dispatch="halo2_dedup", dispatch_chunks=2),
    dict(dispatch="halo2_dedup", dispatch_chunks=2, capacity_factor=1.0),
    dict(dispatch="halo3_dedup"),
    dict(dispatch="halo3_dedup", capacity_factor=1.0),
]


def traced(monkeypatch, layer, memory_mode, *, expert, dtype, **dispatch):
    """Bytes that the passes of a layer keep and hand over, per microbatch, on two sequences of 24 tokens."""
    model = ModelConfig(name="traced", d_model=40, vocab_size=56, layers=(layer, layer))
    executor = make_executor(
        model,
        pipe=1 if named(dispatch.get("dispatch", "flat")).waits_for_all else 2,
        expert=expert,
        schedule="zb_h1",
        num_microbatches=2,
        microbatch_size=2,
        seq_len=24,
        memory_mode=memory_mode,
        dtype=dtype,
        **dispatch,
    )

    class Traced(passes.LayerPasses):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            raise EnoughError(self.kept, self.taps)  # The rest of the step need not be traced.

    monkeypatch.setattr(step, "LayerPasses", Traced)
    shape = (2, executor.plan.microbatch_size, 24)
    names = ("tokens", "targets", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    bias = jax.ShapeDtypeStruct((len(model.moe_layers), model.num_experts), jnp.float32)
    with pytest.raises(EnoughError) as found:
        jax.eval_shape(executor.gradients, executor.abstract_params, bias, batch)
    return tuple(sum(one.size * one.dtype.itemsize for one in arrays) for arrays in found.value.args)


def by_turns(rows, columns, *, whole=()):
    """All pairs; every day those of whole rows, and one column for each of the others, which take turns."""
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            slow = row not in whole and j != i % len(columns)
            yield pytest.param(row, column, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("name", "memory_mode"),
    [*by_turns(["dense", "moe", "shared", "residual"], MEMORY_MODES, whole=("dense", "moe"))],
)
def test_bytes_are_those_of_the_traced_passes(monkeypatch, name, memory_mode):
    check(monkeypatch, name, memory_mode, CASES[1] if "ffn" in name or name != "dense" else CASES[0])


# Every day a mode that runs attention again, and one that keeps all of it.
@pytest.mark.parametrize(
    "memory_mode",
    [
        pytest.param(mode, marks=[] if mode in ("layer", "stash") else [pytest.mark.slow])
        for mode in MEMORY_MODES
    ],
)
def test_bytes_with_attention_in_blocks(monkeypatch, memory_mode):
    for name, size in (("LONGEST_WHOLE", 12), ("SMALLEST_BLOCK", 4), ("LARGEST_BLOCK", 12)):
        monkeypatch.setattr(f"models.query_blocks.{name}", size)
    check(monkeypatch, "head norm", memory_mode, CASES[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("memory_mode", MEMORY_MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_bytes_are_those_of_the_traced_passes_for_every_layer(monkeypatch, name, memory_mode, case):
    if isinstance(LAYERS[name].ffn, DenseFFN) and (case["expert"] > 1 or case["capacity_factor"]):
        pytest.skip("a dense layer dispatches nothing")
    check(monkeypatch, name, memory_mode, case)


# Every day every way in one of the modes.
@pytest.mark.parametrize(("way", "memory_mode"), [*by_turns(WAYS, ["named", "products", "stash"])])
def test_bytes_of_dispatchers(monkeypatch, memory_mode, way):
    case = dict(expert=4, dtype="bfloat16", expert_factors=(1, 2, 2)) | way
    check(monkeypatch, "moe", memory_mode, case)


def check(monkeypatch, name, memory_mode, case):
    layer = LAYERS[name]
    of_share = {field: value for field, value in case.items() if field != "expert_factors"}
    share = Share(sequences=2, seq_len=24, nodes=case.get("expert_factors", (1, 1))[1], **of_share)
    counted = tuple(count(40, layer, share, memory_mode) for count in (kept_bytes, tap_bytes))
    assert counted == traced(monkeypatch, layer, memory_mode, **case)
