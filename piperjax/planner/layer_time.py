"""This file is the seconds of one layer on one device: its work priced by shape, recomputation, and its exchanges.

Backward computes two products for every product of forward, and before them what the memory mode did not keep
(`runtime/passes.py`). A layer with experts exchanges rows with the devices that share them: 2 all-to-alls forward, and
backward 2, or 3 where it needs what experts received again, or 5 where whole stages are run again, but for the last
layer of each (`plan.LAST_LAYER_MODES`). Implementations that weigh what experts return repeat 2 instead of 1.
"""

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple

from meshes.device import ProductPart
from meshes.platform import Device, Platform
from models.config import DenseFFN, LayerConfig, ModelConfig, MoEFFN
from models.query_blocks import is_in_blocks
from piperjax.planner.kept import Share, bytes_read_where_kept, kept_bytes, tap_bytes
from piperjax.planner.later_passes import LaterPasses, later_passes
from piperjax.planner.layer_exchanges import Exchanges, static_exchanges
from piperjax.planner.network import (
    Group,
    Rows,
    all_gather,
    dispatch_transfer,
)
from piperjax.planner.row_blocks import wasted_rows
from piperjax.planner.work import FLOAT32_BYTES, GRADIENT_BYTES, LayerWork, Product, layer_work

# Bytes per element that are read and written to bring an operand into 8 bits: from 16, for two layouts.
CAST_BYTES = 2 + 1 + 1
# What experts return.
DOWN = "experts down"


@dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """Seconds of one layer, one microbatch, on one device; those of several layers add up.

    Attributes:
      forward: computation of F.
      backward: computation of B, recomputation included.
      input_gradient: of I, recomputation included.
      weight_gradient: of W.
      exchange_forward: all-to-alls inside F.
      exchange_backward: all-to-alls inside B, or inside I.
      dense, experts, attention, streams: F and B by what they compute, `forward + backward` in all.
      slices: cutting its weights out of those of all layers, in F and once more in B or I, in none of the fields above:
        where a device has one layer of a kind there is nothing to cut.
    """

    forward: float = 0.0
    backward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    exchange_forward: float = 0.0
    exchange_backward: float = 0.0
    dense: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    streams: float = 0.0
    slices: float = 0.0

    @property
    def total(self) -> float:
        """F and B with their exchanges."""
        return self.forward + self.backward + self.exchange_forward + self.exchange_backward

    def cut(self) -> "LayerSeconds":
        """The same of one layer among several of its kind on a device, with its slices where they belong."""
        added = {"forward": 1, "backward": 1, "input_gradient": 1, "streams": 2, "slices": -1}
        return replace(
            self, **{name: getattr(self, name) + times * self.slices for name, times in added.items()}
        )

    def __add__(self, other: "LayerSeconds") -> "LayerSeconds":
        return LayerSeconds(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def layer_seconds(model: ModelConfig, layer: LayerConfig, platform: Platform, **parameters) -> LayerSeconds:
    """Prices one layer; the parameters are those of `price_layer`, and results are remembered."""
    return price_layer(model.d_model, layer, platform, **parameters)


@lru_cache(maxsize=65536)
def price_layer(
    d_model: int,
    layer: LayerConfig,
    platform: Platform,
    *,
    tokens: float,
    seq_len: int,
    expert_factors: tuple[int, int, int] = (1, 1, 1),
    dtype: str = "bfloat16",
    memory_mode: str = "layer",
    dispatcher: str = "flat",
    dispatch_chunks: int = 1,
    rows: Rows = "static",
    imbalance: float = 1.0,
    capacity_factor: float = 0.0,
    overflow: str = "drop",
    gradient_dtype: str = "float32",
    tensor: int = 1,
) -> LayerSeconds:
    """Seconds of one layer on one device.

    Args:
      d_model: D.
      layer: the layer.
      platform: the machine.
      tokens: tokens of one microbatch that live on the device.
      seq_len: tokens of a sequence.
      expert_factors: the expert axis as (group, node, local).
      dtype: of the operands of products with weights. Below 16 bits, everything else stays in bfloat16.
      memory_mode: what forward keeps, as in a plan.
      dispatcher: a name in `network.DISPATCHERS`.
      dispatch_chunks: parts in which tokens travel.
      rows: "static" buffers that hold the worst case, as our executor has, or "exact".
      imbalance: rows of the busiest device over the mean.
      capacity_factor: rows per destination over the balanced number that there is room for; 0 for all.
      overflow: what becomes of others, as in a plan.
      gradient_dtype: in which gradients are added up, as in a plan.
      tensor: devices that share heads and dense features, and each other's tokens.

    Raises:
      ValueError: if the platform does not say how fast something is.
    """
    device, ffn = platform.device, layer.ffn
    group, node, local = expert_factors
    expert = group * node * local
    base = "bfloat16" if dtype.startswith("float8") else dtype
    itemsize = {"float64": 8, "float32": FLOAT32_BYTES}.get(base, 2)
    share, buffer = None, None
    if rows == "static":
        share = Share(
            sequences=round(tokens / seq_len),
            seq_len=seq_len,
            expert=expert,
            nodes=group * node,
            dispatch=dispatcher,
            dispatch_chunks=dispatch_chunks,
            capacity_factor=capacity_factor,
            overflow=overflow,
            dtype=base,
        )
        buffer = share.buffers(ffn) if isinstance(ffn, MoEFFN) else None
    work = layer_work(
        d_model,
        layer,
        tokens=tokens,
        seq_len=seq_len,
        expert=expert,
        tensor=tensor,
        imbalance=imbalance,
        buffer=buffer,
        itemsize=itemsize,
    )
    weighs = share is not None
    wasted, empty = 0.0, 0.0
    if buffer is not None and device.concurrent_devices is not None:  # A CPU multiplies in blocks.
        wasted = wasted_rows(buffer.experts // dispatch_chunks, ffn.num_experts // expert)
        empty = itemsize * max(0.0, buffer.experts - max(p.rows * p.groups for p in work.products))
    pricing = _Pricing(
        device,
        work,
        dtype,
        base,
        seq_len,
        dispatch_chunks,
        weighs,
        wasted,
        empty,
        gradient_bytes=GRADIENT_BYTES[gradient_dtype],
    )
    held = Held()
    if share is not None:
        kept, taps = (count(d_model, layer, share, memory_mode) for count in (kept_bytes, tap_bytes))
        weights = itemsize * sum(p.weights for p in work.products)
        in_place = bytes_read_where_kept(layer, share, memory_mode)
        held = Held(kept_bytes=kept, in_place_bytes=in_place, tap_bytes=taps, weight_bytes=weights)
    later = LaterPasses() if buffer is None else later_passes(platform, share, ffn, imbalance)
    compute = pricing.with_later_passes(pricing.seconds(memory_mode, held), later, itemsize)
    row_bytes = d_model * itemsize
    forward = backward = 0.0
    if isinstance(ffn, MoEFFN) and expert > 1:
        exchange = dict(
            expert_factors=expert_factors,
            row_bytes=row_bytes,
            num_experts=ffn.num_experts,
            experts_per_token=ffn.experts_per_token,
            dispatcher=dispatcher,
            capacity_factor=capacity_factor,
        )
        if rows == "static":
            found = static_exchanges(
                platform,
                chunks=dispatch_chunks,
                forward=pricing.experts_forward,
                backward=pricing.experts_input_gradient,
                tokens=tokens / dispatch_chunks,
                **exchange,
            )
        else:
            exchange |= dict(tokens=tokens, rows=rows, imbalance=imbalance, chunks=dispatch_chunks)
            exchange |= dict(num_groups=ffn.router.num_groups, groups_per_token=ffn.router.groups_per_token)
            both = 2 * dispatch_transfer(platform, **exchange).seconds
            found = Exchanges(both, both, both)  # Others weigh what experts return: they need it again.
        forward, backward = later.beside(
            found.once, found.back, there=found.there, again=found.again(memory_mode), chunks=dispatch_chunks
        )
    if tensor > 1:
        one_way = _parts(ffn) * all_gather(platform, Group(tensor), tokens * tensor * row_bytes).seconds
        forward, backward = forward + 2 * one_way, backward + 3 * one_way
    return LayerSeconds(**compute, exchange_forward=forward, exchange_backward=backward)


def _parts(ffn: DenseFFN | MoEFFN) -> int:
    """Parts of a layer before which tokens are gathered and after which they are summed, if a tensor axis shares them.

    Backward it is the reverse, and a gather for gradients of weights (Korthikanti et al., arXiv:2205.05198, 4.2.2).
    """
    return 1 + (not isinstance(ffn, MoEFFN) or bool(ffn.shared_d_ff or ffn.dense_residual_d_ff))


class Held(NamedTuple):
    """Bytes of a layer in buffers with room for several: of layers, microbatches, or both (`runtime/slots.py`).

    What is written there is copied, and so is what is read, but for what one operation reads alone. Other frameworks
    keep every tensor for itself.

    Attributes:
      kept_bytes: what forward leaves for backward.
      in_place_bytes: of that what is read without a copy.
      tap_bytes: what an input gradient leaves for a weight gradient.
      weight_bytes: weights, which forward and backward cut out of those of all layers, if there are others.
    """

    kept_bytes: float = 0.0
    in_place_bytes: float = 0.0
    tap_bytes: float = 0.0
    weight_bytes: float = 0.0


@dataclass(frozen=True)
class _Pricing:
    """The work of a layer on a device, for products in `dtype` and everything else in `base`.

    Experts work on `chunks` of the rows, one after the other, and weigh them by their gates, as our executor's do, or
    return them as they are. Beside the rows of an expert in a chunk, `wasted` ones are multiplied that fill its last
    block, and zeros are written to places of a buffer that no row is in, `empty` bytes for every feature. Gradients are
    added up in elements of `gradient_bytes`.
    """

    device: Device
    work: LayerWork
    dtype: str
    base: str
    seq_len: int
    chunks: int = 1
    weighs: bool = False
    wasted: float = 0.0
    empty: float = 0.0
    gradient_bytes: int = FLOAT32_BYTES

    @property
    def experts_forward(self) -> float:
        """Seconds of the products of routed experts, forward."""
        return sum(self._product(p) for p in self.work.products if p.groups)

    @property
    def experts_again(self) -> float:
        """Those of them that a backward which starts from rows repeats."""
        return sum(self._product(p) for p in self.work.products if p.groups and p.name != DOWN)

    @property
    def experts_input_gradient(self) -> float:
        """Seconds of their input gradients."""
        return sum(self._input_gradient(p) for p in self.work.products if p.groups)

    def seconds(self, memory_mode: str, held: Held) -> dict[str, float]:
        """Fields of `LayerSeconds` without exchanges."""
        forward = self._forward(lambda _: True, attention=1.0, streams=lambda _: True)
        copied = (held.kept_bytes, held.kept_bytes - held.in_place_bytes, held.weight_bytes)
        written, read, slices = (self._stream(2 * part, 1) if part else 0.0 for part in copied)
        taps = self._stream(2 * held.tap_bytes, 1) if held.tap_bytes else 0.0
        forward["streams"] += written
        again = self._recomputed(memory_mode)
        products = self.work.products
        inputs = self._by_kind(products, self._input_gradient)
        weights = self._by_kind(products, self._weight_gradient)
        inputs["attention"] = self._attention(backward=True)
        inputs["streams"] = sum(
            self._stream(s.backward_bytes, s.launches, s.backward_kind) for s in self.work.streams
        )
        if self.dtype != self.base:
            inputs["streams"] += sum(
                self._stream(CAST_BYTES * p.rows * max(p.groups, 1) * p.columns, 1)
                for p in products
                if not p.is_wide
            )
        for p in products:  # Added to what other microbatches left.
            weights["streams"] += self._stream(2 * self.gradient_bytes * p.weights, 0)
        inputs["streams"] += read
        total = {kind: forward[kind] + again[kind] + inputs[kind] + weights[kind] for kind in forward}
        input_gradient = sum(again.values()) + sum(inputs.values())
        weight_gradient = sum(weights.values())
        return {
            "forward": sum(forward.values()),
            "backward": input_gradient + weight_gradient,
            "input_gradient": input_gradient + taps,
            "weight_gradient": weight_gradient + taps,
            "slices": slices,
            **total,
        }

    def with_later_passes(
        self, seconds: dict[str, float], later: LaterPasses, itemsize: int
    ) -> dict[str, float]:
        """The same with passes after the first, which go through buffers of one chunk and read all weights again.

        Their products are among those of all rows already, but for those of the forward that backward runs again.
        """
        if not later.number:
            return seconds
        rows = [s for s in self.work.streams if s.is_of_rows]
        weights = itemsize * sum(p.weights for p in self.work.products if p.groups)
        once = self._stream(weights, 2)
        forward = once + sum(self._stream(s.forward_bytes / self.chunks, s.launches, s.kind) for s in rows)
        inputs = once + sum(
            self._stream(s.backward_bytes / self.chunks, s.launches, s.backward_kind) for s in rows
        )
        # Gradients of weights are written, and added to those of other passes.
        added = self._stream(4 * weights, 4)
        again = later.number * forward + later.waiting_fraction * self.experts_again
        more = {
            "forward": later.number * forward,
            "backward": again + later.number * (inputs + added),
            "input_gradient": again + later.number * inputs,
            "weight_gradient": again + later.number * added,
        }
        more["streams"] = more["forward"] + more["backward"]
        return {name: value + more.get(name, 0.0) for name, value in seconds.items()}

    def _recomputed(self, memory_mode: str) -> dict[str, float]:
        everything, nothing = (lambda _: True), (lambda _: False)

        def is_needed(p: Product) -> bool:
            # What experts return is for the gradients of gates, unless hidden rows were weighed.
            return not p.is_last and not (self.weighs and p.name == DOWN)

        needed = {
            "stage": (is_needed, 1.0, everything),
            "layer": (is_needed, 1.0, everything),
            # Rows are kept as experts receive them and, if gradients need that, as they return them.
            "named": (lambda p: not p.is_last and p.name != DOWN, 1.0, lambda s: not s.is_sent),
            # Of attention in blocks, what its backward needs is kept.
            "products": (nothing, 0.0 if is_in_blocks(self.seq_len) else 1.0, everything),
            "stash": (nothing, 0.0, nothing),
        }[memory_mode]
        again = self._forward(needed[0], attention=needed[1], streams=needed[2])
        if memory_mode == "stage":
            first = self._forward(everything, attention=1.0, streams=everything)
            again = {kind: seconds + first[kind] for kind, seconds in again.items()}
        return again

    def _forward(self, is_needed, *, attention: float, streams) -> dict[str, float]:
        products = [p for p in self.work.products if is_needed(p)]
        seconds = self._by_kind(products, self._product)
        seconds["attention"] = attention * self._attention()
        seconds["streams"] = sum(
            self._stream(s.forward_bytes, s.launches, s.kind) for s in self.work.streams if streams(s)
        )
        if self.dtype != self.base:
            seconds["streams"] += sum(
                self._stream(CAST_BYTES * p.rows * max(p.groups, 1) * p.depth, 1)
                for p in products
                if not p.is_wide
            )
        return seconds

    @staticmethod
    def _by_kind(products, price) -> dict[str, float]:
        seconds = {"dense": 0.0, "experts": 0.0, "attention": 0.0, "streams": 0.0}
        for product in products:
            seconds["experts" if product.groups else "dense"] += price(product)
        return seconds

    def _product(self, p: Product) -> float:
        return self._multiply(p, p.rows, p.columns, p.depth)

    def _input_gradient(self, p: Product) -> float:
        return self._multiply(p, p.rows, p.depth, p.columns, part="input_gradient")

    def _weight_gradient(self, p: Product) -> float:
        return self._multiply(p, p.depth, p.columns, p.rows, part="weight_gradient")

    def _multiply(self, p: Product, m: float, n: float, k: float, *, part: ProductPart = "forward") -> float:
        dtype = self.dtype
        if p.is_wide:
            table = self.device.matmul
            dtype = "float32" if table and "float32" in table.efficiency else self.base
        chunks, wasted = (self.chunks, self.wasted) if p.groups else (1, 0.0)
        sums_rows = part == "weight_gradient"
        rows, depth = (m, k / chunks + wasted) if sums_rows else (m / chunks + wasted, k)
        zeros = self._stream(self.empty * n, 1) if p.groups and self.empty and not sums_rows else 0.0
        return zeros + chunks * self.device.product_seconds(
            rows,
            n,
            depth,
            dtype=dtype,
            grouped=p.groups > 0,
            groups=max(p.groups, 1),
            part=part,
        )

    def _attention(self, *, backward: bool = False) -> float:
        return self.device.attention_seconds(
            self.work.attention_flop * (2 if backward else 1),
            seq_len=self.seq_len,
            head_dim=self.work.head_dim,
            dtype=self.base,
            backward=backward,
        )

    def _stream(self, num_bytes: float, launches: int, kind: str = "memory") -> float:
        if not launches:
            return self.device.elementwise_seconds(kind, num_bytes) - self.device.launch_seconds
        return launches * self.device.elementwise_seconds(kind, num_bytes / launches)
