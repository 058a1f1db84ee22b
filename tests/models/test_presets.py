"""Tests of models/presets.py: names, and the published totals of the paper's families."""

import json

import pytest

from models.config import ModelConfig
from models.cost import parameters
from models.presets import PRESETS, named_model, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_named_after_their_function_and_survive_json(name):
    config = preset(name)
    assert config.name == name
    assert preset(name) is config
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(
        ValueError, match=r"no model named 'mixtral'; did you mean 'mixtral_8x7b'\? There are tiny, "
    ):
        preset("mixtral")


@pytest.mark.parametrize(
    ("name", "published", "unit"),
    [
        ("xmoe_small", 10.1, 2**30),
        ("xmoe_medium", 55.2, 2**30),
        ("xmoe_large", 201.4, 2**30),
        ("xmoe_super", 545.4, 2**30),
        ("weak_110b", 110, 10**9),
        ("weak_862b", 862, 10**9),
        ("weak_1_7t", 1700, 10**9),
    ],
)
def test_totals_of_the_paper(name, published, unit):
    """Layers alone make the published total; the embeddings it leaves out add at most 1.5 %."""
    counted = parameters(preset(name))
    layers = sum(layer.total for layer in counted.layers)
    assert layers / unit == pytest.approx(published, rel=0.013 if published == 1700 else 0.007)
    assert counted.total / layers < 1.015


def test_small_models_have_the_size_that_their_docstrings_say():
    sizes = {name: parameters(preset(name)) for name in ("tiny", "small", "peers_bench")}
    assert {name: (size.total, size.active) for name, size in sizes.items()} == {
        "tiny": (2_822_528, 1_053_056),
        "small": (102_172_160, 34_735_616),
        "peers_bench": (887_360, 297_536),
    }


def test_maverick_has_experts_in_every_second_layer():
    assert preset("llama4_maverick").moe_layers == tuple(range(1, 48, 2))


def test_kinds():
    assert preset("tiny").kind_of_layer == ("dense", "moe", "moe", "moe")
    assert preset("deepseek_v3").kind_of_layer == ("dense",) * 3 + ("moe",) * 58
    assert preset("peers_bench").kind_of_layer == ("moe",) * 4


def test_a_model_can_be_named_or_read_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(preset("tiny").to_dict()))
    assert named_model(str(path)) == named_model("tiny") == preset("tiny")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot read model file .*mine.json: No such file"),
        ("{", "model file .*mine.json is not valid JSON"),
        ("{}", "model file .*mine.json: model needs the field 'name'"),
    ],
)
def test_a_wrong_model_file_is_one_sentence(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        named_model(str(tmp_path / "mine.json"))
