"""The page: well-formed, complete, and in need of nothing from elsewhere."""

import re
from functools import lru_cache
from xml.etree import ElementTree

from meshes.platform import load_platform
from models.presets import preset
from piperjax.planner.explain import explain
from piperjax.planner.report_page import html_page, weak_scaling
from piperjax.planner.search import search


@lru_cache(maxsize=1)
def found():
    return search(preset("mixtral_8x7b"), load_platform("frontier"), 64, batch_size=256, seq_len=4096)


@lru_cache(maxsize=1)
def page():
    return html_page(found(), explanations=[explain(found(), {"pipe": 16, "expert": 4})], top=3)


def test_it_is_one_file_without_scripts():
    text = page()
    assert text.startswith("<!doctype html>") and len(text) < 2_000_000
    assert "<script" not in text and "<link" not in text
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text)) == set()
    addresses = set(re.findall(r"https?://[^\"'\s<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_every_picture_is_well_formed():
    pictures = re.findall(r"<svg .*?</svg>", page(), re.DOTALL)
    assert len(pictures) == 6  # Memory, time, schedule, roofline, weak scaling, compromises.
    for picture in pictures:
        assert ElementTree.fromstring(picture).tag.endswith("svg")


def test_it_says_what_the_text_says():
    text = page()
    best = found().best
    for words in (
        "Plan for mixtral_8x7b on 64 frontier devices",
        f"{best.time.step_seconds:.4g} s",
        "64 GiB of a device",
        "Matrix products of a layer on the roofline",
        "experts up",
        "Why not this mesh?",
        "most of it is",
        "What was left out",
        "the expert axis must divide the 8 experts",
        "published",
    ):
        assert words in text, words
    assert "Drawn as if" not in text


def test_weak_scaling_keeps_the_tokens_of_a_device():
    points = weak_scaling(found())
    assert [scale for scale, _ in points if scale >= 1] == [1, 2, 4]
    for scale, one in points:
        assert one.plan.num_devices == 64 * scale and one.plan.batch_size == 256 * scale


def test_small_machines_without_a_peak_have_a_page_too():
    cpu8 = load_platform("cpu8")
    result = search(preset("tiny"), cpu8, 8, batch_size=32, seq_len=64, dtype="float32", keep=2)
    text = html_page(result)
    assert "useful TFLOP/s per device" in text and "MFU" in text
    assert "Drawn as if every device had cores of its own" in text
    scaling = text[text.index("Weak scaling") : text.index("Memory against speed")]
    assert not re.search(r">0(\.0)?<|, 0(\.0)? TFLOP/s", scaling.replace(">0<", "", 1)), (
        "rates round to nothing"
    )
