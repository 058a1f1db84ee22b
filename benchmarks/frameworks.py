"""How long a step of another framework takes: the same layers, exchanges and platforms, its own schedule and habits.

Other frameworks differ from our executor where this file says so: ranks wait only for what they need, rows travel
without padding, little is recomputed, gradients are reduced behind the backward pass, heads may be shared by `tensor`
devices, and software takes time beside what the device must do.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from meshes.platform import Platform
from models import cost
from models.config import LayerConfig, ModelConfig, MoEFFN
from piperjax.planner.layer_time import LayerSeconds, price_layer
from piperjax.planner.network import Group, all_gather, all_to_all
from piperjax.planner.partition import partition_layers

COUNT_BYTES = 4  # of a number of rows


class Bubble(NamedTuple):
    """Seconds in which a rank of P waits, over (P - directions) / directions / (stages of a rank).

    Attributes:
      forward, input_gradient, weight_gradient: so many times those of a rank and a microbatch.
      directions: from which microbatches enter the pipeline.
    """

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    directions: int = 1


# Interleaving: Narayanan et al. (arXiv 2104.04473, 2.2). Zero bubble: Qi et al. (arXiv 2401.10241, Table 2); ZB-1p is
# ZB-H1 wherever they measured, and ZB-2p, whose search may keep twice as much, waits for next to nothing. DualPipe:
# DeepSeek-V3 (arXiv 2412.19437, Table 2); a forward beside a backward takes as long as one after the other.
BUBBLES = {
    "interleaved": Bubble(),
    "zb_h1": Bubble(weight_gradient=-1.0),
    "zb_h2": Bubble(weight_gradient=-2.0),
    "zb_2p": Bubble(0.0, 0.0, 0.0),
    "zb_v": Bubble(0.0, 0.0, 0.0),
    "dualpipe": Bubble(1.0, 2.0, -1.0, directions=2),
}


class Software(NamedTuple):
    """What a release of a framework does beside matrix products.

    Attributes:
      streams: seconds of memory-bound work over those of one pass of fused kernels; the host waiting for row counts
        and kernels that are not fused show here.
      exposed: part of the expert exchanges that nothing hides.
      dispatcher: how rows reach their experts, of `network.DISPATCHERS`.
      host_seconds: what the host needs to launch the kernels of one layer, forward and backward; a layer of few tokens
        takes as long.
      reduction: part of the reduction of gradients, and of the gathering of parameters, that nothing hides; 0 where
        both overlap with the last and the first microbatch, which hide what they have time for.
      products: rate of its matrix products over that of the platform, if its libraries are known to reach another.
      counts: whether the numbers of rows travel in an all-to-all of their own, before rows do, forward.
      attention: rate of its attention over that of the platform, if it is known to be another.
    """

    streams: float = 1.0
    exposed: float = 1.0
    dispatcher: str = "flat"
    host_seconds: float = 0.0
    reduction: float = 0.0
    products: float = 1.0
    counts: bool = False
    attention: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of another framework.

    Attributes:
      model: the model, prediction layers included if they are trained.
      platform: where it runs.
      software: habits of the framework.
      devices: how many it takes.
      tensor, context, pipe, virtual, expert: degrees; `virtual` stages per pipe rank.
      expert_tensor: devices that divide the features of an expert; 1 where only other parts are divided by `tensor`.
      microbatch: sequences of one microbatch of one data-parallel group.
      global_batch: sequences of a step.
      seq_len: tokens of a sequence.
      dtype: of products.
      memory_mode: what is recomputed, as in a plan.
      capacity_factor: rows of an expert over the balanced number; 0 drops nothing.
      imbalance: rows of the device with most of them over the mean.
      reductions: how often gradients are reduced in a step; with ZeRO-2 after every microbatch.
      gathers_parameters: whether each layer is gathered for each pass and its gradients scattered (FSDP), exposed.
      eager_passes: passes over the hidden rows of experts, forward and backward, that an activation of many small
        kernels makes beyond those of a fused one.
      schedule: of the pipeline, in `BUBBLES`.
    """

    model: ModelConfig
    platform: Platform
    software: Software
    devices: int
    tensor: int = 1
    context: int = 1
    pipe: int = 1
    virtual: int = 1
    expert: int = 1
    expert_tensor: int = 1
    microbatch: int = 1
    global_batch: int = 1
    seq_len: int = 4096
    dtype: str = "bfloat16"
    memory_mode: str = "stash"
    capacity_factor: float = 0.0
    imbalance: float = 1.0
    reductions: int = 1
    gathers_parameters: bool = False
    eager_passes: float = 0.0
    schedule: str = "interleaved"

    def __post_init__(self):
        if self.devices % (self.tensor * self.context * self.pipe):
            raise ValueError(
                f"{self.devices} devices do not divide by tensor {self.tensor} x context {self.context} x pipe "
                f"{self.pipe}"
            )
        experts = self.model.num_experts or 1
        if experts % self.expert or self.expert > experts:
            raise ValueError(f"{experts} experts do not divide by expert {self.expert}")
        if self.pipe * self.virtual > self.num_layers + 2 * self.outer_layers:
            raise ValueError(
                f"{self.model.num_layers} layers are fewer than pipe {self.pipe} x virtual {self.virtual}"
            )
        share = self.expert * self.expert_tensor
        if self.devices // self.pipe % share:
            raise ValueError(
                f"{self.devices // self.pipe} devices of a stage do not divide by expert {share}"
            )
        if self.global_batch % (self.microbatch * self.groups):
            raise ValueError(
                f"a batch of {self.global_batch} does not divide into microbatches of {self.microbatch} on "
                f"{self.groups} data-parallel groups"
            )

    @property
    def num_layers(self) -> int:
        """Layers, those that predict further tokens included."""
        return self.model.num_layers + self.model.prediction_layers

    @property
    def outer_layers(self) -> bool:
        """Whether embedding and head count as layers of stages: where only so all have as many."""
        stages = self.pipe * self.virtual
        divides = self.num_layers % stages != 0 and (self.num_layers + 2) % stages == 0
        return divides and not self.model.prediction_layers

    @property
    def groups(self) -> int:
        """Data-parallel groups."""
        return self.devices // (self.tensor * self.context * self.pipe)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step."""
        return self.global_batch // (self.microbatch * self.groups)

    @property
    def tokens(self) -> float:
        """Tokens of one microbatch on one device."""
        return self.microbatch * self.seq_len / (self.tensor * self.context)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a step, and useful work.

    Attributes:
      step_seconds: one step.
      tokens_per_second: per device.
      flop_per_second: useful, per device.
      layer: seconds of all layers for one microbatch, by kind of work.
      bubble_fraction: part of the step that the busiest rank waits.
    """

    step_seconds: float
    tokens_per_second: float
    flop_per_second: float
    layer: LayerSeconds
    bubble_fraction: float


def predict(run: Run) -> Prediction:
    """Prices one step: layers, head, the schedule, and the optimizer."""
    model, layers = run.model, _layers(run)
    busy, bubble = _pipelined(run, layers)
    step = busy + bubble + _optimizer_seconds(run, busy / run.num_microbatches)
    tokens = run.global_batch * run.seq_len / (step * run.devices)
    return Prediction(
        step_seconds=step,
        tokens_per_second=tokens,
        flop_per_second=tokens * cost.flop_per_token(model, run.seq_len).step,
        layer=sum(layers, LayerSeconds()),
        bubble_fraction=bubble / step,
    )


def _pipelined(run: Run, layers: list[LayerSeconds]) -> tuple[float, float]:
    """Seconds of work of the busiest rank, and in which it waits for others."""
    seconds = [_layer_total(run, layer) for layer in layers]
    if run.gathers_parameters:
        configs = run.model.layers + run.model.layers[-1:] * run.model.prediction_layers
        gathered = [_gather_seconds(run, config) for config in configs]
        seconds = [a + b for a, b in zip(seconds, gathered, strict=True)]
    if run.outer_layers:
        seconds = [0.0, *seconds, _head_seconds(run)]
    else:
        seconds[-1] += _head_seconds(run)
    by_rank, first = [0.0] * run.pipe, 0
    for stage, count in enumerate(_counts(run, seconds)):
        by_rank[stage % run.pipe] += sum(seconds[first : first + count])
        first += count
    return run.num_microbatches * max(by_rank), sum(by_rank) / run.pipe * _waits(run, layers)


def _counts(run: Run, seconds: list[float]) -> tuple[int, ...]:
    """Layers of each stage: as many in all where their number allows it, else such that stages take as long."""
    stages = run.pipe * run.virtual
    if len(seconds) % stages:
        return partition_layers(tuple(seconds), stages)
    return (len(seconds) // stages,) * stages


def _waits(run: Run, layers: list[LayerSeconds]) -> float:
    """Bubble of a rank over its mean work on a microbatch."""
    bubble, total = BUBBLES[run.schedule], sum(layers, LayerSeconds())
    passes = (total.forward, total.input_gradient, total.weight_gradient)
    times = (bubble.forward, bubble.input_gradient, bubble.weight_gradient)
    part = sum(a * b for a, b in zip(passes, times, strict=True)) / sum(passes)
    return (run.pipe - bubble.directions) / bubble.directions / run.virtual * max(0.0, part)


def _layers(run: Run) -> list[LayerSeconds]:
    price = cache(lambda layer: _divided(run, layer) if _divides(run, layer) else _priced(run, layer))
    return [price(layer) for layer in run.model.layers + run.model.layers[-1:] * run.model.prediction_layers]


def _priced(run: Run, layer: LayerConfig, *, expert_stride: int = 1, imbalance: float = 1.0) -> LayerSeconds:
    group, node, local = run.platform.expert_factors(
        expert=run.expert * expert_stride,
        pipe=run.pipe,
        data=run.devices // (run.pipe * run.expert * expert_stride),
    )
    factors = (group, node, max(1, local // expert_stride))
    seconds = price_layer(
        run.model.d_model,
        layer,
        run.platform,
        tokens=run.tokens,
        seq_len=run.seq_len,
        expert_factors=factors,
        dtype=run.dtype,
        memory_mode=run.memory_mode,
        dispatcher=run.software.dispatcher,
        rows="exact",
        imbalance=imbalance * run.imbalance,
        capacity_factor=run.capacity_factor,
        tensor=run.tensor,
    )
    if not isinstance(layer.ffn, MoEFFN):
        return seconds
    if run.eager_passes:
        hidden = 2 * run.tokens * layer.ffn.experts_per_token * layer.ffn.d_ff
        eager = run.platform.device.stream_seconds(run.eager_passes * hidden)
        seconds = replace(seconds, streams=seconds.streams + eager)
    if not run.software.counts:
        return seconds
    counts = all_to_all(run.platform, factors, COUNT_BYTES * layer.ffn.num_experts).seconds
    return replace(seconds, exchange_forward=seconds.exchange_forward + counts)


def _divides(run: Run, layer: LayerConfig) -> bool:
    return run.expert_tensor > 1 and isinstance(layer.ffn, MoEFFN)


def _divided(run: Run, layer: LayerConfig) -> LayerSeconds:
    """A layer whose experts are divided by `expert_tensor` devices, which gather each other's rows and sum results.

    Every device multiplies the rows of all of them by its part of the features.
    """
    shared = run.expert_tensor
    exchanges = _priced(run, layer, expert_stride=shared)
    part = replace(layer, ffn=replace(layer.ffn, d_ff=max(1, layer.ffn.d_ff // shared)))
    compute = _priced(run, part, expert_stride=shared, imbalance=shared)
    rows_bytes = run.tokens * shared * layer.ffn.experts_per_token * run.model.d_model * 2
    gather = all_gather(run.platform, Group(shared), rows_bytes).seconds
    return replace(
        compute,
        exchange_forward=exchanges.exchange_forward + 2 * gather,
        exchange_backward=exchanges.exchange_backward + 2 * gather,
    )


def _layer_total(run: Run, layer: LayerSeconds) -> float:
    software = run.software
    exchanges = software.exposed * (layer.exchange_forward + layer.exchange_backward)
    products = (layer.dense + layer.experts) / software.products
    attention = layer.attention / software.attention
    device = products + attention + software.streams * layer.streams + exchanges
    return max(device, software.host_seconds)


def _gather_seconds(run: Run, layer: LayerConfig) -> float:
    """Parameters of a layer gathered for forward and for backward, and its gradients reduced, in 16 bits."""
    counted = cost.layer_parameters(run.model, layer)
    return 3 * _gathered_once(run, counted.total - counted.experts, counted.experts)


def _gathered_once(run: Run, dense: float, experts: float) -> float:
    """Seconds in which devices gather so many parameters, or reduce their gradients, in 16 bits."""
    share = run.expert * run.expert_tensor
    buffers = [
        (Group(run.groups, run.tensor, run.devices), dense / run.tensor),
        (Group(run.devices // (run.pipe * share), share, run.devices), experts / share),
    ]
    return sum(
        all_gather(run.platform, group, 2 * size).seconds
        for group, size in buffers
        if group.size > 1 and size
    )


def _head_seconds(run: Run) -> float:
    """Head and loss, forward and backward, for every token that is predicted; and what joins prediction layers."""
    device, D, tokens = run.platform.device, run.model.d_model, run.tokens * run.tensor
    vocabulary, dtype = run.model.vocab_size / run.tensor, "bfloat16"
    shapes = [(tokens, vocabulary, D), (tokens, D, vocabulary), (vocabulary, D, tokens)]
    head = sum(device.product_seconds(*shape, dtype=dtype) for shape in shapes)
    loss = device.stream_seconds(5.5 * 4 * tokens * vocabulary)
    join = 3 * device.product_seconds(run.tokens, D, 2 * D, dtype=dtype)
    further = run.model.prediction_layers
    return ((1 + further) * head + further * join) / run.software.products + (1 + further) * loss


def _optimizer_seconds(run: Run, microbatch: float) -> float:
    """Update of a device's share, and what nothing hides of the exchange of gradients and parameters (ZeRO-1).

    What overlaps is hidden behind the forward of the first microbatch, a third of its seconds, and the backward of the
    last one; gradients have 32 bits there.
    """
    counted = cost.parameters(run.model)
    update = run.platform.device.stream_seconds(28 * counted.total / run.devices)
    if run.gathers_parameters:
        return update
    of_rank = (counted.total - counted.experts) / run.pipe, counted.experts / run.pipe
    once = _gathered_once(run, *of_rank)
    if not run.software.reduction:
        return update + max(0.0, once - microbatch / 3) + max(0.0, 2 * once - 2 * microbatch / 3)
    return update + run.software.reduction * (1 + run.reductions) * once
