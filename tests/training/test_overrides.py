"""Tests of `--set`: dotted paths, typed values and the sentence of every mistake."""

import pytest

from models.config import DenseFFN, GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN
from piperjax.training.config import TrainConfig
from piperjax.training.overrides import override, parse, parse_assignments

ATTENTION = GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8)
MOE = LayerConfig(attention=ATTENTION, ffn=MoEFFN(num_experts=4, experts_per_token=2, d_ff=16))
DENSE = LayerConfig(attention=ATTENTION, ffn=DenseFFN(d_ff=32))
CONFIG = TrainConfig(model=ModelConfig(name="test", d_model=16, vocab_size=260, layers=(DENSE, MOE, MOE)))


def apply(*assignments):
    return override(CONFIG, parse_assignments(assignments))


def test_values_take_the_type_of_the_field():
    config = apply(
        "optimizer.peak_lr=3e-4",
        "optimizer.betas=0.9, 0.99",
        "data.seq_len=64",
        "data.path=a=b.txt",
        "dtype=bfloat16",
        "log.progress=plain",
        "model.embeddings=tied",
    )
    assert config.optimizer.peak_lr == 3e-4 and config.optimizer.betas == (0.9, 0.99)
    assert config.data.seq_len == 64 and config.data.path == "a=b.txt"
    assert (config.dtype, config.log.progress, config.model.embeddings) == ("bfloat16", "plain", "tied")
    assert config.optimizer.weight_decay == CONFIG.optimizer.weight_decay


def test_fields_which_depend_on_each_other_change_together():
    # 4 key-value heads for the 2 heads there are would be refused, were the fields set one after another.
    config = apply("model.layers.*.attention.num_kv_heads=4", "model.layers.*.attention.num_heads=4")
    assert {layer.attention.num_kv_heads for layer in config.model.layers} == {4}


def test_star_reaches_every_layer_that_has_the_field():
    config = apply("model.layers.*.ffn.router.balance=bias", "model.layers.0.ffn.d_ff=48")
    assert config.model.layers[0].ffn.d_ff == 48
    assert [layer.ffn.router.balance for layer in config.model.layers[1:]] == ["bias", "bias"]


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        (
            "optimizer.peak_lr",
            "--set takes FIELD=VALUE such as optimizer.peak_lr=3e-4, got 'optimizer.peak_lr'",
        ),
        ("=3", "--set takes FIELD=VALUE"),
        ("optimiser.peak_lr=1", "there is no field 'optimiser'; did you mean 'optimizer'?"),
        ("optimizer.peek_lr=1", "there is no field 'optimizer.peek_lr'; did you mean 'optimizer.peak_lr'?"),
        ("optimizer.peak_lr=fast", "optimizer.peak_lr must be a number, got 'fast'"),
        ("data.seq_len=1e3", "data.seq_len must be a whole number, got '1e3'"),
        ("data.seq_len=-4", "data.seq_len must be a whole number of at least 2, got -4"),
        ("optimizer.betas=0.9", "optimizer.betas must be 2 values separated by commas, got '0.9'"),
        ("dtype=fp8", "dtype must be one of float32, bfloat16, got 'fp8'"),
        ("optimizer=adam", "optimizer is a group of fields"),
        ("data.seq_len.x=1", "data.seq_len is a single value, so data.seq_len.x does not exist"),
        ("model.layers=4", "model.layers cannot be set from the command line"),
        ("model.layers.7.ffn.d_ff=4", "model.layers.7 does not exist; use * or an index from 0 to 2"),
        ("model.layers.0.ffn.num_experts=4", "there is no field 'model.layers.0.ffn.num_experts'"),
        ("model.layers.*.ffn.d_fff=4", "did you mean 'model.layers.*.ffn.d_ff'?"),
        ("model.layers.1.ffn.num_experts=8", "all MoE layers must agree on num_experts"),
    ],
)
def test_mistakes_are_explained(assignment, sentence):
    with pytest.raises(ValueError) as caught:
        apply(assignment)
    assert sentence in str(caught.value)


def test_a_part_and_its_whole_cannot_both_be_set():
    with pytest.raises(ValueError, match="was already set"):
        apply("plan.pipe=2", "plan=none")
    with pytest.raises(ValueError, match="'plan' was already set as a whole"):
        apply("plan=none", "plan.pipe=2")


def test_truth_values_are_words():
    assert parse("true", bool, where="plan.overlap") is True
    assert parse("False", bool, where="plan.overlap") is False
    with pytest.raises(ValueError, match="plan.overlap must be true or false, got '1'"):
        parse("1", bool, where="plan.overlap")
