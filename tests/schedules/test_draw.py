"""Drawings: what a person would draw, and SVG that is well formed and to scale."""

from xml.etree import ElementTree

import pytest

from piperjax.schedules import registry
from piperjax.schedules.classic import gpipe, one_f_one_b
from piperjax.schedules.draw import GREY, svg_gantt, text_gantt
from piperjax.schedules.interleaved import interleaved
from piperjax.schedules.ticks import pack
from piperjax.schedules.timeline import ActionCosts, lockstep, simulate
from piperjax.schedules.v_shaped import zb_v

SVG = "{http://www.w3.org/2000/svg}"


def test_text_gantt_drawn_out():
    drawn = text_gantt(simulate(one_f_one_b(2, 3), ActionCosts(forward=1.0, backward=2.0)))
    assert drawn == (
        "rank  0 |0|1|····[0]|2|[1]|··[2]||\n"
        "rank  1 |··0|[0]|1|[1]|2|[2]|····|"
    )  # fmt: skip


def actions_of(root):
    """Boxes of actions, without the samples of the legend."""
    boxes = [e for e in root.iter(SVG + "rect") if e.find(SVG + "title") is not None]
    foot = max(float(e.get("y")) for e in boxes)
    return [e for e in boxes if float(e.get("y")) < foot]


def test_text_gantt_tells_kinds_and_chunks_apart():
    drawn = text_gantt(simulate(zb_v(1, 2), ActionCosts()))
    assert drawn == "rank  0 |0--|0'-|(0'|{0'|1--|(0)|{0}|1'-|(1'|{1'|(1)|{1}||"
    assert "[" in text_gantt(simulate(interleaved(2, 4), ActionCosts()))


@pytest.mark.parametrize("name", registry.names())
def test_svg_is_well_formed_and_every_action_is_drawn_once(name):
    schedule = registry.build(name, 4, 8)
    for timeline in (simulate(schedule, ActionCosts()), lockstep(pack(schedule), ActionCosts())):
        root = ElementTree.fromstring(svg_gantt(timeline, title=name))
        drawn = actions_of(root)
        titles = sorted(e.find(SVG + "title").text for e in drawn)
        assert titles == sorted(str(a) for actions in timeline.schedule.ranks for a in actions)
        width, height = map(float, root.get("viewBox").split()[2:])
        for box in drawn:
            assert float(box.get("x")) + float(box.get("width")) <= width
            assert float(box.get("y")) + float(box.get("height")) <= height
        striped = [e for e in root.iter(SVG + "rect") if e.get("fill") == "url(#stripes)"]
        weight_gradients = sum(a.kind == "W" for actions in timeline.schedule.ranks for a in actions)
        assert len(striped) == weight_gradients + (weight_gradients > 0)


def test_kinds_differ_in_colour_and_microbatches_too():
    root = ElementTree.fromstring(svg_gantt(simulate(zb_v(4, 8), ActionCosts())))
    colours = {e.find(SVG + "title").text: e.get("fill") for e in actions_of(root)}
    assert len(set(colours.values())) == 3 * 8
    assert len({colours[f"0{kind}0"] for kind in "FIW"}) == 3
    assert colours["0F0"] == colours["7F0"]


def test_labels_fit_their_boxes():
    root = ElementTree.fromstring(svg_gantt(simulate(zb_v(8, 64), ActionCosts())))
    widths = {float(e.get("width")) for e in actions_of(root)}
    labels = [e for e in root.iter(SVG + "text") if e.get("text-anchor") == "middle"]
    assert max(widths) < 9 and not labels


def test_svg_boxes_are_to_scale_and_grey_is_the_bubble():
    timeline = lockstep(pack(gpipe(3, 4)), ActionCosts(forward=1.0, backward=2.0))
    root = ElementTree.fromstring(svg_gantt(timeline, title="a < b & c", unit="s"))
    boxes = list(root.iter(SVG + "rect"))
    actions = actions_of(root)
    backgrounds = [e for e in boxes if e.get("fill") == GREY]
    assert len(actions) == 3 * 4 * 2 and len(backgrounds) == 3
    covered = sum(float(e.get("width")) for e in actions) / sum(float(e.get("width")) for e in backgrounds)
    assert 1 - covered == pytest.approx(timeline.bubble_fraction, abs=1e-3)
    assert "a < b & c" in "".join(root.itertext()) and "time 18 s; bubble" in "".join(root.itertext())
