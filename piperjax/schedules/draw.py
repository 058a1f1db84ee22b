"""Drawings of a timeline: a Gantt chart as text and as SVG, one row per pipe rank."""

from colorsys import hls_to_rgb

from piperjax.schedules.schedule import Action
from piperjax.schedules.timeline import Timeline

ROW_HEIGHT, ROW_GAP, MARGIN, LABEL_WIDTH, FOOT = 26, 6, 12, 64, 58
GREY, INK, PAPER = "#e4e4e4", "#222222", "white"
LIGHTNESS = {"F": 0.82, "B": 0.5, "I": 0.66, "W": 0.42}
BRACKETS = {"B": "[]", "I": "()", "W": "{}"}
# Hues a golden section apart: neighbours in time differ, and no two microbatches share one.
GOLDEN_SECTION = 0.618033988749895
STRIPES = (
    '<defs><pattern id="stripes" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="2" height="6" fill="white" fill-opacity="0.45"/></pattern></defs>'
)


def text_gantt(timeline: Timeline, *, width: int = 170) -> str:
    """Draws a timeline with characters, time from left to right.

    A forward shows its microbatch in plain digits; B is in [], I in (), W in {} as far as they fit; a prime stands
    for each chunk after the first; idle time is dots.
    """
    total = timeline.step_seconds
    schedule = timeline.schedule
    durations = [end - timeline.start_seconds[a] for a, end in timeline.end_seconds.items()]
    shortest = min((seconds for seconds in durations if seconds > 0), default=total)
    split = any(action.kind == "W" for actions in schedule.ranks for action in actions)
    letters = len(str(schedule.num_microbatches - 1)) + schedule.num_chunks + split
    columns = min(max(width, 20), max(1, round(total / shortest * max(2, letters))))
    rows = []
    for rank, actions in enumerate(schedule.ranks):
        cells = ["·"] * columns
        for action in actions:
            first = round(timeline.start_seconds[action] / total * columns)
            last = max(first + 1, round(timeline.end_seconds[action] / total * columns))
            primes = "'" * schedule.chunk_of_stage[action.stage]
            for at, letter in enumerate(_cell(action.kind, str(action.microbatch), primes, last - first)):
                if first + at < columns:
                    cells[first + at] = letter
        rows.append(f"rank {rank:2d} |{''.join(cells)}|")
    return "\n".join(rows)


def svg_gantt(timeline: Timeline, *, title: str = "", unit: str = "", width: int = 1100) -> str:
    """Draws a timeline as SVG: a colour per microbatch, idle time grey.

    F is light, B strong, I in between and W dark with stripes; lines under a box count the chunk. Its length is
    written below, in a unit if one is given: costs of `show` are in times of a stage.
    """
    schedule, total = timeline.schedule, timeline.step_seconds
    scale = (width - LABEL_WIDTH - 2 * MARGIN) / total
    left, top = MARGIN + LABEL_WIDTH, MARGIN + (26 if title else 0)
    height = top + schedule.num_ranks * (ROW_HEIGHT + ROW_GAP) + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        STRIPES,
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
    ]
    if title:
        parts.append(f'<text x="{MARGIN}" y="{MARGIN + 12}" font-size="15">{_escaped(title)}</text>')
    for rank, actions in enumerate(schedule.ranks):
        y = top + rank * (ROW_HEIGHT + ROW_GAP)
        parts.append(f'<text x="{MARGIN}" y="{y + 18}" font-size="13">rank {rank}</text>')
        parts.append(
            f'<rect x="{left}" y="{y}" width="{total * scale:.2f}" height="{ROW_HEIGHT}" fill="{GREY}"/>'
        )
        parts += [_box(timeline, action, left, y, scale) for action in actions]
    foot = height - FOOT + 16
    parts.append(
        f'<text x="{left}" y="{foot}" font-size="13">time {total:.4g}{unit and " " + unit}; bubble (grey) '
        f"{timeline.bubble_fraction:.1%}; the number is the microbatch</text>"
    )
    parts += _legend(timeline, left, foot + 12)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(kind: str, number: str, primes: str, width: int) -> str:
    """A box of characters that ends in a bar; what does not fit is left out: closing bracket, chunk, number."""
    if width < 2:
        return number[0] if kind == "F" else BRACKETS[kind][0]
    opening, closing = ("", "") if kind == "F" else BRACKETS[kind]
    texts = (opening + number + primes + closing, opening + number + primes, opening + number)
    text = next((text for text in texts if len(text) < width), texts[-1])
    return (text + ("-" if kind == "F" else "=") * width)[: width - 1] + "|"


def _box(timeline: Timeline, action: Action, left: float, y: float, scale: float) -> str:
    start, end = timeline.start_seconds[action], timeline.end_seconds[action]
    x, wide = left + start * scale, (end - start) * scale
    chunk = timeline.schedule.chunk_of_stage[action.stage]
    box = _painted(action, chunk, x, y, wide)
    label = str(action.microbatch)
    if wide < 7 * len(label) + 2:
        return box
    ink = PAPER if action.kind in "BW" else INK
    return box + (
        f'<text x="{x + wide / 2:.2f}" y="{y + 16}" font-size="12" text-anchor="middle" fill="{ink}">{label}</text>'
    )


def _painted(action: Action, chunk: int, x: float, y: float, wide: float) -> str:
    """A box in the colour of its microbatch, striped for W, with a line at its foot per chunk after the first."""
    hue = action.microbatch * GOLDEN_SECTION % 1.0
    size = f'x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{ROW_HEIGHT}"'
    box = (
        f'<rect {size} fill="{_hex(hue, LIGHTNESS[action.kind])}" stroke="{PAPER}" stroke-width="1">'
        f"<title>{action}</title></rect>"
    )
    if action.kind == "W":
        box += f'<rect {size} fill="url(#stripes)"/>'
    for line in range(chunk):
        at = y + ROW_HEIGHT - 2.5 - 3 * line
        box += f'<path d="M{x + 1:.2f} {at}h{max(wide - 2, 0.5):.2f}" stroke="{INK}" stroke-width="1.5"/>'
    return box


def _legend(timeline: Timeline, left: float, y: float) -> list[str]:
    """A sample box with a word for each kind of action and each chunk that occurs."""
    schedule = timeline.schedule
    words = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
    found = {action.kind for actions in schedule.ranks for action in actions}
    samples = [(kind, 0, word) for kind, word in words.items() if kind in found]
    if schedule.num_chunks > 1:
        samples += [("F", chunk, f"chunk {chunk}") for chunk in range(schedule.num_chunks)]
    parts, x = [], left
    for kind, chunk, word in samples:
        parts.append(_painted(Action(kind, 0, 0), chunk, x, y, 26))
        parts.append(f'<text x="{x + 32}" y="{y + 17}" font-size="13">{word}</text>')
        x += 32 + 8 * len(word) + 18
    return parts


def _hex(hue: float, lightness: float) -> str:
    # Not every SVG reader knows hsl().
    return "#" + "".join(f"{round(255 * part):02x}" for part in hls_to_rgb(hue, lightness, 0.6))


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
