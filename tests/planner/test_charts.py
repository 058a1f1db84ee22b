"""Charts: sizes are to scale, everything drawn lies on the paper, and texts are escaped."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from piperjax.planner.charts import ALARM, WIDTH, Axis, Bar, Point, Series, plot, stacked_bars

SVG = "{http://www.w3.org/2000/svg}"


def drawn(text):
    return ElementTree.fromstring(text)


def titled(root, title):
    """The element that a reader sees `title` of."""
    (found,) = [e for e in root.iter() if e.findtext(f"{SVG}title") == title]
    return found


def test_bars_are_stacked_to_scale_and_stay_below_the_limit():
    bars = [Bar("rank 0", {"parameters": 20.0, "stash": 30.0}, "50 GiB"), Bar("rank 1", {"parameters": 20.0})]
    root = drawn(stacked_bars(bars, axis=Axis(title="GiB"), limit=(64.0, "64 GiB of a device")))
    first, second = titled(root, "rank 0: parameters 20"), titled(root, "rank 0: stash 30")
    assert float(second.get("width")) == pytest.approx(1.5 * float(first.get("width")), rel=0.01)
    assert float(second.get("x")) == pytest.approx(float(first.get("x")) + float(first.get("width")), abs=0.2)
    (line,) = [e for e in root.iter(f"{SVG}path") if e.get("stroke") == ALARM]
    scale = float(first.get("width")) / 20
    assert float(re.match(r"M([\d.]+)", line.get("d"))[1]) == pytest.approx(
        float(first.get("x")) + 64 * scale, abs=1
    )


def test_what_is_written_behind_a_bar_is_not_crossed_by_the_limit():
    for size in (30.0, 60.0, 63.9):
        root = drawn(
            stacked_bars(
                [Bar("rank", {"a": size}, "62.4 GiB")], axis=Axis(title="GiB"), limit=(64.0, "64 GiB")
            )
        )
        (line,) = [e for e in root.iter(f"{SVG}path") if e.get("stroke") == ALARM]
        (note,) = [e for e in root.iter(f"{SVG}text") if e.text == "62.4 GiB"]
        at, first = float(re.match(r"M([\d.]+)", line.get("d"))[1]), float(note.get("x"))
        assert not first < at < first + 8 * len("62.4 GiB") and first + 8 * len("62.4 GiB") < WIDTH, size


def test_a_logarithmic_axis_puts_equal_ratios_at_equal_distances():
    points = [Point(10.0**power, 1.0, title=f"p{power}") for power in range(4)]
    axis = Axis(title="FLOP per byte", log=True)
    root = drawn(plot([Series(name="", points=points)], x=axis, y=Axis(title="rate")))
    places = [float(titled(root, f"p{power}").get("cx")) for power in range(4)]
    steps = [b - a for a, b in pairwise(places)]
    assert max(steps) - min(steps) < 0.3 and steps[0] > 50


@pytest.mark.parametrize(("low", "high"), [(0.0246, 0.05), (105, 192), (650, 990), (1, 1000), (3, 5000)])
def test_a_logarithmic_axis_has_numbers_to_read_it_by(low, high):
    points = [Point(1.0, low), Point(2.0, high)]
    root = drawn(plot([Series(name="", points=points)], x=Axis(title="x"), y=Axis(title="rate", log=True)))
    numbers = [float(e.text) for e in root.iter(f"{SVG}text") if e.get("text-anchor") == "end"]
    assert 3 <= len(numbers) <= 12 and all(low / 1.16 <= number <= high * 1.16 for number in numbers)


def test_everything_lies_on_the_paper():
    series = [
        Series(
            name=f"series {i}",
            points=[Point(x, x * i + 1, label="a label") for x in (1, 5, 1000)],
            joined=True,
        )
        for i in range(9)
    ]
    root = drawn(plot(series, x=Axis(title="x"), y=Axis(title="y")))
    height = float(root.get("viewBox").split()[3])
    for element in root.iter():
        for name, most in (("x", WIDTH), ("cx", WIDTH), ("y", height), ("cy", height)):
            assert 0 <= float(element.get(name, 0)) <= most


def test_texts_are_escaped_and_nothing_is_no_error():
    root = drawn(stacked_bars([Bar("a < b & c", {"x": 1.0})], axis=Axis(title="<s>")))
    assert "a < b & c" in [e.text for e in root.iter(f"{SVG}text")]
    assert "nothing to show" in plot([], x=Axis(title="x"), y=Axis(title="y"))
    assert drawn(stacked_bars([], axis=Axis(title="s"))).get("viewBox")
