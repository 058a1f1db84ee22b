"""This file makes a machine description out of measurements: rates by shape, links by message size.

Devices that share the cores of a host are measured all at once, because that is how they are used. With n devices of
which c = `concurrent_devices` proceed at once,

    seconds of one alone = seconds of each when all work together * c / n

and that is what a platform file holds. A phase in which devices work for w_i such seconds then takes
`Device.together_seconds`, max(max w_i, sum w_i / c): what was measured if all are at work, and less if some wait in a
bubble. c itself is n times what one alone takes over what all take together. Seconds of collectives are those of all
groups of the mesh at once, whatever c is, and are added to those of the phases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from meshes.device import Attention, Device, ProductPart, Products
from meshes.platform import Link, Platform
from piperjax.planner import network
from piperjax.planner.fitting import Fit, fit_positive, quality
from piperjax.planner.network import Group

# Devices that reach this part of n times one alone are said not to share anything.
INDEPENDENT = 0.9
# Message of nothing within which a link cannot be quicker than `Link` allows.
SHORTEST_SECONDS = 1e-8


class ProductSample(NamedTuple):
    """One matrix product [m, k] x [k, n] for each of `groups` experts; 0 groups is a dense product."""

    m: int
    n: int
    k: int
    groups: int
    dtype: str
    part: ProductPart
    seconds: float

    @property
    def flop(self) -> float:
        """Floating-point operations."""
        return 2.0 * max(self.groups, 1) * self.m * self.n * self.k

    def predicted(self, device: Device) -> float:
        """Seconds that a device's rates say, working alone."""
        return device.product_seconds(
            self.m,
            self.n,
            self.k,
            dtype=self.dtype,
            grouped=self.groups > 0,
            groups=max(self.groups, 1),
            part=self.part,
        )


class AttentionSample(NamedTuple):
    """Attention proper, alone or followed by its gradients.

    Attributes:
      flop: of the forward pass, as `models/cost.py` counts them; gradients have twice as many.
      seq_len, head_dim, dtype: its shape.
      backward: whether `seconds` are those of the forward pass and of the gradients after it.
      seconds: measured.
    """

    flop: float
    seq_len: int
    head_dim: int
    dtype: str
    backward: bool
    seconds: float


class BytesSample(NamedTuple):
    """Something whose cost depends on bytes: elementwise work, or a copy between host and device."""

    num_bytes: float
    seconds: float


class ElementwiseSample(NamedTuple):
    """Work of a kind in `meshes.device.ELEMENTWISE`, and the bytes of its operands and results."""

    kind: str
    num_bytes: float
    seconds: float


class ExchangeSample(NamedTuple):
    """One collective in every group of the mesh at once.

    Attributes:
      collective: "permute", "all_gather", "reduce_scatter", "all_reduce", "all_to_all", or "hierarchical": an
        all-to-all in each of the groups, one after the other.
      groups: where its members sit, inner first.
      num_bytes: as the functions of `network` count them.
      seconds: of one.
    """

    collective: str
    groups: tuple[Group, ...]
    num_bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured on a machine; seconds of devices that work all at once.

    Attributes:
      num_local: devices that worked at once on one host.
      alone: pairs of seconds of the same work (one device alone, all together).
      launch_seconds: of one operation of a program.
      call_seconds: of an empty program.
      products, attention, streams, elementwise, exchanges, copies, fresh: samples.
    """

    num_local: int
    alone: tuple[tuple[float, float], ...] = ()
    launch_seconds: float = 0.0
    call_seconds: float = 0.0
    products: tuple[ProductSample, ...] = ()
    attention: tuple[AttentionSample, ...] = ()
    streams: tuple[BytesSample, ...] = ()
    elementwise: tuple[ElementwiseSample, ...] = ()
    exchanges: tuple[ExchangeSample, ...] = ()
    copies: tuple[BytesSample, ...] = ()
    fresh: tuple[BytesSample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A machine description and how well it describes what was measured.

    Attributes:
      platform: the machine.
      fits: by table of the file, or by the name of a link, and of a link also by collective: "memory all_reduce".
    """

    platform: Platform
    fits: Mapping[str, Fit] = field(default_factory=dict)


def calibrate(platform: Platform, measurements: Measurements, *, shares_cores: bool) -> Calibration:
    """Returns the platform with every rate that was measured in the place of what it had.

    Args:
      platform: the machine as it was known: its levels, memory, and peaks if they are known.
      measurements: what was measured.
      shares_cores: whether devices of a host are simulated by its cores.
    """
    fits: dict[str, Fit] = {}
    concurrent = concurrent_devices(measurements) if shares_cores else None
    scale = 1.0 if concurrent is None else concurrent / measurements.num_local
    launch = measurements.launch_seconds * scale
    device = replace(
        platform.device,
        launch_seconds=_rounded(launch),
        call_seconds=_rounded(measurements.call_seconds),
        concurrent_devices=None if concurrent is None else _rounded(concurrent),
        provenance="measured" if shares_cores else platform.device.provenance,
    )
    products = [s._replace(seconds=s.seconds * scale) for s in measurements.products]
    attention = [s._replace(seconds=s.seconds * scale) for s in measurements.attention]
    streams = [s._replace(seconds=s.seconds * scale) for s in measurements.streams]
    for table, is_grouped in (("matmul", False), ("grouped_matmul", True)):
        samples = [s for s in products if bool(s.groups) == is_grouped]
        if samples:
            device, fits[f"device.{table}"] = _with_products(
                device, table, samples, keep_peak=not shares_cores
            )
    if attention:
        device, fits["device.attention"] = _with_attention(device, attention)
    if streams:
        device, fits["device"] = _with_streams(device, streams, keep_peak=not shares_cores)
    if measurements.fresh:
        device = replace(device, fresh_bytes_per_second=_fresh_rate(measurements.fresh, device, scale))
    by_kind = {
        kind: _rates_by_size([s for s in measurements.elementwise if s.kind == kind], scale)
        for kind in dict.fromkeys(s.kind for s in measurements.elementwise)
    }
    device = replace(device, elementwise_bytes_per_second=by_kind or device.elementwise_bytes_per_second)
    if measurements.copies:
        device = replace(device, host_bytes_per_second=_median_rate(measurements.copies, 1.0))
    platform = replace(platform, device=device)
    if measurements.exchanges:
        links = tuple(
            replace(
                link, medium="memory" if shares_cores and link.devices <= measurements.num_local else "wire"
            )
            for link in platform.links
        )
        platform = _with_links(replace(platform, links=links), measurements.exchanges, fits)
    return Calibration(platform=platform, fits=fits)


def _rates_by_size(
    samples: Sequence[ElementwiseSample], scale: float
) -> float | tuple[tuple[float, float], ...]:
    """The rate of each size that was measured; one number if there is one size."""
    sizes = sorted({s.num_bytes for s in samples})
    rates = [_median_rate([s for s in samples if s.num_bytes == size], scale) for size in sizes]
    return rates[0] if len(sizes) == 1 else tuple(zip(sizes, rates, strict=True))


def _median_rate(samples: Sequence[BytesSample | ElementwiseSample], scale: float) -> float:
    """Bytes per second, if the seconds of one device alone are `scale` of those measured."""
    return _rounded(float(np.median([s.num_bytes / (s.seconds * scale) for s in samples])))


def concurrent_devices(measurements: Measurements) -> float:
    """Devices of a host that truly compute at once: n times what one alone takes, over what all take together."""
    n = measurements.num_local
    ratios = [n * alone / together for alone, together in measurements.alone]
    found = float(np.clip(np.median(ratios), 1.0, n)) if ratios else 1.0
    return float(n) if found > INDEPENDENT * n else found


def _with_products(
    device: Device, table: str, samples: Sequence[ProductSample], *, keep_peak: bool
) -> tuple[Device, Fit]:
    dtypes = sorted({s.dtype for s in samples})
    m, n, k, groups = (
        np.array([getattr(s, name) for s in samples], float) for name in ("m", "n", "k", "groups")
    )
    which = np.array([dtypes.index(s.dtype) for s in samples])
    seconds = [s.seconds for s in samples]
    fastest = [max(s.flop / s.seconds for s in samples if s.dtype == dtype) for dtype in dtypes]
    limits = np.array([device.peak_flop_per_second.get(d, np.inf) if keep_peak else np.inf for d in dtypes])

    is_input, is_weight = (
        np.array([s.part == part for s in samples]) for part in ("input_gradient", "weight_gradient")
    )

    def law(values: np.ndarray) -> np.ndarray:
        rows, columns, depth, weight_depth = values[:4]
        depth = np.where(is_weight, weight_depth, depth)
        rates, of_inputs, of_weights = np.split(values[4:], 3)
        fraction = np.where(is_input, of_inputs[which], np.where(is_weight, of_weights[which], 1.0))
        rate = np.minimum(rates, limits)[which] * fraction
        return (
            2 * np.maximum(groups, 1) * (m + rows) * (n + columns) * (k + depth) / rate
            + device.launch_seconds
        )

    fit = fit_positive(
        law, seconds, [16.0, 16.0, 16.0, 16.0, *(1.2 * rate for rate in fastest), *(1.0 for _ in 2 * dtypes)]
    )
    found, of_inputs, of_weights = np.split(np.array(fit.values[4:]), 3)
    rates = dict(zip(dtypes, np.minimum(found, limits), strict=True))
    peaks = dict(device.peak_flop_per_second) if keep_peak or table == "grouped_matmul" else {}
    for dtype, rate, seen in zip(dtypes, rates.values(), fastest, strict=True):
        peaks[dtype] = _rounded(max(rate, seen, peaks.get(dtype, 0.0)))
    flop = [s.flop for s in samples]
    described = Products(
        efficiency={dtype: _part(rate / peaks[dtype]) for dtype, rate in rates.items()},
        half_rows=_rounded(fit.values[0]),
        half_columns=_rounded(fit.values[1]),
        half_depth=_rounded(fit.values[2]),
        input_gradient_fraction=dict(zip(dtypes, map(_rounded, of_inputs), strict=True)),
        weight_gradient_fraction=dict(zip(dtypes, map(_rounded, of_weights), strict=True)),
        weight_gradient_half_depth=_rounded(fit.values[3]) if is_weight.any() else None,
        smallest_flop=min(flop),
        largest_flop=max(flop),
        provenance="measured",
    )
    return _raise_peaks(device, peaks, table, described), fit


def _raise_peaks(device: Device, peaks: Mapping[str, float], table: str, described: Products) -> Device:
    """Puts in the table; where grouped products beat the peak so far, dense ones reach a smaller part of it."""
    dense = device.matmul
    if table == "grouped_matmul" and dense is not None:
        old = device.peak_flop_per_second
        parts = {dtype: _part(part * old[dtype] / peaks[dtype]) for dtype, part in dense.efficiency.items()}
        device = replace(device, matmul=replace(dense, efficiency=parts))
    return replace(device, peak_flop_per_second=dict(peaks), **{table: described})


def _with_attention(device: Device, samples: Sequence[AttentionSample]) -> tuple[Device, Fit]:
    dtypes = sorted({s.dtype for s in samples})
    which = np.array([dtypes.index(s.dtype) for s in samples])
    followed = np.array([s.backward for s in samples])
    flop = np.array([s.flop for s in samples])
    length, width = np.array([s.seq_len for s in samples]), np.array([s.head_dim for s in samples])
    peak = np.array([device.peak_flop_per_second[s.dtype] for s in samples])

    def law(values: np.ndarray) -> np.ndarray:
        half_seq, half_head_dim = (float(value) for value in values[:2])
        shape = Attention(
            forward_efficiency={"": 1.0},
            backward_efficiency={},
            half_seq=half_seq,
            half_head_dim=half_head_dim,
        )
        ahead, back = (np.minimum(part, 1.0)[which] for part in np.split(values[2:], 2))
        work = 1 / ahead + followed * 2 / back
        launches = (1 + followed) * device.launch_seconds
        return flop * work / (peak * shape.fraction(length, width, dtype="")) + launches

    reached = flop * (1 + 2 * followed) / np.array([s.seconds for s in samples]) / peak
    fastest = [min(1.0, 1.5 * float(np.max(reached[which == number]))) for number in range(len(dtypes))]
    fit = fit_positive(law, [s.seconds for s in samples], [64.0, 16.0, *fastest, *fastest])
    ahead, back = (
        dict(zip(dtypes, map(_part, part), strict=True)) for part in np.split(np.array(fit.values[2:]), 2)
    )
    described = Attention(
        forward_efficiency=ahead,
        backward_efficiency=back,
        half_seq=_rounded(fit.values[0]),
        half_head_dim=_rounded(fit.values[1]),
        smallest_seq=min(s.seq_len for s in samples),
        largest_seq=max(s.seq_len for s in samples),
        provenance="measured",
    )
    return replace(device, attention=described), fit


def _fresh_rate(samples: Sequence[BytesSample], device: Device, scale: float) -> float:
    """Bytes per second of taking memory alone: what was timed writes it as well, which is priced as that."""
    rate, written = _median_rate(samples, scale), 0.0
    if device.memory_bytes_per_second is not None:
        written = 1 / (device.memory_bytes_per_second * device.memory_efficiency)
    # Where writing is most of it, what is left is the scatter of both.
    return _rounded(1 / max(1 / rate - written, 0.25 / rate))


def _with_streams(device: Device, samples: Sequence[BytesSample], *, keep_peak: bool) -> tuple[Device, Fit]:
    num_bytes = np.array([s.num_bytes for s in samples])
    fastest = max(s.num_bytes / s.seconds for s in samples)
    fit = fit_positive(
        lambda values: num_bytes / values[0] + device.launch_seconds, [s.seconds for s in samples], [fastest]
    )
    rate = fit.values[0]
    peak = device.memory_bytes_per_second if keep_peak else None
    if peak is None or peak < rate:
        return replace(device, memory_bytes_per_second=_rounded(rate), memory_efficiency=1.0), fit
    return replace(device, memory_efficiency=_part(rate / peak)), fit


def _with_links(platform: Platform, samples: Sequence[ExchangeSample], fits: dict[str, Fit]) -> Platform:
    """Fits the levels, innermost first: those within are known by then."""
    levels = [_level(platform, sample) for sample in samples]
    for number in range(len(platform.links)):
        chosen = [sample for sample, level in zip(samples, levels, strict=True) if level == number]
        if chosen:
            platform = _with_level(platform, number, chosen, fits)
    return platform


def _with_level(
    platform: Platform, number: int, samples: Sequence[ExchangeSample], fits: dict[str, Fit]
) -> Platform:
    name, seconds = platform.links[number].name, [sample.seconds for sample in samples]
    fits[name] = fit_positive(
        lambda values: predicted_seconds(_with_link(platform, number, values), samples),
        seconds,
        _guess(samples),
    )
    found = _with_link(platform, number, [_rounded(value) for value in fits[name].values])
    sent = [part for part in (_sent(found, sample).get(name, 0.0) for sample in samples) if part]
    ranged = replace(found.links[number], smallest_bytes=min(sent), largest_bytes=max(sent))
    found = replace(found, links=_replaced(found.links, number, ranged))
    for collective in sorted({sample.collective for sample in samples}):
        some = [sample for sample in samples if sample.collective == collective]
        fits[f"{name} {collective}"] = quality(predicted_seconds(found, some), [s.seconds for s in some])
    return found


def predicted_seconds(platform: Platform, samples: Sequence[ExchangeSample]) -> np.ndarray:
    """Seconds that a platform predicts for the samples."""
    return np.array([sum(part.seconds for part in _transfers(platform, sample)) for sample in samples], float)


def _transfers(platform: Platform, sample: ExchangeSample) -> list[network.Transfer]:
    name = "all_to_all" if sample.collective == "hierarchical" else sample.collective
    price: Callable[..., network.Transfer] = getattr(network, name)
    return [price(platform, group, sample.num_bytes) for group in sample.groups]


def _sent(platform: Platform, sample: ExchangeSample) -> dict[str, float]:
    sent: dict[str, float] = {}
    for transfer in _transfers(platform, sample):
        for name, part in transfer.bytes_by_level.items():
            sent[name] = max(sent.get(name, 0.0), float(part))
    return sent


def _level(platform: Platform, sample: ExchangeSample) -> int:
    """The outermost level that the collective uses."""
    sent = _sent(platform, sample)
    return max((at for at, link in enumerate(platform.links) if sent.get(link.name)), default=-1)


def _guess(samples: Sequence[ExchangeSample]) -> list[float]:
    """Latency, cost of a further message or member, and rate, as the quickest and the largest samples suggest."""
    latency = max(min(s.seconds for s in samples), 10 * SHORTEST_SECONDS)
    return [latency, latency / 10, max(s.num_bytes / s.seconds for s in samples)]


def _with_link(platform: Platform, number: int, values: Sequence[float]) -> Platform:
    latency, message, rate = (float(value) for value in values)
    link = replace(
        platform.links[number],
        latency_seconds=min(max(latency, SHORTEST_SECONDS), 1.0),
        message_seconds=message,
        bytes_per_second=rate,
        efficiency=1.0,
        taper_fraction=1.0,
        provenance="measured",
    )
    return replace(platform, links=_replaced(platform.links, number, link))


def _replaced(links: tuple[Link, ...], number: int, link: Link) -> tuple[Link, ...]:
    return (*links[:number], link, *links[number + 1 :])


def _part(value: float) -> float:
    return _rounded(min(max(float(value), 1e-9), 1.0))


def _rounded(value: float) -> float:
    """To four digits, which is more than any of it is known to."""
    return float(f"{value:.4g}")
