"""Tests of piperjax/planner/work.py: the products of a layer add up to what models/cost.py counts."""

import pytest

from models import cost
from models.presets import PRESETS, preset
from piperjax.planner.buffers import Buffers
from piperjax.planner.work import layer_work


def work(config, layer, **options):
    return layer_work(config.d_model, layer, **{"tokens": 4096, "seq_len": 2048} | options)


def product_flop(found):
    return sum(2 * p.rows * max(p.groups, 1) * p.columns * p.depth for p in found.products)


@pytest.mark.parametrize("name", PRESETS)
def test_products_are_the_flop_of_the_layer(name):
    """On one device; on several that share tokens and features, each has its part but for compressed projections."""
    config = preset(name)
    for layer in config.kinds.values():
        counted = cost.layer_flop(config, layer, 2048)
        found = work(config, layer)
        gate = 2 * config.d_model * (getattr(layer.ffn, "shared_gate", "none") == "sigmoid")
        assert product_flop(found) == 4096 * (counted.total - counted.attention_scores - gate)
        assert found.attention_flop == 4096 * counted.attention_scores


def test_weights_of_experts_are_divided_and_others_are_not():
    config = preset("deepseek_v3")
    layer = config.layers[-1]
    one, many = work(config, layer), work(config, layer, expert=32)
    for a, b in zip(one.products, many.products, strict=True):
        assert b.weights == (a.weights / 32 if a.groups else a.weights)
    counted = cost.layer_parameters(config, layer)
    assert sum(p.weights for p in one.products if p.groups) == counted.experts


def test_rows_of_an_expert_by_hand():
    """4096 tokens x 8 experts each over 256 experts, 8 of them here: 128 rows each if balanced."""
    config = preset("deepseek_v3")
    up = next(p for p in work(config, config.layers[-1], expert=32).products if p.name == "experts up")
    # Tokens of 32 devices arrive at 8 experts: 32 x 4096 x 8 / 256 rows per expert.
    assert (up.rows, up.groups, up.columns, up.depth) == (4096, 8, 2 * 2048, 7168)
    busy = work(config, config.layers[-1], expert=32, imbalance=1.5).products
    assert next(p for p in busy if p.name == "experts up").rows == 1.5 * 4096


def test_tensor_devices_share_features_and_tokens():
    config = preset("qwen3_235b_a22b")
    alone, shared = (work(config, config.layers[0], tensor=t) for t in (1, 2))
    assert product_flop(shared) == product_flop(alone)
    query = shared.products[0]
    assert (query.rows, query.columns) == (2 * 4096, (64 + 8) * 128 / 2)


def test_static_buffers_are_gone_through_whole():
    config = preset("tiny")
    exact, static = (
        work(config, config.layers[-1], expert=4, buffer=rows)
        for rows in (None, Buffers(32_768, 32_768, 0, False))
    )
    bytes_of = {s.name: s.forward_bytes for s in static.streams}
    assert bytes_of["experts activation"] == 32_768 * 3 * 256 * 2
    assert {s.name: s.forward_bytes for s in exact.streams}["experts activation"] == 4096 * 2 * 3 * 256 * 2
    assert static.products == exact.products
