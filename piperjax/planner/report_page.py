"""The report of a search as one HTML page: tables, and pictures as SVG inside of it."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from piperjax.planner import report
from piperjax.planner.candidates import Question
from piperjax.planner.charts import SOFT, Axis, Bar, Point, Series, plot, stacked_bars
from piperjax.planner.explain import PART_WORDS, Explanation, variations
from piperjax.planner.plan import Plan
from piperjax.planner.remedies import WORDS
from piperjax.planner.report import GIB, headline
from piperjax.planner.search import Candidate, SearchResult, answer
from piperjax.planner.timing import action_costs
from piperjax.planner.work import Product, layer_work
from piperjax.schedules import registry
from piperjax.schedules.draw import svg_gantt
from piperjax.schedules.timeline import lockstep

SCALES = (0.25, 0.5, 1, 2, 4)
MOST_DRAWN_MICROBATCHES = 24
MOST_BARS = 8
TEXT = ' class="text"'
STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; color: #24292f;
  background: #f6f7f9; margin: 0; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
section { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; padding: 18px 22px; margin: 18px 0;
  overflow-x: auto; }
h1 { font-size: 24px; margin: 0 0 6px; } h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 4px 0 10px; } p.lead { color: #57606a; }
svg { width: 100%; max-width: 940px; height: auto; display: block; }
table + p { margin-top: 12px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 7px; text-align: right; border-bottom: 1px solid #eceef1; white-space: nowrap; }
th { color: #57606a; font-weight: 600; } td.text, th.text { text-align: left; } tr.best td { background: #f0f5fb; }
td.wide { white-space: normal; text-align: left; } ul { margin: 4px 0; padding-left: 20px; }
"""


def html_page(result: SearchResult, *, explanations: Sequence[Explanation] = (), top: int = 5) -> str:
    """One file that needs nothing else: no scripts, no fonts, no pictures from elsewhere."""
    question, best = result.question, result.best
    first, second = headline(question).split("\n")
    title = f"Plan for {question.model.name} on {question.num_devices:,} {question.platform.name} devices"
    shown = result.ranked[:top]
    sections = [
        _section(
            "The best plan of each of the best meshes",
            _ranking(result, shown),
            _lead(f"Plan 1: {best.mesh}: {report.details(best, question).splitlines()[0]}"),
        ),
        _section("Memory of a device, by pipe rank", *_memory(best, question)),
        _section("Time of a step, of the best plans", *_times(shown)),
        _section("Schedule as it is executed", *_gantt(best, question)),
        _section("Matrix products of a layer on the roofline", *_roofline(best, question)),
        _section("Weak scaling", *_weak_scaling(result)),
        _section("Memory against speed", *_pareto(result)),
        _section("One choice of plan 1 made otherwise", _choices(result)),
        *(_section("Why not this mesh?", _explained(one)) for one in explanations),
        _section("What was left out", _rejected(result)),
        _section(
            "Notes", "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in report.notes(result)) + "</ul>"
        ),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f'<h1>{escape(title)}</h1><p class="lead">{escape(first)}<br>{escape(second)}</p>'
        + "\n".join(sections)
        + "</main></body></html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _lead(text: str) -> str:
    return f'<p class="lead">{escape(text)}</p>'


def _table(rows: Sequence[Sequence[str]], *, text: Sequence[int] = (), best: int | None = None) -> str:
    """A table whose first row is its head; columns in `text` are aligned to the left."""

    def row(cells: Sequence[str], tag: str, number: int) -> str:
        mark = ' class="best"' if number == best else ""
        inner = "".join(
            f"<{tag}{TEXT if i in text else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells)
        )
        return f"<tr{mark}>{inner}</tr>"

    head, *body = rows
    return (
        "<table>"
        + row(head, "th", 0)
        + "".join(row(cells, "td", i) for i, cells in enumerate(body, 1))
        + "</table>"
    )


def _ranking(result: SearchResult, shown: Sequence[Candidate]) -> str:
    rows = [list(report.columns(result.question))]
    rows += [[str(number), *report.cells_of(one)] for number, one in enumerate(shown, start=1)]
    return _table(rows, text=(4, 6, 7, 9), best=1)


def _memory(best: Candidate, question: Question) -> tuple[str, str]:
    capacity = question.platform.device.memory_bytes
    words = {name: WORDS.get(name, name) for name in best.memory[0].terms}
    groups: list[tuple[int, int]] = []
    for rank, memory in enumerate(best.memory):
        if groups and best.memory[groups[-1][0]] == memory:
            groups[-1] = (groups[-1][0], rank)
        else:
            groups.append((rank, rank))
    bars = [
        Bar(
            f"rank {first}" if first == last else f"ranks {first} to {last}",
            {words[name]: size / GIB for name, size in best.memory[first].terms.items()},
            f"{best.memory[first].total / GIB:.1f} GiB",
        )
        for first, last in groups
    ]
    limit = (capacity / GIB, f"{capacity / GIB:.0f} GiB of a device") if capacity else None
    lead = "Every rank runs the same program and allocates the same, as much as the rank that needs most."
    return _lead(lead), stacked_bars(bars, axis=Axis(title="GiB", show="{:.3g}".format), limit=limit)


def _times(shown: Sequence[Candidate]) -> tuple[str, str]:
    bars = [
        Bar(
            str(one.mesh),
            {PART_WORDS.get(name, name): seconds for name, seconds in one.time.parts.items()},
            f"{one.time.step_seconds:.4g} s" + (f", MFU {one.time.mfu:.1%}" if one.time.mfu else ""),
        )
        for one in shown[:MOST_BARS]
    ]
    uncertainty = shown[0].time.uncertainty_fraction
    lead = f"On the pipe rank with most work. A prediction may be off by {uncertainty:.0%}, mostly for all plans alike."
    return _lead(lead), stacked_bars(bars, axis=Axis(title="seconds of a step", show="{:.3g}".format))


def _gantt(best: Candidate, question: Question) -> tuple[str, str]:
    plan = _drawable(best.plan)
    costs = action_costs(question.model, plan, question.platform, question.conditions)
    picture = svg_gantt(lockstep(plan.tick_table(), costs), unit="s")
    number, all_of = plan.num_microbatches, best.plan.num_microbatches
    share = best.time.bubble_fraction
    shown = (
        f"{number} microbatches"
        if number == all_of
        else f"{number} of the {all_of} microbatches, of which all together have a bubble of {share:.1%}"
    )
    lead = f"{report.order_of(best)} on {plan.pipe} pipe ranks, {shown}; all ranks meet at every tick."
    if question.platform.device.concurrent_devices is not None:
        lead += " Drawn as if every device had cores of its own; here they share them, and idle ranks cost little."
    return _lead(lead), picture[picture.index("<svg") :]


def _drawable(plan: Plan) -> Plan:
    """The plan with so few microbatches that a picture of its schedule can be read."""
    for number in range(min(plan.num_microbatches, max(plan.pipe, MOST_DRAWN_MICROBATCHES)), 0, -1):
        batch = plan.batch_size // plan.num_microbatches * number
        try:
            registry.check(plan.schedule, plan.pipe, number, plan.num_chunks)
            return replace(plan, num_microbatches=number, batch_size=batch)
        except ValueError:  # It does not exist for this number, or not with overlap.
            continue
    return plan


def _roofline(best: Candidate, question: Question) -> tuple[str, str]:
    device, dtype = question.platform.device, question.dtype
    peak, rate = device.peak_flop_per_second[dtype], device.memory_bytes_per_second
    series = [
        Series(name=point.title.split(":")[0], points=[point], colour=number)
        for number, point in enumerate(_product_points(best.plan, question))
    ]
    most = max(*(one.points[0].x for one in series), 2 * peak / rate)
    least = min(*(one.points[0].x for one in series), 0.5 * peak / rate)
    roof = [Point(x, min(peak, rate * x) / 1e12) for x in (least, peak / rate, most)]
    name = f"roof: {peak / 1e12:.3g} TFLOP/s, {rate / 1e12:.2g} TB/s"
    series.insert(0, Series(name=name, points=roof, joined=True, dots=False, colour=SOFT, dashed=True))
    lead = (
        "Forward products of a layer, one microbatch on one device: FLOP per byte of operands and result, against the "
        "rate that the machine's file gives products of that shape. The router, in float32, is left out."
    )
    x = Axis(title="FLOP per byte", log=True)
    return _lead(lead), plot(series, x=x, y=Axis(title="TFLOP/s", log=True), height=400)


def _product_points(plan: Plan, question: Question) -> list[Point]:
    """Intensity and rate of every different product of the model's layers."""
    device, dtype = question.platform.device, question.dtype
    itemsize = {"float64": 8, "float32": 4}.get(dtype, 2)
    points: dict[Product, Point] = {}
    for layer in question.model.kinds.values():
        work = layer_work(
            question.model.d_model,
            layer,
            tokens=plan.tokens_per_device,
            seq_len=plan.seq_len,
            expert=plan.expert,
            imbalance=question.imbalance,
        )
        for product in work.products:
            groups, (m, n, k) = max(product.groups, 1), (product.rows, product.columns, product.depth)
            seconds = device.product_seconds(m, n, k, dtype=dtype, grouped=product.groups > 0, groups=groups)
            flop, num_bytes = 2 * groups * m * n * k, itemsize * groups * (m * k + k * n + m * n)
            shape = f"{groups} x " * (groups > 1) + f"[{m:.0f}, {k:.0f}] x [{k:.0f}, {n:.0f}]"
            reached = flop / seconds / 1e12
            title = f"{product.name}: {shape}, {reached:.3g} TFLOP/s"
            if not product.is_wide:
                points.setdefault(product, Point(flop / num_bytes, reached, title))
    return list(points.values())


def _weak_scaling(result: SearchResult) -> tuple[str, str]:
    found = []
    for scale, one in weak_scaling(result):
        rate = one.time.flop_per_second / 1e12
        title = f"{one.plan.num_devices} devices: {one.mesh}, {rate:.3g} TFLOP/s per device"
        found.append(Point(result.question.num_devices * scale, rate, title, f"{rate:.3g}"))
    lead = (
        "The same tokens per device on fewer and on more devices, planned anew for each number; sizes on which nothing "
        "fits are left out."
    )
    x = Axis(title="devices", log=True, show="{:,.0f}".format, ticks=tuple(point.x for point in found))
    y = Axis(title="useful TFLOP/s per device")
    return _lead(lead), plot([Series(name="", points=found, joined=True)], x=x, y=y, height=280)


def weak_scaling(result: SearchResult) -> list[tuple[float, Candidate]]:
    """The best plans for a quarter to four times the devices with as many tokens each, where any fits."""
    question, found = result.question, []
    for scale in SCALES:
        devices, batch = question.num_devices * scale, question.batch_size * scale
        if scale == 1:
            found.append((scale, result.best))
        elif devices == int(devices) and batch == int(batch) and devices >= 1:
            free = {
                name: value
                for name, value in question.wished.items()
                if name not in ("pipe", "data", "expert")
            }
            try:
                changed = replace(question, num_devices=int(devices), batch_size=int(batch), wished=free)
                found.append((scale, answer(changed, keep=1, advise=False).best))
            except ValueError:
                continue  # Nothing fits, or the machine is not that large.
    return found


def _pareto(result: SearchResult) -> tuple[str, str]:
    scores = result.scores
    has_peak = result.best.time.mfu is not None
    points = []
    for one in result.pareto:
        plan = scores.plan(one.row)
        title = (
            f"pipe={plan.pipe}, data={plan.data}, expert={plan.expert}, {plan.schedule}, {plan.memory_mode}"
        )
        points.append(
            Point(one.num_bytes / GIB, 100 * one.mfu if has_peak else one.flop_per_second / 1e12, title)
        )
    lead = "Plans that no other beats in both: what less memory costs. Point at one to see it."
    y = Axis(title="MFU, %" if has_peak else "useful TFLOP/s per device")
    x = Axis(title="GiB on a device", from_zero=False)
    return _lead(lead), plot([Series(name="", points=points, joined=True)], x=x, y=y, height=300)


def _choices(result: SearchResult) -> str:
    rows = [["choice", "instead", "step", "GiB", ""]]
    rows += [
        [
            one.choice,
            one.value,
            f"{one.slower:+.1%}",
            f"{one.num_bytes / GIB:.1f}",
            "" if one.fits else "does not fit",
        ]
        for one in variations(result)
    ]
    return _table(rows, text=(0, 1, 4)) if len(rows) > 1 else _lead("There was no choice.")


def _explained(one: Explanation) -> str:
    asked = ", ".join(f"{name}={value}" for name, value in one.asked.items())
    text = f"<p><b>{escape(asked)}</b>: {escape(one.sentence)}</p>"
    if one.candidate is None:
        return text
    rows = [["part of a step", "best", "this", "difference"]]
    rows += [
        [PART_WORDS.get(name, name), f"{best:.4g} s", f"{this:.4g} s", report.difference(best, this)]
        for name, best, this in one.parts
    ]
    return (
        text
        + f"<p>{escape(f'{one.candidate.mesh}, {report.summary(one.candidate)}')}</p>"
        + _table(rows, text=(0,))
    )


def _rejected(result: SearchResult) -> str:
    rows = [["", "", "reason", "such as"]]
    rows += [[f"{one.count:,}", report.counted(one), one.reason, one.example] for one in result.rejected]
    return _lead(report.rejected(result).splitlines()[0]) + _table(rows, text=(1, 2, 3))
