"""This file is one device: its memory, and how fast products, attention and copies of a given shape run on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from meshes.fields import (
    Provenance,
    as_pairs,
    check_by_dtype,
    check_by_kind,
    check_count,
    check_fraction,
    check_part,
    check_provenance,
    check_range,
    check_rate,
    check_rate_by_size,
    check_size,
    rate_at,
    within_range,
)

# Kinds of work that goes through memory and computes little, each forward and, as they are slower, in its gradient:
# norms with the residuals around them, rotary positions, gated activations, and permutations of rows. Last, bringing
# an array into another layout, the last dimension outermost.
ELEMENTWISE = (
    *("norm", "norm_gradient", "rotary", "rotary_gradient", "activation", "activation_gradient"),
    *("rows", "rows_gradient", "layout"),
)
# Which of the three products of a layer: rows times its weight, gradients times that transposed, rows times gradients.
ProductPart = Literal["forward", "input_gradient", "weight_gradient"]
# Head width at which the efficiencies of `Attention` are stated.
USUAL_HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True)
class Products:
    """How the rate of a matrix product [m, k] x [k, n] depends on its shape.

        rate = peak * efficiency * m / (m + half_rows) * n / (n + half_columns) * k / (k + half_depth)

    At `m = half_rows` a product, otherwise large, has half the rate: those of experts with few tokens are skinny in
    m. The seconds are those of a product with that many more rows, columns and depth: proportional to
    (m + half_rows) (n + half_columns) (k + half_depth).

    Attributes:
      efficiency: rate of a large product over the peak, by dtype name.
      half_rows: m at which the rate is half; 0 if it does not depend on m.
      half_columns: n at which the rate is half.
      half_depth: k at which the rate is half.
      input_gradient_fraction: rate of an input gradient, which reads its weight transposed, over that of a forward
        product of the same shape, by dtype name; 1 where it is not given.
      weight_gradient_fraction: the same of a weight gradient, which sums over rows.
      weight_gradient_half_depth: rows at which a weight gradient has half its rate, as it writes its result however few
        there are; None if that is `half_depth`.
      smallest_flop: FLOP of the smallest product that was measured; None where no range is known.
      largest_flop: of the largest.
      provenance: where the numbers come from.
    """

    efficiency: Mapping[str, float] = field(hash=False)
    half_rows: float = 0.0
    half_columns: float = 0.0
    half_depth: float = 0.0
    input_gradient_fraction: Mapping[str, float] = field(default_factory=dict, hash=False)
    weight_gradient_fraction: Mapping[str, float] = field(default_factory=dict, hash=False)
    weight_gradient_half_depth: float | None = None
    smallest_flop: float | None = None
    largest_flop: float | None = None
    provenance: Provenance = "assumed"

    def __post_init__(self) -> None:
        check_by_dtype("efficiency", self.efficiency, check_fraction, example="bfloat16 = 0.6")
        for name in ("input_gradient_fraction", "weight_gradient_fraction"):
            check_by_dtype(name, getattr(self, name), check_rate, example="float32 = 0.5")
        for name in ("half_rows", "half_columns", "half_depth"):
            check_size(f"{name}", getattr(self, name))
        if self.weight_gradient_half_depth is not None:
            check_size("weight_gradient_half_depth", self.weight_gradient_half_depth)
        check_range("the range of FLOP", self.smallest_flop, self.largest_flop)
        check_provenance("its", self.provenance)

    def fraction(self, m: Any, n: Any, k: Any, *, dtype: str, part: ProductPart = "forward") -> Any:
        """Part of the peak that the product reaches; numbers or arrays."""
        depth = self.half_depth
        if part == "weight_gradient" and self.weight_gradient_half_depth is not None:
            depth = self.weight_gradient_half_depth
        shape = m / (m + self.half_rows) * (n / (n + self.half_columns)) * (k / (k + depth))
        of_part = {
            "forward": {},
            "input_gradient": self.input_gradient_fraction,
            "weight_gradient": self.weight_gradient_fraction,
        }[part]
        return self.efficiency[dtype] * of_part.get(dtype, 1.0) * shape

    def covers(self, flop: Any) -> Any:
        """Whether a product of `flop` lies in the measured range; True where no range is known."""
        return within_range(flop, self.smallest_flop, self.largest_flop)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """How the rate of attention proper (scores, softmax, product with the values) depends on its shape.

        rate = peak * efficiency * S / (S + half_seq) * g(head_dim) / g(128),  g(h) = h / (h + half_head_dim)

    FLOP are those of the causal half of the S^2 pairs, as `models/cost.py` counts them, so an implementation that
    computes all pairs has at most half the efficiency of one that does not.

    Attributes:
      forward_efficiency: rate over the peak for long sequences and heads of 128, by dtype name.
      backward_efficiency: the same of the gradients, with twice the FLOP.
      half_seq: sequence length at which the rate is half; 0 if it does not depend on the length.
      half_head_dim: head width at which the rate is half that of very wide heads.
      smallest_seq: shortest sequence that was measured; None where no range is known.
      largest_seq: longest.
      provenance: where the numbers come from.
    """

    forward_efficiency: Mapping[str, float] = field(hash=False)
    backward_efficiency: Mapping[str, float] = field(hash=False)
    half_seq: float = 0.0
    half_head_dim: float = 0.0
    smallest_seq: float | None = None
    largest_seq: float | None = None
    provenance: Provenance = "assumed"

    def __post_init__(self) -> None:
        for name in ("forward_efficiency", "backward_efficiency"):
            check_by_dtype(name, getattr(self, name), check_fraction, example="bfloat16 = 0.5")
        check_size("half_seq", self.half_seq)
        check_size("half_head_dim", self.half_head_dim)
        check_range("the range of sequence lengths", self.smallest_seq, self.largest_seq)
        check_provenance("its", self.provenance)

    def fraction(self, seq_len: Any, head_dim: Any, *, dtype: str, backward: bool = False) -> Any:
        """Part of the peak that attention reaches; numbers or arrays."""
        efficiency = (self.backward_efficiency if backward else self.forward_efficiency)[dtype]
        width = head_dim / (head_dim + self.half_head_dim) * (1 + self.half_head_dim / USUAL_HEAD_DIM)
        return efficiency * (seq_len / (seq_len + self.half_seq)) * width

    def covers(self, seq_len: Any) -> Any:
        """Whether a sequence length lies in the measured range; True where no range is known."""
        return within_range(seq_len, self.smallest_seq, self.largest_seq)


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, as JAX sees it.

    All rates and seconds are those of one device that works alone. Where simulated devices share the cores of a host,
    `concurrent_devices` is the work of all of them together over that of one alone in the same time, and
    `together_seconds` is what a phase costs in which some work and others wait.

    Attributes:
      memory_bytes: memory of one device; None where unknown.
      memory_bytes_per_second: peak rate of that memory; None where unknown.
      peak_flop_per_second: peak rate of matrix products by dtype name; empty where unknown.
      memory_efficiency: part of `memory_bytes_per_second` that elementwise work and copies reach.
      elementwise_bytes_per_second: rates of work of a kind in `ELEMENTWISE`, in bytes of its operands and results if
        each passes memory once; or pairs of such bytes and the rate there, as caches hold what is small. What is not
        there is bound by the memory.
      matmul: rates of dense matrix products; None where unknown.
      grouped_matmul: rates of the grouped products of experts.
      attention: rates of attention proper.
      launch_seconds: fixed cost of a kernel, or of an operation of a program on CPU.
      call_seconds: fixed cost of starting a compiled program, such as a training step, on all devices of a host.
      reserve_bytes: memory that the runtime, its communication library and fragmentation keep from the program.
      fresh_bytes_per_second: rate at which memory that a program did not have before is written for the first time;
        None where programs get the same memory again and again, as from the pool of an accelerator.
      host_bytes_per_second: rate of copies between host and device; None where unknown.
      interference_fraction: part of its rate that computation loses while a collective runs beside it, whose kernels
        hold compute units and go through the same memory; 0 where nothing is known. `beside_seconds` uses it.
      concurrent_devices: devices of a host that compute at once; None where each has its own hardware.
      gpu: the file in `meshes/gpus/` that describes it to XLA, which can then compile where there is none; "" if none.
      provenance: where the numbers of this table itself come from; the three rates say their own.
    """

    memory_bytes: int | None = None
    memory_bytes_per_second: float | None = None
    peak_flop_per_second: Mapping[str, float] = field(default_factory=dict, hash=False)
    memory_efficiency: float = 1.0
    elementwise_bytes_per_second: Mapping[str, float | Sequence[Sequence[float]]] = field(
        default_factory=dict, hash=False
    )
    matmul: Products | None = None
    grouped_matmul: Products | None = None
    attention: Attention | None = None
    launch_seconds: float = 0.0
    call_seconds: float = 0.0
    reserve_bytes: int = 0
    fresh_bytes_per_second: float | None = None
    host_bytes_per_second: float | None = None
    interference_fraction: float = 0.0
    concurrent_devices: float | None = None
    gpu: str = ""
    provenance: Provenance = "assumed"

    def __post_init__(self) -> None:
        if self.memory_bytes is not None:
            check_count("device.memory_bytes", self.memory_bytes)
        check_by_dtype(
            "device.peak_flop_per_second",
            self.peak_flop_per_second,
            check_rate,
            example="bfloat16 = 191.5e12",
        )
        check_by_kind(
            "device.elementwise_bytes_per_second",
            self.elementwise_bytes_per_second,
            ELEMENTWISE,
            check_rate_by_size,
        )
        # As a file has them they are lists, which would not be equal to what was written.
        by_size = {kind: as_pairs(rates) for kind, rates in self.elementwise_bytes_per_second.items()}
        object.__setattr__(self, "elementwise_bytes_per_second", by_size)
        rates = ("memory", "fresh", "host")
        for name in (f"{rate}_bytes_per_second" for rate in rates):
            if getattr(self, name) is not None:
                check_rate(f"device.{name}", getattr(self, name))
        check_fraction("device.memory_efficiency", self.memory_efficiency)
        check_size("device.launch_seconds", self.launch_seconds)
        check_size("device.call_seconds", self.call_seconds)
        check_count("device.reserve_bytes", self.reserve_bytes, least=0)
        check_part("device.interference_fraction", self.interference_fraction)
        if self.concurrent_devices is not None:
            check_rate("device.concurrent_devices", self.concurrent_devices)
            if self.concurrent_devices < 1:
                raise ValueError(
                    f"device.concurrent_devices must be at least 1, got {self.concurrent_devices!r}"
                )
        if not isinstance(self.gpu, str):
            raise ValueError(f"device.gpu must be a name such as 'h100', got {self.gpu!r}")
        check_provenance("device", self.provenance)

    def known_peak(self, dtype: str) -> float | None:
        """Peak FLOP/s that an MFU may be stated against.

        None where the peak is unknown or assumed, and for devices that share their cores, which have none of their own.
        """
        if self.provenance == "assumed" or self.concurrent_devices is not None:
            return None
        return self.peak_flop_per_second.get(dtype)

    def product_seconds(
        self,
        m: Any,
        n: Any,
        k: Any,
        *,
        dtype: str,
        grouped: bool = False,
        groups: Any = 1,
        part: ProductPart = "forward",
    ) -> Any:
        """Seconds of one product [m, k] x [k, n], launch included; numbers or arrays.

        Args:
          m: rows; of one group, if there are several.
          n: columns.
          k: depth.
          dtype: of the operands.
          grouped: whether it is the product of experts.
          groups: number of groups, each with its own [k, n].
          part: which product of a layer it is; in a weight gradient k counts rows.

        Raises:
          ValueError: if the platform does not say how fast products are.
        """
        table = "grouped_matmul" if grouped else "matmul"
        products: Products = self._rates(table, dtype, "efficiency")
        rate = self._peak(dtype) * products.fraction(m, n, k, dtype=dtype, part=part)
        return 2 * groups * m * n * k / rate + self.launch_seconds

    def attention_seconds(
        self, flop: Any, *, seq_len: Any, head_dim: Any, dtype: str, backward: bool = False
    ) -> Any:
        """Seconds of attention proper of `flop` (of the causal half), launch included; numbers or arrays."""
        part = "backward_efficiency" if backward else "forward_efficiency"
        attention: Attention = self._rates("attention", dtype, part)
        fraction = attention.fraction(seq_len, head_dim, dtype=dtype, backward=backward)
        return flop / (self._peak(dtype) * fraction) + self.launch_seconds

    def stream_seconds(self, num_bytes: Any) -> Any:
        """Seconds of one operation that reads and writes `num_bytes` in all and computes little."""
        if self.memory_bytes_per_second is None:
            raise ValueError(_missing("device.memory_bytes_per_second"))
        return num_bytes / (self.memory_bytes_per_second * self.memory_efficiency) + self.launch_seconds

    def elementwise_seconds(self, kind: str, num_bytes: Any) -> Any:
        """Seconds of one operation of a kind in `ELEMENTWISE`, or of another, that reads and writes `num_bytes`."""
        rates = self.elementwise_bytes_per_second.get(kind)
        if rates is None:
            return self.stream_seconds(num_bytes)
        return num_bytes / rate_at(rates, num_bytes) + self.launch_seconds

    def together_seconds(self, longest_seconds: Any, total_seconds: Any) -> Any:
        """Seconds of a phase in which the devices of one host work side by side and then meet.

        The longest of them bounds it, and so does the work of all, done by `concurrent_devices` at a time:
        `max(longest, total / concurrent_devices)`. Devices that idle in a bubble count nothing towards the total, so
        the others go faster. With hardware of their own it is the longest.
        """
        if self.concurrent_devices is None:
            return longest_seconds
        return np.maximum(longest_seconds, total_seconds / self.concurrent_devices)

    def beside_seconds(self, exchange: Any, computation: Any) -> Any:
        """Seconds of an exchange and of computation that need not wait for each other, alone so long; or arrays.

        While the exchange runs, computation goes at `1 - interference_fraction` of its rate, so that what it saves is
        `min(computation, (1 - interference_fraction) * exchange)`. Devices that share the cores of a host exchange by
        copying, with these cores: there nothing is saved.
        """
        lost = self.interference_fraction if self.concurrent_devices is None else 1.0
        return np.maximum(exchange, computation + lost * exchange)

    def _peak(self, dtype: str) -> float:
        if dtype not in self.peak_flop_per_second:
            raise ValueError(_missing(f"device.peak_flop_per_second.{dtype}"))
        return self.peak_flop_per_second[dtype]

    def _rates(self, table: str, dtype: str, part: str) -> Any:
        rates = getattr(self, table)
        if rates is None:
            raise ValueError(_missing(f"[device.{table}]"))
        if dtype not in getattr(rates, part):
            raise ValueError(_missing(f"device.{table}.{part}.{dtype}"))
        return rates


def _missing(field_name: str) -> str:
    return (
        f"the platform file needs {field_name} to predict seconds, and it has none; add it, or write a file of "
        "measured rates with `python -m piperjax measure`"
    )
