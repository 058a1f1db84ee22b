"""Drawings of a timeline: a Gantt chart as text and as SVG, one row per pipe rank."""

from colorsys import hls_to_rgb

from piperjax.schedules.schedule import Action
from piperjax.schedules.timeline import Timeline

ROW_HEIGHT, ROW_GAP, MARGIN, LABEL_WIDTH, FOOT = 26, 6, 12, 64, 44
GREY = "#e4e4e4"


def text_gantt(timeline: Timeline, *, width: int = 110) -> str:
    """Draws a timeline with characters, time from left to right.

    A forward shows its microbatch in plain digits, a backward in brackets as far as they fit; idle time is dots.
    Unit costs come out as one cell per second when they fit in `width` characters.
    """
    total = timeline.step_seconds
    digits = max(2, len(str(timeline.schedule.num_microbatches - 1)) + 1)
    shortest = min(
        (
            end - timeline.start_seconds[a]
            for a, end in timeline.end_seconds.items()
            if end > timeline.start_seconds[a]
        ),
        default=total,
    )
    columns = min(max(width, 20), max(1, round(total / shortest * digits)))
    rows = []
    for rank, actions in enumerate(timeline.schedule.ranks):
        cells = ["·"] * columns
        for action in actions:
            first = round(timeline.start_seconds[action] / total * columns)
            last = max(first + 1, round(timeline.end_seconds[action] / total * columns))
            for at, letter in enumerate(_cell(action, last - first)):
                if first + at < columns:
                    cells[first + at] = letter
        rows.append(f"rank {rank:2d} |{''.join(cells)}|")
    return "\n".join(rows)


def svg_gantt(timeline: Timeline, *, title: str = "", width: int = 1100) -> str:
    """Draws a timeline as SVG: a colour per microbatch, light for F, strong for B, W hatched by a border; idle grey."""
    schedule, total = timeline.schedule, timeline.step_seconds
    scale = (width - LABEL_WIDTH - 2 * MARGIN) / total
    top = MARGIN + (26 if title else 0)
    height = top + schedule.num_ranks * (ROW_HEIGHT + ROW_GAP) + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    if title:
        parts.append(f'<text x="{MARGIN}" y="{MARGIN + 12}" font-size="15">{_escaped(title)}</text>')
    for rank, actions in enumerate(schedule.ranks):
        y = top + rank * (ROW_HEIGHT + ROW_GAP)
        parts.append(f'<text x="{MARGIN}" y="{y + 18}" font-size="13">rank {rank}</text>')
        left = MARGIN + LABEL_WIDTH
        parts.append(
            f'<rect x="{left}" y="{y}" width="{total * scale:.2f}" height="{ROW_HEIGHT}" fill="{GREY}"/>'
        )
        parts += [_box(timeline, action, left, y, scale) for action in actions]
    foot = height - FOOT + 20
    parts.append(
        f'<text x="{MARGIN + LABEL_WIDTH}" y="{foot}" font-size="13">time {total:g}; '
        f"bubble (grey) {timeline.bubble_fraction:.1%}; light = forward, strong = backward; "
        "the number is the microbatch</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(action: Action, width: int) -> str:
    number = str(action.microbatch)
    text = number if action.kind == "F" else f"[{number}]" if width >= len(number) + 2 else f"[{number}"
    fill = "-" if action.kind == "F" else "="
    return (text + fill * width)[: max(width - 1, 1)] + ("|" if width > len(text) else "")


def _box(timeline: Timeline, action: Action, left: float, y: float, scale: float) -> str:
    start, end = timeline.start_seconds[action], timeline.end_seconds[action]
    x, wide = left + start * scale, (end - start) * scale
    hue = action.microbatch / timeline.schedule.num_microbatches
    lightness = {"F": 0.82, "B": 0.5, "I": 0.62, "W": 0.4}[action.kind]
    # Chunks of one rank share a colour; the later ones get a dark lower edge.
    chunk = timeline.schedule.chunk_of_stage[action.stage]
    edge = "#333" if chunk else "white"
    box = (
        f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{ROW_HEIGHT}" '
        f'fill="{_hex(hue, lightness)}" stroke="{edge}" stroke-width="1"><title>{action}</title></rect>'
    )
    if wide < 7 * len(str(action.microbatch)) + 2:
        return box
    ink = "white" if action.kind in "BW" else "#222"
    return box + (
        f'<text x="{x + wide / 2:.2f}" y="{y + 18}" font-size="12" text-anchor="middle" fill="{ink}">'
        f"{action.microbatch}</text>"
    )


def _hex(hue: float, lightness: float) -> str:
    # Not every SVG reader knows hsl().
    return "#" + "".join(f"{round(255 * part):02x}" for part in hls_to_rgb(hue, lightness, 0.6))


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
