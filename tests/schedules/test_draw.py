"""Drawings: what a person would draw, and SVG that is well formed and to scale."""

from xml.etree import ElementTree

import pytest

from piperjax.schedules.classic import gpipe, one_f_one_b
from piperjax.schedules.draw import GREY, svg_gantt, text_gantt
from piperjax.schedules.ticks import pack
from piperjax.schedules.timeline import ActionCosts, lockstep, simulate


def test_text_gantt_drawn_out():
    drawn = text_gantt(simulate(one_f_one_b(2, 3), ActionCosts(forward=1.0, backward=2.0)))
    assert drawn == (
        "rank  0 |0|1|····[0]|2|[1]|··[2]||\n"
        "rank  1 |··0|[0]|1|[1]|2|[2]|····|"
    )  # fmt: skip


def test_svg_boxes_are_to_scale_and_grey_is_the_bubble():
    timeline = lockstep(pack(gpipe(3, 4)), ActionCosts(forward=1.0, backward=2.0))
    root = ElementTree.fromstring(svg_gantt(timeline, title="a < b & c"))
    boxes = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    actions = [e for e in boxes if e.get("fill") not in (GREY, "white")]
    backgrounds = [e for e in boxes if e.get("fill") == GREY]
    assert len(actions) == 3 * 4 * 2 and len(backgrounds) == 3
    covered = sum(float(e.get("width")) for e in actions) / sum(float(e.get("width")) for e in backgrounds)
    assert 1 - covered == pytest.approx(timeline.bubble_fraction, abs=1e-3)
    assert "a < b & c" in "".join(root.itertext())
