"""Tests of piperjax/planner/layer_time.py: laws that hold at any rates, and one layer by hand."""

import pytest

from meshes.device import Attention, Device, Products
from meshes.platform import Link, Platform, load_platform
from models.presets import preset
from piperjax.planner import layer_time
from piperjax.planner.layer_time import LayerSeconds, layer_seconds
from piperjax.planner.plan import MEMORY_MODES


def machine(**changes):
    """A device of 1e12 FLOP/s at any shape and endless memory bandwidth."""
    products = Products(efficiency={"bfloat16": 1.0, "float8_e4m3fn": 1.0})
    attention = Attention(forward_efficiency={"bfloat16": 1.0}, backward_efficiency={"bfloat16": 1.0})
    device = Device(
        **{
            "peak_flop_per_second": {"bfloat16": 1e12, "float8_e4m3fn": 2e12},
            "memory_bytes_per_second": 1e30,
            "matmul": products,
            "grouped_matmul": products,
            "attention": attention,
        }
        | changes
    )
    links = (
        Link(name="node", devices=4, bytes_per_second=1e9, latency_seconds=1e-6),
        Link(name="system", devices=64, bytes_per_second=1e8, latency_seconds=1e-5),
    )
    return Platform(name="m", description="m", device=device, devices_per_node=4, links=links)


def price(name="mixtral_8x7b", platform=None, index=-1, **options):
    config = preset(name)
    options = {"tokens": 4096, "seq_len": 4096, "rows": "exact"} | options
    return layer_seconds(config, config.layers[index], platform or machine(), **options)


def test_a_layer_by_hand():
    """Forward is the FLOP over the rate, backward twice that, recomputation once more."""
    from models import cost

    config = preset("mixtral_8x7b")
    flop = 4096 * cost.layer_flop(config, config.layers[0], 4096).total
    stash, layer = (price(memory_mode=mode) for mode in ("stash", "layer"))
    assert stash.forward == pytest.approx(flop / 1e12)
    assert stash.backward == pytest.approx(2 * flop / 1e12)
    assert layer.backward == pytest.approx(3 * flop / 1e12)
    assert stash.dense + stash.experts + stash.attention == pytest.approx(3 * flop / 1e12)


@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize("name", ["mixtral_8x7b", "deepseek_v3", "arctic"])
def test_backward_is_its_two_parts(name, mode):
    found = price(name, memory_mode=mode, expert_factors=(1, 2, 4))
    assert found.backward == pytest.approx(found.input_gradient + found.weight_gradient)
    kinds = found.dense + found.experts + found.attention + found.streams
    assert kinds == pytest.approx(found.forward + found.backward)


def test_modes_that_keep_more_compute_less():
    device = machine(memory_bytes_per_second=1e11)
    backward = [price("deepseek_v3", device, memory_mode=mode).backward for mode in MEMORY_MODES]
    assert backward == sorted(backward, reverse=True)
    assert len(set(backward)) == len(MEMORY_MODES)


def test_products_run_attention_again_only_where_it_is_whole():
    def attention(mode, seq_len):
        return price(memory_mode=mode, seq_len=seq_len).attention

    assert attention("products", 1024) == pytest.approx(4 / 3 * attention("stash", 1024))
    assert attention("products", 2048) == attention("stash", 2048)


@pytest.mark.parametrize(
    ("mode", "ours", "others"), [("stage", 2.5, 3), ("layer", 1.5, 2), ("named", 1, 1), ("stash", 1, 1)]
)
def test_exchanges_are_7_5_or_4(mode, ours, others):
    for rows, times in (("static", ours), ("exact", others)):
        found = price(memory_mode=mode, expert_factors=(1, 2, 4), rows=rows)
        assert found.exchange_forward > 0
        # Gates are in a message of their own.
        assert found.exchange_backward == pytest.approx(times * found.exchange_forward, rel=0.001)


@pytest.mark.parametrize(("mode", "hidden"), [("layer", 0), ("named", 0), ("products", 2), ("stash", 3)])
def test_what_is_read_where_it_was_kept_is_copied_once_only(mode, hidden, monkeypatch):
    """Forward writes it into its buffer; of three matrices that is both results of the first two, and their product."""
    platform = machine(memory_bytes_per_second=1e9)

    def priced():
        layer_time.price_layer.cache_clear()
        return price(platform=platform, memory_mode=mode, rows="static")

    in_place = priced()
    monkeypatch.setattr(layer_time, "bytes_read_where_kept", lambda *_: 0)
    copied = priced()
    layer_time.price_layer.cache_clear()
    rows, d_ff = 4096 * 2, 14336
    assert copied.forward == in_place.forward
    assert copied.backward - in_place.backward == pytest.approx(2 * 2 * rows * hidden * d_ff / 1e9, rel=1e-6)


def test_chunks_pay_where_exchanges_are_long():
    static = dict(expert_factors=(1, 2, 4), rows="static", capacity_factor=1.0)
    whole, cut = (price(dispatch_chunks=chunks, **static) for chunks in (1, 4))
    assert cut.total < whole.total and cut.exchange_forward < whole.exchange_forward
    once = price(dispatcher="halo2_dedup", **static)
    assert once.exchange_forward < whole.exchange_forward


def test_dense_layers_and_one_device_exchange_nothing():
    assert price(expert_factors=(1, 1, 1)).exchange_forward == 0
    assert price("deepseek_v3", index=0, expert_factors=(1, 2, 4)).exchange_forward == 0


def test_static_buffers_send_and_move_more():
    slow = machine(memory_bytes_per_second=1e11)
    exact, static = (
        price(platform=slow, expert_factors=(1, 2, 4), rows=rows) for rows in ("exact", "static")
    )
    # Eight devices with an expert each: a token may send one row to each, and does send two.
    assert static.exchange_forward == pytest.approx(4 * exact.exchange_forward, rel=0.01)
    assert static.streams > exact.streams


def test_the_busiest_device_sets_the_pace():
    even, skewed = (price(expert_factors=(1, 2, 4), imbalance=imbalance) for imbalance in (1.0, 1.5))
    assert skewed.experts == pytest.approx(1.5 * even.experts)
    assert skewed.exchange_forward > even.exchange_forward
    assert skewed.dense == even.dense


def test_eight_bits_speed_up_products_and_cost_casts():
    platform = machine(memory_bytes_per_second=1e12)
    full, small = (price(platform=platform, dtype=dtype) for dtype in ("bfloat16", "float8_e4m3fn"))
    assert small.experts == pytest.approx(full.experts / 2)
    assert small.attention == full.attention
    assert small.streams > full.streams


def test_tensor_devices_gather_what_they_share():
    found = price(tensor=2)
    assert found.exchange_backward == pytest.approx(1.5 * found.exchange_forward)
    assert found.dense == pytest.approx(price().dense, rel=0.01)


def test_layers_add_up():
    one = price()
    both = one + one
    assert isinstance(both, LayerSeconds)
    assert both.backward == 2 * one.backward


def test_missing_rates_are_named():
    with pytest.raises(ValueError, match="needs \\[device.matmul\\] to predict seconds"):
        price(platform=machine(matmul=None))


# Bytes of Mixtral's forward pass per token in 16 bits: norms and residuals, queries and keys turned, gated activations
# of two experts.
FORWARD_BYTES = {"norm": 4 * 2 * 4096 * 2, "rotary": 2 * (32 + 8) * 128 * 2, "activation": 2 * 3 * 14336 * 2}


@pytest.mark.parametrize(("kind", "factor"), [("norm", 1), ("rotary", 1), ("activation", 2)])
def test_elementwise_work_has_a_rate_of_its_own_where_memory_does_not_bound_it(kind, factor):
    """Nothing else costs time; the gradient of an activation reads and writes twice as much."""
    forward, gradient = (
        machine(elementwise_bytes_per_second={name: 1e9}) for name in (kind, f"{kind}_gradient")
    )
    usual, ahead, back = (
        price(platform=platform, memory_mode="stash") for platform in (machine(), forward, gradient)
    )
    seconds = 4096 * FORWARD_BYTES[kind] / 1e9
    assert ahead.forward - usual.forward == pytest.approx(seconds, rel=1e-6)
    assert ahead.backward == usual.backward
    assert back.input_gradient - usual.input_gradient == pytest.approx(factor * seconds, rel=1e-6)
    assert back.forward == usual.forward


def test_an_operation_has_the_rate_of_its_own_size():
    """Queries and keys are turned by two operations, each of half of the bytes."""
    each = 4096 * FORWARD_BYTES["rotary"] / 2
    pairs = ((each / 10, 1e10), (each, 1e9), (10 * each, 1e8))
    by_size, at_each = (
        price(platform=machine(elementwise_bytes_per_second={"rotary": rate}), memory_mode="stash")
        for rate in (pairs, 1e9)
    )
    assert by_size.forward == pytest.approx(at_each.forward, rel=1e-9)
    twice = price(
        platform=machine(elementwise_bytes_per_second={"rotary": pairs}), memory_mode="stash", tokens=8192
    )
    # A tenth of the rate at ten times the size: a power of -1, so twice the bytes go at half the rate.
    usual = price(
        platform=machine(elementwise_bytes_per_second={"rotary": 1e9}), memory_mode="stash", tokens=8192
    )
    assert twice.forward - usual.forward == pytest.approx(2 * each * 2 / 1e9, rel=1e-6)


def test_experts_on_a_cpu_multiply_half_a_block_more_for_each_group():
    """8 experts with 1,024 rows each, in blocks of 128: by 64 / 1,024 more."""
    shared = machine(concurrent_devices=1.0)
    usual, found = (price(platform=platform, rows="static") for platform in (machine(), shared))
    assert found.experts / usual.experts == pytest.approx(1 + 64 / 1024)
    assert found.dense == usual.dense


def test_places_without_rows_are_filled_with_zeros_on_a_cpu():
    """One of 8 experts a device: 8 x 4,096 places for 2 x 4,096 rows, in both results and both input gradients."""
    options = dict(rows="static", expert_factors=(1, 1, 8), memory_mode="stash")
    quick, slow = (
        price(platform=machine(concurrent_devices=1.0, memory_bytes_per_second=rate), **options)
        for rate in (1e30, 1e12)
    )
    num_bytes = 2 * (8 - 2) * 4096 * (2 * 14336 + 4096 + 14336 + 4096)
    assert slow.experts - quick.experts == pytest.approx(num_bytes / 1e12)
    usual = [
        price(platform=machine(memory_bytes_per_second=rate), **options).experts for rate in (1e30, 1e12)
    ]
    assert usual[0] == usual[1]


def test_later_passes_repeat_exchanges_and_go_through_their_buffers():
    layer = preset("mixtral_8x7b").layers[0]
    options = dict(
        tokens=4096, seq_len=4096, expert_factors=(1, 1, 8), dtype="bfloat16", capacity_factor=1.25
    )

    def seconds(**changes):
        return layer_seconds(preset("mixtral_8x7b"), layer, load_platform("frontier"), **options | changes)

    dropping, once = seconds(), seconds(overflow="passes")
    # One pass is enough: devices agree on that, forward and backward.
    assert dropping.exchange_forward < once.exchange_forward < 1.1 * dropping.exchange_forward
    agreement = once.exchange_forward - dropping.exchange_forward
    assert once.exchange_backward - dropping.exchange_backward == pytest.approx(agreement)
    assert (once.forward, once.backward) == (dropping.forward, dropping.backward)
    three = seconds(imbalance=3.0, overflow="passes")
    assert three.exchange_forward == pytest.approx(3 * once.exchange_forward)
    # 5 all-to-alls for the first, as forward runs again up to the experts, and as many for each that follows.
    assert three.exchange_backward == pytest.approx(3 * once.exchange_backward, rel=0.1)
    # Their products are counted already, but for those of the forward that backward runs again: of the first matrices,
    # two thirds of a forward, where all that is counted is 3 forwards and those two thirds.
    dropped = seconds(imbalance=3.0)
    assert three.experts == dropped.experts
    again = three.backward - dropped.backward - (three.forward - dropped.forward)
    assert 0 < three.forward - dropped.forward < dropping.streams
    assert 2 / 11 < again / ((1 - 1.25 / 3) * dropped.experts) < 3 / 11
    parts = three.dense + three.experts + three.attention + three.streams
    assert three.forward + three.backward == pytest.approx(parts)
    roomy = seconds(capacity_factor=8.0, overflow="passes", imbalance=3.0)
    assert roomy.exchange_forward == pytest.approx(
        seconds(capacity_factor=0.0, imbalance=3.0).exchange_forward
    )
