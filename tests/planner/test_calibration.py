"""From measurements to a platform: rates come back from what a known platform predicts, disturbed or not."""

import itertools
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from meshes.device import Attention, Device, ProductPart, Products
from meshes.platform import Link, Platform, load_platform
from meshes.writing import platform_toml
from piperjax.planner.calibration import (
    AttentionSample,
    BytesSample,
    ElementwiseSample,
    ExchangeSample,
    Measurements,
    ProductSample,
    calibrate,
    concurrent_devices,
    predicted_seconds,
)
from piperjax.planner.network import Group

TRUE = Device(
    peak_flop_per_second={"bfloat16": 4e11, "float32": 2e11},
    memory_bytes_per_second=2e10,
    matmul=Products(
        efficiency={"bfloat16": 0.8, "float32": 1.0},
        input_gradient_fraction={"bfloat16": 0.7},
        weight_gradient_fraction={"float32": 0.4},
        half_rows=24,
        half_columns=40,
        half_depth=12,
        weight_gradient_half_depth=90,
    ),
    grouped_matmul=Products(
        efficiency={"bfloat16": 0.5, "float32": 0.6}, half_rows=60, half_columns=20, half_depth=8
    ),
    attention=Attention(
        forward_efficiency={"bfloat16": 0.2, "float32": 0.3},
        backward_efficiency={"bfloat16": 0.1, "float32": 0.2},
        half_seq=100,
        half_head_dim=20,
    ),
    launch_seconds=1e-6,
)
NODE = Link(
    name="memory",
    devices=4,
    medium="memory",
    bytes_per_second=3e9,
    latency_seconds=4e-5,
    message_seconds=1e-5,
)
WIRE = Link(name="network", devices=8, bytes_per_second=1e9, latency_seconds=2e-4, message_seconds=5e-5)
PLATFORM = Platform(
    name="true", description="two computers", device=TRUE, devices_per_node=4, links=(NODE, WIRE)
)
# What is known beforehand: the levels, and wrong rates.
BEFORE = replace(
    PLATFORM,
    device=Device(),
    links=tuple(
        Link(name=link.name, devices=link.devices, bytes_per_second=1e8, latency_seconds=1e-3)
        for link in PLATFORM.links
    ),
)
NUM_LOCAL, CONCURRENT = 4, 1.6
PARTS = get_args(ProductPart)


def product_samples(disturb):
    shapes = itertools.product((16, 128, 512), (64, 512), (64, 512))
    kinds = itertools.product((0, 4), ("float32", "bfloat16"), PARTS)
    for (m, n, k), (groups, dtype, part) in itertools.product(shapes, list(kinds)):
        sample = ProductSample(m, n, k, groups, dtype, part, 1.0)
        yield sample._replace(seconds=disturb(NUM_LOCAL / CONCURRENT * sample.predicted(TRUE)))


def attention_samples(disturb):
    for seq_len, head_dim, dtype in itertools.product((64, 256, 1024), (16, 64), ("float32", "bfloat16")):
        shape = dict(seq_len=seq_len, head_dim=head_dim, dtype=dtype)
        ahead = NUM_LOCAL / CONCURRENT * TRUE.attention_seconds(1e9, **shape)
        back = NUM_LOCAL / CONCURRENT * TRUE.attention_seconds(2e9, **shape, backward=True)
        yield AttentionSample(1e9, seq_len, head_dim, dtype, False, disturb(ahead))
        yield AttentionSample(1e9, seq_len, head_dim, dtype, True, disturb(ahead + back))


def exchange_samples(disturb):
    samples = [
        ExchangeSample(name, (group,), size, 1.0)
        for name in ("permute", "all_gather", "reduce_scatter", "all_reduce", "all_to_all")
        for group in (Group(2, 1, 8), Group(4, 1, 8), Group(2, 4, 8), Group(8, 1, 8))
        for size in (1e3, 1e5, 1e7)
    ]
    samples.append(ExchangeSample("hierarchical", (Group(4, 1, 8), Group(2, 4, 8)), 1e5, 1.0))
    for sample, seconds in zip(samples, predicted_seconds(PLATFORM, samples), strict=True):
        yield sample._replace(seconds=disturb(float(seconds)))


def measurements(disturb=lambda seconds: seconds):
    """What four devices that share 1.6 devices' worth of cores would measure."""
    together = NUM_LOCAL / CONCURRENT
    streams = [BytesSample(size, disturb(together * TRUE.stream_seconds(size))) for size in (1e4, 1e6, 1e8)]
    return Measurements(
        num_local=NUM_LOCAL,
        alone=((1.0, together), (2.0, 2 * together)),
        launch_seconds=TRUE.launch_seconds * together,
        call_seconds=3e-4,
        products=tuple(product_samples(disturb)),
        attention=tuple(attention_samples(disturb)),
        streams=tuple(streams),
        exchanges=tuple(exchange_samples(disturb)),
        copies=(BytesSample(1e6, 1e-3), BytesSample(1e7, 1e-2)),
        # Taken at 4 GB/s, and written.
        fresh=(BytesSample(1e8, together * (1e8 / 4e9 + 1e8 / 2e10)),),
        elementwise=tuple(
            ElementwiseSample(kind, 1e6, together * 1e6 / (factor * rate))
            for kind, rate in (("activation_gradient", 4e9), ("rows", 2e10))
            for factor in (0.7, 1.0, 2.0)
        )
        # The more bytes the slower.
        + tuple(ElementwiseSample("layout", size, together * size / (1e16 / size)) for size in (1e7, 1e6)),
    )


def test_rates_come_back():
    calibration = calibrate(BEFORE, measurements(), shares_cores=True)
    device = calibration.platform.device
    assert device.concurrent_devices == CONCURRENT
    assert device.launch_seconds == pytest.approx(1e-6)
    assert device.call_seconds == 3e-4
    assert device.host_bytes_per_second == 1e9
    assert device.fresh_bytes_per_second == pytest.approx(4e9, rel=0.01)
    by_kind = dict(device.elementwise_bytes_per_second)
    np.testing.assert_allclose(by_kind.pop("layout"), [[1e6, 1e10], [1e7, 1e9]])
    assert by_kind == pytest.approx({"activation_gradient": 4e9, "rows": 2e10})
    assert device.memory_bytes_per_second == pytest.approx(2e10, rel=0.01)
    for (m, n, k), grouped in itertools.product(((32, 100, 200), (400, 300, 64)), (False, True)):
        for dtype, part in itertools.product(("float32", "bfloat16"), PARTS):
            shape = dict(dtype=dtype, grouped=grouped, groups=3, part=part)
            expected = TRUE.product_seconds(m, n, k, **shape)
            assert device.product_seconds(m, n, k, **shape) == pytest.approx(expected, rel=0.03)
    assert device.matmul.input_gradient_fraction == pytest.approx({"float32": 1, "bfloat16": 0.7}, rel=0.05)
    assert device.matmul.weight_gradient_fraction == pytest.approx({"float32": 0.4, "bfloat16": 1}, rel=0.05)
    assert device.matmul.half_rows == pytest.approx(24, rel=0.05)
    for backward, dtype in itertools.product((False, True), ("float32", "bfloat16")):
        shape = dict(seq_len=512, head_dim=32, dtype=dtype, backward=backward)
        expected = TRUE.attention_seconds(1e8, **shape)
        assert device.attention_seconds(1e8, **shape) == pytest.approx(expected, rel=0.02)
    for found, expected in zip(calibration.platform.links, PLATFORM.links, strict=True):
        assert found.medium == expected.medium
        assert found.bytes_per_second == pytest.approx(expected.bytes_per_second, rel=0.02)
        assert found.latency_seconds == pytest.approx(expected.latency_seconds, rel=0.05)
        assert found.provenance == "measured"
    assert all(fit.r_squared > 0.99 for fit in calibration.fits.values())
    assert {"device.matmul", "memory", "network", "memory permute", "network hierarchical"} <= set(
        calibration.fits
    )


def test_a_disturbed_sample_in_ten_changes_little():
    rng = np.random.default_rng(1)
    calibration = calibrate(
        BEFORE,
        measurements(lambda s: s * np.exp(0.03 * rng.normal()) * (6 if rng.random() < 0.1 else 1)),
        shares_cores=True,
    )
    device = calibration.platform.device
    expected = TRUE.product_seconds(256, 256, 256, dtype="float32")
    assert device.product_seconds(256, 256, 256, dtype="float32") == pytest.approx(expected, rel=0.1)
    for found, expected in zip(calibration.platform.links, PLATFORM.links, strict=True):
        assert found.bytes_per_second == pytest.approx(expected.bytes_per_second, rel=0.15)


def test_ranges_are_those_of_the_samples():
    platform = calibrate(BEFORE, measurements(), shares_cores=True).platform
    assert platform.device.matmul.smallest_flop == 2 * 16 * 64 * 64
    assert platform.device.matmul.largest_flop == 2 * 512**3
    assert not platform.device.matmul.covers(1e12)
    assert (platform.device.attention.smallest_seq, platform.device.attention.largest_seq) == (64, 1024)
    assert platform.links[0].covers(1e5)
    assert not platform.links[1].covers(1e9)


def test_the_file_reads_back(tmp_path):
    found = calibrate(BEFORE, measurements(), shares_cores=True).platform
    path = tmp_path / "true.toml"
    path.write_text(platform_toml(found))
    assert load_platform(str(path)) == found
    assert found.rated("float32") and found.rated("bfloat16") and not found.rated("float64")


def test_devices_with_hardware_of_their_own_keep_their_peaks():
    h100 = load_platform("h100_pod")
    m, n, k = 4096, 4096, 4096
    seconds = 2 * m * n * k / 600e12
    samples = Measurements(
        num_local=1,
        products=tuple(ProductSample(m, n, c * k, 0, "bfloat16", "forward", c * seconds) for c in (1, 2)),
        streams=(BytesSample(1e9, 1e9 / 3e12),),
    )
    found = calibrate(h100, samples, shares_cores=False).platform
    assert found.device.peak_flop_per_second["bfloat16"] == 989.5e12
    assert found.device.concurrent_devices is None
    assert found.device.known_peak("bfloat16") == 989.5e12
    assert found.device.product_seconds(m, n, k, dtype="bfloat16") == pytest.approx(seconds, rel=0.03)
    assert found.device.memory_efficiency == pytest.approx(3 / 3.35, rel=0.01)
    assert found.device.attention == h100.device.attention
    assert found.links == h100.links


def test_simulated_devices_have_no_peak_of_their_own():
    found = calibrate(BEFORE, measurements(), shares_cores=True).platform
    assert found.device.known_peak("float32") is None


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        (((1.0, 8.0), (1.0, 8.0), (1.0, 4.0)), 1.0),
        (((1.0, 4.0),), 2.0),
        (((1.0, 12.0),), 1.0),  # never less than one
        (((1.0, 1.05),), 8.0),  # as good as independent
        ((), 1.0),
    ],
)
def test_concurrent_devices(ratios, expected):
    assert concurrent_devices(Measurements(num_local=8, alone=ratios)) == expected
