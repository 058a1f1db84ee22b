"""Frameworks that were run on Frontier: what they keep, their habits, the scripts of published runs, counted FLOP."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from benchmarks.frameworks import Run, Software
from benchmarks.record import UnknownRowError, platform_of
from benchmarks.records import BRIDGE_STREAMS, DROPPING
from models import cost
from models.config import GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN

BYTES = 2  # of an element of a 16-bit type
# Uneven exchanges make the host wait for counts (as Bridge's releases up to 26.04 do); Piper's overhead is not known.
WAITING = Software(streams=BRIDGE_STREAMS["26.02"], dispatcher="halo2_dedup")
STATIC = DROPPING._replace(dispatcher="halo2_dedup")
# DeepSpeed's ZeRO as its configuration has it: `overlap_comm` is not asked for. Nor is `--use-rbd`, which would send
# rows once per node. Products reach 60 % of the peak in its authors' profiles of single layers.
XMOE = WAITING._replace(dispatcher="flat", reduction=1.0, products=0.88, counts=True)
SEQUENCES = {"xmoe-small": 2048, "xmoe-medium": 4096, "xmoe-large": 4096, "xmoe-super": 4096}


@dataclass(frozen=True, kw_only=True)
class System:
    """A framework on Frontier.

    Attributes:
      rows: copies of the rows of routed tokens that a layer keeps.
      capacity: slots of the experts over rows.
      mask: whether it keeps a one-hot mask [tokens, experts, slots].
      pipelines: whether layers can be divided over pipe ranks.
      replicates: whether experts may be on more than one expert axis, or pipe x expert is all of the devices.
      tensor: largest number of devices that share heads.
      divides_experts: whether these share the weights of experts, too; rows are on each of them.
      recomputes: whether layers may be recomputed.
      software: habits.
    """

    rows: float
    capacity: float = 1.0
    mask: bool = False
    pipelines: bool = False
    replicates: bool = True
    tensor: int = 1
    divides_experts: bool = False
    recomputes: bool = True
    software: Software = WAITING


# Copies of rows: dispatched, received, returned and combined (DeepSpeed-MoE), one fewer (Tutel), received and returned
# (X-MoE). They give the 2.81, 1.95 and 1.21 GiB of a layer of X-MoE Large that X-MoE publishes in its Table 4.
SYSTEMS = {
    "DeepSpeed-MoE": System(rows=4, capacity=1.25, mask=True, recomputes=False),
    "DeepSpeed-TED": System(
        rows=4, capacity=1.25, mask=True, recomputes=False, tensor=4, divides_experts=True
    ),
    "Tutel": System(rows=3, capacity=1.25, recomputes=False),
    "X-MoE": System(rows=2, tensor=8, software=XMOE),
    "theory": System(rows=2),
    # Its planner's rule: PP x EP = devices, data parallelism is inside EP (section 4 of the paper).
    "Piper": System(rows=2, pipelines=True, replicates=False, software=STATIC),
}


class Script(NamedTuple):
    """How a published run divided its devices, with one sequence in a microbatch where nothing else is said.

    Attributes:
      heads: of attention, D / heads wide.
      expert, tensor, microbatch, global_batch, reductions: as in `frameworks.Run`.
      memory_mode: what backward repeats.
    """

    heads: int
    expert: int
    tensor: int = 1
    microbatch: int = 1
    global_batch: int = 1_024
    memory_mode: str = "stash"
    reductions: int = 1

    def run(self, model: ModelConfig, row: Mapping[str, Any], system: System) -> Run:
        """The run that a row of these devices is of; of new routers some expert is as full as its capacity allows."""
        width = model.d_model // self.heads
        attention = GroupedQueryAttention(num_heads=self.heads, num_kv_heads=self.heads, head_dim=width)
        layers = tuple(replace(layer, attention=attention) for layer in model.layers)
        options = self._asdict()
        del options["heads"]
        return Run(
            model=replace(model, layers=layers, vocab_size=GPT2_VOCABULARY),
            platform=platform_of(row["hw"]),
            software=system.software,
            devices=row["gpus"],
            seq_len=SEQUENCES[row["model"]],
            imbalance=row.get("cap_factor", 1.0),
            **options,
        )


# Megatron pads the 50,257 tokens of GPT-2 to a multiple of 128.
GPT2_VOCABULARY = 50_304
# By framework, model and devices. https://github.com/yueming-yuan/Megatron-DeepSpeed-X-MoE, examples_xmoe:
# scripts-frontier/n8-Small-XMoE.slurm, n256-Small-XMoE, n256-Medium-XMoE and n256-Large-XMoE, and of the model for
# 1,024 devices eval-scripts/pushing-limit/n1024-XL-2560-tp8-ep256-z2-selective-checkpoint, which repeats attention,
# norms and what experts have inside; with ZeRO-2 gradients are reduced after each of its 8 microbatches.
SCRIPTS = {
    ("X-MoE", "xmoe-small", 8): Script(heads=16, expert=8, microbatch=4, global_batch=256),
    ("X-MoE", "xmoe-small", 256): Script(heads=16, expert=8, microbatch=4, global_batch=8_192),
    ("X-MoE", "xmoe-medium", 256): Script(heads=128, expert=64),
    ("X-MoE", "xmoe-large", 256): Script(heads=128, expert=64, tensor=2),
    ("X-MoE", "xmoe-super", 1_024): Script(
        heads=128, expert=256, tensor=8, memory_mode="named", reductions=8
    ),
}


# --- counted FLOP ----------------------------------------------------------------------------------------------


def counted_layer_flop(model: ModelConfig, layer: LayerConfig, seq_len: int) -> int:
    """Forward FLOP of a layer per token as X-MoE's counter has them.

    Its `throughput_calculator` (megatron/utils.py in the repository of the scripts) counts all S^2 pairs of attention
    and no router. Piper compares its rates with X-MoE's, and the 60 to 120 TFLOP/s that it gives for attention are what
    X-MoE's authors profiled on the same machine, 57 to 92, only if all pairs count there, too.
    """
    flop = cost.layer_flop(model, layer, seq_len)
    return flop.total + flop.attention_scores - flop.router


def counted_flop(model: ModelConfig, seq_len: int) -> int:
    """The same of a model's step."""
    layers = sum(counted_layer_flop(model, layer, seq_len) for layer in model.layers)
    return 3 * (layers + cost.flop_per_token(model, seq_len).head)


# --- memory ----------------------------------------------------------------------------------------------------


def moe_layer(model: ModelConfig) -> LayerConfig:
    """The first layer with experts.

    Raises:
      UnknownRowError: if there is none.
    """
    found = next((layer for layer in model.layers if isinstance(layer.ffn, MoEFFN)), None)
    if found is None:
        raise UnknownRowError(f"{model.name} has no experts")
    return found


def moe_bytes_per_token(model: ModelConfig, system: System, tokens: int) -> float:
    """Bytes that the routed part of one layer keeps per token, of `tokens` on a device."""
    layer = moe_layer(model)
    kept = cost.layer_activation_bytes(model, layer, tokens)
    k = layer.ffn.experts_per_token
    mask = BYTES * system.capacity * tokens * k if system.mask else 0
    return system.capacity * (system.rows * kept.dispatch + kept.experts) + mask


def needed_bytes(model: ModelConfig, system: System, run: Run) -> float:
    """Bytes on a device: state with ZeRO-1, what layers keep for the microbatches in flight, logits, and a reserve."""
    counted = cost.parameters(model)
    tensor = run.tensor
    dense = (counted.total - counted.experts) / (run.pipe * tensor)
    experts = counted.experts / (run.pipe * run.expert * (tensor if system.divides_experts else 1))
    copies = max(1, run.devices // (run.pipe * run.expert))
    state = 4 * (dense + experts) + 12 * (dense / run.groups + experts / copies)
    layer = cost.layer_activation_bytes(model, moe_layer(model), run.seq_len)
    tokens = run.tokens if tensor == 1 or not system.mask else run.tokens * tensor
    around = (layer.norms + layer.attention) / (tensor if system.mask else 1)
    routed = moe_bytes_per_token(model, system, int(tokens))
    one_layer = tokens * (around + routed)
    layers = model.num_layers / run.pipe * min(run.pipe, run.num_microbatches)
    stored = one_layer if run.memory_mode == "stash" else tokens * BYTES * model.d_model
    kept = layers * stored + (one_layer if run.memory_mode != "stash" else 0)
    return state + kept + 6 * tokens * model.vocab_size + run.platform.device.reserve_bytes
