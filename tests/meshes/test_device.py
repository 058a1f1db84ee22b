"""Rates of a device: the laws by hand, arrays as well as numbers, and what is said when a rate is missing."""

from dataclasses import replace

import numpy as np
import pytest

from meshes.device import Attention, Device, Products

PRODUCTS = Products(
    efficiency={"float32": 0.5},
    half_rows=100,
    half_columns=50,
    half_depth=25,
    smallest_flop=1e6,
    largest_flop=1e9,
)
ATTENTION = Attention(
    forward_efficiency={"float32": 0.4},
    backward_efficiency={"float32": 0.3},
    half_seq=512,
    half_head_dim=64,
    smallest_seq=128,
    largest_seq=1024,
)
DEVICE = Device(
    peak_flop_per_second={"float32": 1e12, "bfloat16": 2e12},
    memory_bytes_per_second=1e11,
    memory_efficiency=0.8,
    matmul=PRODUCTS,
    grouped_matmul=replace(PRODUCTS, efficiency={"float32": 0.25}),
    attention=ATTENTION,
    launch_seconds=1e-5,
)


def test_a_product_has_half_its_rate_at_each_half_size():
    large = 1e12
    assert PRODUCTS.fraction(large, large, large, dtype="float32") == pytest.approx(0.5)
    assert PRODUCTS.fraction(100, large, large, dtype="float32") == pytest.approx(0.25)
    assert PRODUCTS.fraction(large, 50, large, dtype="float32") == pytest.approx(0.25)
    assert PRODUCTS.fraction(large, large, 25, dtype="float32") == pytest.approx(0.25)


def test_seconds_of_a_product_are_those_of_a_larger_one_at_full_rate():
    m, n, k = 256, 1024, 512
    full = 2 * (m + 100) * (n + 50) * (k + 25) / (0.5 * 1e12)
    assert DEVICE.product_seconds(m, n, k, dtype="float32") == pytest.approx(full + 1e-5)
    # Eight groups of one shape take eight times as long, and are launched once.
    grouped = DEVICE.product_seconds(m, n, k, dtype="float32", grouped=True, groups=8)
    assert grouped == pytest.approx(8 * 2 * full + 1e-5)


def test_gradients_have_rates_of_their_own():
    slow = replace(PRODUCTS, weight_gradient_fraction={"float32": 0.5})
    slow = replace(slow, input_gradient_fraction={"float32": 0.8, "bfloat16": 0.1})
    device = replace(DEVICE, matmul=slow, launch_seconds=0.0)
    usual = device.product_seconds(64, 64, 64, dtype="float32")
    assert device.product_seconds(64, 64, 64, dtype="float32", part="weight_gradient") == pytest.approx(
        2 * usual
    )
    turned = device.product_seconds(64, 64, 64, dtype="float32", part="input_gradient")
    assert turned == pytest.approx(1.25 * usual)


def test_weight_gradients_of_few_rows_write_as_much_as_those_of_many():
    slow = replace(PRODUCTS, weight_gradient_half_depth=75)
    device = replace(DEVICE, matmul=slow, launch_seconds=0.0)
    few, more = (
        device.product_seconds(64, 64, rows, dtype="float32", part="weight_gradient") for rows in (25, 125)
    )
    assert more == pytest.approx(2 * few)
    # Others as before.
    before = replace(device, matmul=PRODUCTS).product_seconds(64, 64, 25, dtype="float32")
    assert device.product_seconds(64, 64, 25, dtype="float32") == before
    assert PRODUCTS.fraction(8, 8, 8, dtype="float32", part="weight_gradient") == PRODUCTS.fraction(
        8, 8, 8, dtype="float32"
    )
    with pytest.raises(ValueError, match="weight_gradient_fraction.float32 must be a positive number"):
        replace(PRODUCTS, weight_gradient_fraction={"float32": 0})


def test_attention_is_stated_at_long_sequences_and_heads_of_128():
    assert ATTENTION.fraction(1e12, 128, dtype="float32") == pytest.approx(0.4)
    assert ATTENTION.fraction(512, 128, dtype="float32") == pytest.approx(0.2)
    assert ATTENTION.fraction(1e12, 128, dtype="float32", backward=True) == pytest.approx(0.3)
    narrow = ATTENTION.fraction(1e12, 64, dtype="float32")
    assert narrow == pytest.approx(0.4 * (64 / 128) / (128 / 192))
    seconds = DEVICE.attention_seconds(1e9, seq_len=512, head_dim=128, dtype="float32")
    assert seconds == pytest.approx(1e9 / 0.2e12 + 1e-5)


def test_copies_reach_a_part_of_the_memory_rate():
    assert DEVICE.stream_seconds(8e9) == pytest.approx(0.1 + 1e-5)


def test_arrays_in_arrays_out():
    rows = np.array([1, 64, 4096])
    seconds = DEVICE.product_seconds(rows, 512, 512, dtype="float32")
    assert seconds.shape == (3,)
    assert seconds[1] == pytest.approx(DEVICE.product_seconds(64, 512, 512, dtype="float32"))
    assert DEVICE.attention_seconds(1e6, seq_len=rows, head_dim=64, dtype="float32").shape == (3,)
    assert DEVICE.stream_seconds(rows).shape == (3,)


def test_devices_that_share_cores():
    shared = replace(DEVICE, concurrent_devices=2)
    # Eight at work: four rounds of two. One at work, or two: nobody waits.
    assert shared.together_seconds(3.0, 8 * 3.0) == 12.0
    assert shared.together_seconds(3.0, 3.0) == 3.0
    assert shared.together_seconds(3.0, 6.0) == 3.0
    np.testing.assert_array_equal(shared.together_seconds(np.array([1.0, 4.0]), 6.0), [3.0, 4.0])
    assert DEVICE.together_seconds(3.0, 24.0) == 3.0


def test_collectives_slow_down_what_runs_beside_them():
    slowed = replace(DEVICE, interference_fraction=0.25)
    # In the 8 seconds of the exchange 6 of the computation are done; then the rest, alone.
    assert slowed.beside_seconds(8.0, 3.0) == 8.0
    assert slowed.beside_seconds(8.0, 6.0) == 8.0
    assert slowed.beside_seconds(8.0, 10.0) == 8.0 + 4.0
    assert DEVICE.beside_seconds(8.0, 10.0) == 10.0
    np.testing.assert_array_equal(slowed.beside_seconds(np.array([8.0, 0.0]), 10.0), [12.0, 10.0])
    # Simulated devices copy with the cores that compute.
    assert replace(slowed, concurrent_devices=2).beside_seconds(8.0, 3.0) == 11.0


def test_a_peak_is_known_unless_assumed_or_shared():
    vendor = replace(DEVICE, provenance="vendor")
    assert vendor.known_peak("float32") == 1e12
    assert vendor.known_peak("float16") is None
    assert DEVICE.known_peak("float32") is None
    assert replace(vendor, concurrent_devices=2).known_peak("float32") is None


def test_measured_ranges():
    assert PRODUCTS.covers(1e8) and not PRODUCTS.covers(2e9)
    assert ATTENTION.covers(128) and not ATTENTION.covers(2048)
    assert Products(efficiency={}).covers(1e30)
    np.testing.assert_array_equal(PRODUCTS.covers(np.array([1.0, 1e7])), [False, True])


@pytest.mark.parametrize(
    ("device", "dtype", "names"),
    [
        (Device(), "float32", "[device.matmul]"),
        (DEVICE, "bfloat16", "device.matmul.efficiency.bfloat16"),
        (replace(DEVICE, peak_flop_per_second={}), "float32", "device.peak_flop_per_second.float32"),
    ],
)
def test_a_missing_rate_is_named(device, dtype, names):
    with pytest.raises(ValueError) as error:
        device.product_seconds(8, 8, 8, dtype=dtype)
    assert f"needs {names} to predict seconds" in str(error.value)
    assert "`python -m piperjax measure`" in str(error.value)


def test_other_missing_rates_are_named():
    with pytest.raises(ValueError, match=r"needs \[device.grouped_matmul\] to predict"):
        replace(DEVICE, grouped_matmul=None).product_seconds(8, 8, 8, dtype="float32", grouped=True)
    with pytest.raises(ValueError, match=r"needs \[device.attention\] to predict"):
        Device().attention_seconds(1, seq_len=8, head_dim=8, dtype="float32")
    with pytest.raises(ValueError, match=r"needs device.memory_bytes_per_second to predict"):
        Device().stream_seconds(8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            dict(efficiency=0.5),
            "efficiency must give a rate for each dtype, such as { bfloat16 = 0.6 }, got 0.5",
        ),
        (dict(efficiency={"float32": 1.5}), "efficiency.float32 must be at most 1, got 1.5"),
        (dict(half_rows=-1), "half_rows must be a number of at least 0"),
        (dict(largest_flop=None), "the range of FLOP must have both ends"),
        (dict(provenance="rumour"), "provenance must be one of measured"),
    ],
)
def test_wrong_products_are_refused(changes, sentence):
    with pytest.raises(ValueError) as error:
        replace(PRODUCTS, **changes)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(concurrent_devices=0.5), "device.concurrent_devices must be at least 1, got 0.5"),
        (dict(memory_efficiency=2), "device.memory_efficiency must be at most 1, got 2"),
        (dict(launch_seconds=-1e-6), "device.launch_seconds must be a number of at least 0"),
        (dict(reserve_bytes=-1), "device.reserve_bytes must be a whole number of at least 0, got -1"),
        (dict(interference_fraction=-0.1), "device.interference_fraction must be a number of at least 0"),
        (dict(interference_fraction=1.1), "device.interference_fraction must be at most 1, got 1.1"),
        (dict(host_bytes_per_second=0), "device.host_bytes_per_second must be a positive number"),
    ],
)
def test_wrong_devices_are_refused(changes, sentence):
    with pytest.raises(ValueError) as error:
        replace(DEVICE, **changes)
    assert sentence in str(error.value)


def test_devices_are_values():
    assert hash(DEVICE) == hash(replace(DEVICE))
    assert replace(DEVICE, attention=None) != DEVICE
