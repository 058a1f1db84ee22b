"""Charts as SVG text: stacked bars, and points or lines over two axes. Light background, one calm palette."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10
from typing import NamedTuple

# Okabe and Ito's colours, which colour-blind readers tell apart, softened; then greys and tints for more.
PALETTE = (
    "#4c78a8", "#e6a157", "#6aa56e", "#c9605a", "#8f79b5", "#75b7b2", "#d9c55f", "#b58c6d", "#d48fb0", "#9aa3ad",
    "#9cbbdb", "#f2cfa4",
)  # fmt: skip
INK, SOFT, GRID, PAPER, ALARM = "#24292f", "#6b737c", "#e3e6ea", "#ffffff", "#b3362b"
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
WIDTH = 860
FEWEST_TICKS = 3
LETTER = 7.0  # Width of a letter at 12 px, near enough to lay out legends.


class Bar(NamedTuple):
    """One bar: its label on the left, the sizes of its parts by name, and what is written behind it."""

    label: str
    parts: Mapping[str, float]
    note: str = ""


class Point(NamedTuple):
    """One point: where it is, and what a reader sees on pointing at it."""

    x: float
    y: float
    title: str = ""
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one colour.

    Attributes:
      name: in the legend; empty for none.
      points: in order of x where they are joined.
      joined: draw a line through them.
      dots: draw the points themselves.
      colour: of the palette by number, or a colour.
      dashed: dash the line.
    """

    name: str
    points: Sequence[Point]
    joined: bool = False
    dots: bool = True
    colour: int | str = 0
    dashed: bool = False

    @property
    def paint(self) -> str:
        """The colour itself."""
        return self.colour if isinstance(self.colour, str) else PALETTE[self.colour % len(PALETTE)]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis.

    Attributes:
      title: what it shows, with its unit.
      log: whether it is logarithmic.
      show: how a number on it is written.
      from_zero: whether it begins at 0.
      ticks: where lines are drawn; by default at round numbers.
    """

    title: str
    log: bool = False
    show: Callable[[float], str] = "{:g}".format
    from_zero: bool = True
    ticks: tuple[float, ...] | None = None


def stacked_bars(
    bars: Sequence[Bar],
    *,
    axis: Axis,
    limit: tuple[float, str] | None = None,
    colours: Mapping[str, str] | None = None,
) -> str:
    """Horizontal bars, each stacked from its parts; a dashed line where there is a limit.

    Args:
      bars: from the top down.
      axis: of sizes.
      limit: a size that must not be exceeded, and its name.
      colours: of parts by name; by default the palette in order of first use.
    """
    names = list(dict.fromkeys(name for bar in bars for name, size in bar.parts.items() if size > 0))
    colours = colours or {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    left = 18 + LETTER * max((len(bar.label) for bar in bars), default=0)
    right = 26 + LETTER * max((len(bar.note) for bar in bars), default=0)
    tall, gap = (20, 8) if len(bars) <= 16 else (12, 4)
    legend, legend_height = _legend([(name, colours[name]) for name in names], left)
    top = legend_height + (22 if limit else 6)
    bottom = top + len(bars) * (tall + gap)
    most = max([sum(bar.parts.values()) for bar in bars] + ([limit[0]] if limit else []), default=1.0) or 1.0
    ticks = _ticks(0.0, most, log=False)
    scale = (WIDTH - left - right) / max(most, ticks[-1])
    parts = [*legend]
    for tick in ticks:
        x = left + tick * scale
        parts.append(_line(x, top - 4, x, bottom, GRID))
        parts.append(_text(x, bottom + 16, axis.show(tick), anchor="middle", colour=SOFT))
    for number, bar in enumerate(bars):
        y, x = top + number * (tall + gap), left
        parts.append(_text(left - 8, y + tall / 2 + 4, bar.label, anchor="end"))
        for name, size in bar.parts.items():
            if size > 0:
                title = f"{bar.label}: {name} {axis.show(size)}"
                parts.append(_rect(x, y, size * scale, tall, colours[name], title))
                x += size * scale
        if bar.note:
            # Behind the line of the limit where it would be on the line.
            beyond = left + limit[0] * scale if limit else x
            crosses = x < beyond < x + 12 + LETTER * len(bar.note)
            parts.append(_text((beyond if crosses else x) + 6, y + tall / 2 + 4, bar.note, colour=SOFT))
    if limit:
        x = left + limit[0] * scale
        parts.append(_line(x, top - 6, x, bottom, ALARM, dashed=True, wide=1.5))
        anchor = "end" if x > WIDTH * 0.7 else "middle"
        parts.append(_text(x, top - 10, limit[1], anchor=anchor, colour=ALARM))
    parts.append(_text(left, bottom + 36, axis.title, colour=SOFT))
    return _svg(parts, bottom + 46)


def plot(series: Sequence[Series], *, x: Axis, y: Axis, height: int = 340) -> str:
    """Points and lines over two axes."""
    shown = [(one.name, one.paint) for one in series if one.name]
    left, right, bottom = 74, WIDTH - 24, height - 52
    legend, legend_height = _legend(shown, left)
    top = legend_height + 22
    points = [point for one in series for point in one.points if isfinite(point.x) and isfinite(point.y)]
    if not points:
        return _svg([_text(left, 40, "nothing to show", colour=SOFT)], 60)
    across = _Scale([point.x for point in points], x, left, right)
    up = _Scale([point.y for point in points], y, bottom, top)
    parts = [*legend, _text(left - 60, top - 10, y.title, colour=SOFT)]
    for tick in across.ticks:
        parts.append(_line(across(tick), top, across(tick), bottom, GRID))
        parts.append(_text(across(tick), bottom + 18, x.show(tick), anchor="middle", colour=SOFT))
    for tick in up.ticks:
        parts.append(_line(left, up(tick), right, up(tick), GRID))
        parts.append(_text(left - 8, up(tick) + 4, y.show(tick), anchor="end", colour=SOFT))
    for one in series:
        parts += _drawn(one, across, up)
    parts.append(_text((left + right) / 2, bottom + 40, x.title, anchor="middle", colour=SOFT))
    return _svg(parts, height)


class _Scale:
    """From values on an axis to pixels."""

    def __init__(self, values: Sequence[float], axis: Axis, first: float, last: float):
        self.axis = axis
        low, high = min(values), max(values)
        if axis.log:
            low, high = low / 1.15, high * 1.15
        else:
            low = min(0.0, low) if axis.from_zero else low - 0.05 * (high - low)
            high += 0.12 * (high - low) or 1.0
        ticks = axis.ticks or _ticks(low, high, log=axis.log)
        self.ticks = [tick for tick in ticks if low <= tick <= high]
        if axis.log and not axis.ticks and len(self.ticks) < FEWEST_TICKS:
            self.ticks = [tick for tick in _finer_ticks(low, high) if low <= tick <= high]
        self.low, self.high = self._place(low), self._place(high)
        self.first, self.last = first, last

    def _place(self, value: float) -> float:
        return log10(value) if self.axis.log else value

    def __call__(self, value: float) -> float:
        share = (self._place(value) - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)


def _drawn(series: Series, across: _Scale, up: _Scale) -> list[str]:
    places = [
        (across(point.x), up(point.y), point)
        for point in series.points
        if isfinite(point.x) and isfinite(point.y)
    ]
    parts = []
    if series.joined and len(places) > 1:
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b, _ in places)
        dash = ' stroke-dasharray="5 4"' if series.dashed else ""
        parts.append(f'<path d="{path}" fill="none" stroke="{series.paint}" stroke-width="2"{dash}/>')
    for a, b, point in places:
        if series.dots:
            parts.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5" fill="{series.paint}" fill-opacity="0.85" '
                f'stroke="{PAPER}"><title>{escape(point.title or series.name)}</title></circle>'
            )
        if point.label:
            beyond = a + 8 + LETTER * len(point.label) > WIDTH - 10
            parts.append(
                _text(a - 8 if beyond else a + 8, b - 7, point.label, anchor="end" if beyond else "start")
            )
    return parts


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Round numbers that cover a range: 1, 2 or 5 times powers of ten, or powers of ten, or of two if these are few."""
    if log:
        decades = range(floor(log10(low)), ceil(log10(high)) + 1)
        if len(decades) > 4:
            return [10.0**power for power in decades]
        return [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
    raw = (high - low) / 5 or 1.0
    power = 10 ** floor(log10(raw))
    step = next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= raw * 0.999)
    first = ceil(low / step - 1e-9)
    return [step * number for number in range(first, floor(high / step + 1e-9) + 1)]


def _finer_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a part of a decade: with a single number on it, an axis says nothing."""
    digits = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    return [
        digit * 10.0**power for power in range(floor(log10(low)), ceil(log10(high)) + 1) for digit in digits
    ]


def _legend(entries: Sequence[tuple[str, str]], left: float) -> tuple[list[str], float]:
    """A coloured box with a word for each entry, in as many lines as they need, and the height of all."""
    parts, x, y = [], left, 6.0
    for name, colour in entries:
        width = 26 + LETTER * len(name) + 8
        if x > left and x + width > WIDTH:
            x, y = left, y + 20
        parts.append(_rect(x, y, 12, 12, colour, name))
        parts.append(_text(x + 18, y + 10.5, name))
        x += width
    return parts, y + 24 if entries else 6.0


def _svg(parts: Sequence[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" {FONT} font-size="12">'
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="{PAPER}"/>' + "".join(parts) + "</svg>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, *, dashed: bool = False, wide: float = 1
) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-width="{wide}"{dash} fill="none"/>'


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" fill="{colour}">'
        f"<title>{escape(title)}</title></rect>"
    )
