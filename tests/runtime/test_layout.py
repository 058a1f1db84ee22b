"""Layouts: which layer is where, drawn out; shardings that divide; device layout and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from meshes.axes import BATCH, DATA, EXPERT, PIPE
from meshes.mesh import build_mesh
from models.config import DenseFFN, GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN
from piperjax.runtime.layout import (
    NO_LAYER,
    device_from_logical,
    layer_layout,
    leaf_sharding,
    logical_from_device,
    padded_vocabulary,
)
from piperjax.schedules.classic import gpipe
from piperjax.schedules.schedule import parse

ATTENTION = GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=4)
DENSE = LayerConfig(attention=ATTENTION, ffn=DenseFFN(d_ff=8))
MOE = LayerConfig(attention=ATTENTION, ffn=MoEFFN(num_experts=4, experts_per_token=2, d_ff=8))
MESH = build_mesh(pipe=2, data=2, expert_factors=(1, 1, 2), devices=jax.devices()[:8])


def model(*layers):
    return ModelConfig(name="test", d_model=8, vocab_size=11, layers=layers)


def test_uneven_stages_of_two_kinds_drawn_out():
    layout = layer_layout(model(DENSE, MOE, MOE, DENSE, MOE), gpipe(2, 1), (3, 2))
    assert layout.kinds == ("dense", "moe")
    assert layout.layer.tolist() == [[[0, 1, 2]], [[3, 4, NO_LAYER]]]
    assert layout.kind.tolist() == [[[0, 1, 1]], [[0, 1, 2]]]
    assert layout.index.tolist() == [[[0, 0, 1]], [[0, 0, 0]]]
    assert layout.moe_index.tolist() == [[[0, 0, 1]], [[0, 2, 0]]]
    assert layout.layer_ids["dense"].tolist() == [[[0]], [[3]]]
    assert layout.layer_ids["moe"].tolist() == [[[1, 2]], [[4, NO_LAYER]]]
    assert layout.runs.fixed_count(0) == 1
    assert layout.runs.fixed_count(1) is None


def test_v_shaped_placement_drawn_out():
    layout = layer_layout(model(MOE, MOE, MOE, MOE), parse("0F0 3F0 3B0 0B0\n1F0 2F0 2B0 1B0"), (1, 1, 1, 1))
    assert layout.layer.tolist() == [[[0], [3]], [[1], [2]]]
    assert layout.runs.fixed_count(0) == 1


def test_the_busiest_kind_has_experts():
    uneven = layer_layout(model(DENSE, MOE, DENSE, DENSE, MOE), gpipe(2, 1), (3, 2))
    assert uneven.kinds[uneven.busiest_kind] == "moe"
    assert uneven.runs.count.tolist() == [[[[1, 1], [1, 0]]], [[[1, 1], [0, 0]]]]
    assert layer_layout(model(DENSE, DENSE), gpipe(2, 1), (1, 1)).busiest_kind == 0


def test_stages_must_hold_the_layers():
    with pytest.raises(ValueError, match="the stages must hold the 2 layers of test, but layers_per_stage"):
        layer_layout(model(MOE, MOE), gpipe(2, 1), (2, 1))


def test_leaves_are_split_over_what_holds_copies():
    dense = leaf_sharding(("layers", "moe", "attention", "query"), (2, 1, 3, 8, 2, 4), MESH)
    assert dense.spec == P(PIPE, None, None, BATCH, None, None)
    assert dense.gather_axes == dense.reduce_axes == BATCH
    expert = leaf_sharding(("layers", "moe", "ffn", "experts", "down"), (2, 1, 3, 4, 6, 8), MESH)
    assert expert.spec == P(PIPE, None, None, EXPERT, None, (DATA,))
    assert (expert.gather_axes, expert.gather_dimension, expert.expert_dimension) == ((DATA,), 5, 3)
    assert leaf_sharding(("embedding",), (12, 8), MESH).spec == P(PIPE, BATCH)


def test_what_does_not_divide_stays_whole():
    odd = leaf_sharding(("layers", "moe", "ffn_norm"), (2, 1, 3, 7), MESH)
    assert odd.spec == P(PIPE, None, None, None)
    assert (odd.gather_axes, odd.reduce_axes) == ((), BATCH)


def test_gradients_of_one_device_alone_are_not_summed():
    mesh = build_mesh(pipe=2, data=1, expert_factors=(1, 1, 4), devices=jax.devices()[:8])
    expert = leaf_sharding(("layers", "moe", "ffn", "experts", "down"), (2, 1, 3, 4, 6, 8), mesh)
    assert expert.reduce_axes == () and expert.gradient_spec[0] == (PIPE, DATA)
    assert expert.spec[0] == PIPE and expert.gradient_spec[1:] == expert.spec[1:]
    dense = leaf_sharding(("layers", "moe", "attention", "query"), (2, 1, 3, 8, 2, 4), mesh)
    assert dense.reduce_axes == BATCH and dense.gradient_spec == dense.spec


def test_vocabulary_is_padded_to_the_pipe_ranks():
    assert [padded_vocabulary(61, pipe) for pipe in (1, 2, 4)] == [61, 62, 64]


@pytest.mark.parametrize("layers_per_stage", [(2, 2), (3, 1)])
def test_device_layout_and_back(layers_per_stage):
    config = model(DENSE, MOE, MOE, MOE)
    layout = layer_layout(config, gpipe(2, 1), layers_per_stage)
    rng = np.random.default_rng(0)
    logical = {
        "embedding": jnp.asarray(rng.normal(size=(11, 8))),
        "final_norm": jnp.ones(8),
        "layers": {
            "dense": {"a": jnp.asarray(rng.normal(size=(1, 5)))},
            "moe": {"a": jnp.asarray(rng.normal(size=(3, 5)))},
        },
    }
    device = device_from_logical(config, layout, 2, logical)
    assert device["embedding"].shape == (12, 8)
    stage = layers_per_stage[0] - 1  # MoE layers on the first rank
    np.testing.assert_array_equal(
        device["layers"]["moe"]["a"][0, 0, :stage], logical["layers"]["moe"]["a"][:stage]
    )
    back = logical_from_device(config, layout, device)
    jax.tree.map(np.testing.assert_array_equal, back, logical)
