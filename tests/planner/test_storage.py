"""Bytes of parameters by rule against the shapes and shardings that the executor really has."""

import jax
import numpy as np
import pytest

from benchmarks.cases import make_executor, moe_model
from models.config import DenseFFN, GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN
from models.cost import layer_parameters
from models.presets import PRESETS, preset
from piperjax.planner.storage import layer_leaves, storage


@pytest.mark.parametrize("name", PRESETS)
def test_leaves_of_a_layer_are_its_parameters(name):
    model = preset(name)
    for layer in dict.fromkeys(model.layers):
        counted = layer_parameters(model, layer)
        found = sum(int(np.prod(leaf.shape)) for leaf in layer_leaves(model.d_model, layer))
        assert found == counted.total - counted.router_bias


def mixed_model(embeddings="untied"):
    """Odd sizes, of which some divide and some do not; dense and expert layers."""
    attention = GroupedQueryAttention(num_heads=6, num_kv_heads=3, head_dim=14, qk_norm="head", bias="all")
    moe = MoEFFN(num_experts=8, experts_per_token=2, d_ff=34, shared_d_ff=20, shared_gate="sigmoid")
    dense = LayerConfig(attention=attention, ffn=DenseFFN(d_ff=52))
    expert = LayerConfig(attention=attention, ffn=moe)
    return ModelConfig(
        name="mixed",
        d_model=36,
        vocab_size=61,
        layers=(dense, expert, expert, dense, expert),
        embeddings=embeddings,
    )


def bytes_at_rest(executor):
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(executor.abstract_params)
    )


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
@pytest.mark.parametrize(
    "mesh",
    [
        dict(pipe=1),
        dict(pipe=2, data=2, expert=2),
        dict(pipe=4, data=1, expert=2),
        dict(pipe=2, data=4),
        dict(pipe=2, data=2, schedule="interleaved"),
        dict(pipe=2, expert=4, vocabulary="whole"),
    ],
    ids=str,
)
def test_bytes_at_rest_are_those_of_the_executor(mesh, embeddings):
    executor = make_executor(mixed_model(embeddings), **mesh)
    plan = executor.plan
    stored = storage(
        executor.config,
        plan.layers_per_stage,
        pipe=plan.pipe,
        data=plan.data,
        expert=plan.expert,
        vocabulary=plan.vocabulary,
        dtype="float32",
    )
    assert stored.at_rest == bytes_at_rest(executor)
    # On one device nothing is gathered; in bfloat16 all but norms and routers is cast.
    if plan.num_devices == 1:
        assert stored.accumulators == stored.at_rest
        assert stored.compute_copy == 0


def test_a_copy_is_made_of_what_is_cast_or_gathered():
    model, stages = moe_model(num_layers=2), (2,)
    options = dict(pipe=1, data=1, expert=1)
    assert storage(model, stages, **options, dtype="float32").compute_copy == 0
    cast = storage(model, stages, **options, dtype="bfloat16")
    small = 4 * (2 * 64 * 8 + 5 * 64)  # routers and norms stay in float32
    assert cast.compute_copy == (cast.at_rest - small) / 2
    gathered = storage(model, stages, pipe=1, data=2, expert=1, dtype="float32")
    assert gathered.compute_copy == gathered.accumulators - 4 * 64  # all but the final norm


def test_gradients_that_no_other_device_has_a_part_in_are_not_reduced():
    def stored(**sizes):
        return storage(moe_model(), (4,), pipe=1, dtype="float32", **sizes)

    alone, shared, split = stored(data=1, expert=1), stored(data=2, expert=1), stored(data=1, expert=2)
    assert alone.reduced == 0 and alone.accumulators == alone.at_rest
    assert shared.reduced == pytest.approx(shared.at_rest, rel=0.01)
    assert 0 < split.reduced < split.at_rest  # Dense parameters only.


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="dtype must be one of .*got 'float8'"):
        storage(moe_model(), (4,), pipe=1, data=1, expert=1, dtype="float8")
