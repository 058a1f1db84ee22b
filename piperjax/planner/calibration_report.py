"""This file shows measurements beside the laws that were fitted to them: as a table, and as charts."""

from collections.abc import Sequence

from piperjax.planner.calibration import Calibration, ExchangeSample, Measurements, predicted_seconds
from piperjax.planner.charts import Axis, Point, Series, plot

CHART_HEIGHT = 340


def quality_notes(calibration: Calibration) -> dict[str, str]:
    """One sentence for each table of a platform file on how well the law meets the samples."""
    return {
        name: f"{fit.num_samples} samples, r^2 {fit.r_squared:.3f}, half of them within {fit.typical_error:.0%} of the "
        f"law, the worst {fit.worst_error:.0%} off"
        for name, fit in calibration.fits.items()
    }


def table(calibration: Calibration) -> str:
    """The fits as lines of text."""
    lines = [f"{'':32s}{'samples':>8s}{'r^2':>8s}{'median error':>14s}{'worst':>8s}"]
    for name, fit in calibration.fits.items():
        errors = f"{fit.typical_error:14.0%}{fit.worst_error:8.0%}"
        lines.append(f"{name:32s}{fit.num_samples:8d}{fit.r_squared:8.3f}{errors}")
    return "\n".join(lines)


def charts(calibration: Calibration, measurements: Measurements) -> str:
    """Samples as dots and laws as lines, as one SVG picture: products, then each collective over message sizes."""
    pictures = []
    if measurements.products:
        pictures.append(_products(calibration, measurements))
    names = sorted({sample.collective for sample in measurements.exchanges})
    pictures += [_exchange(calibration, name, measurements.exchanges) for name in names]
    placed = [
        picture.replace("<svg ", f'<svg y="{number * CHART_HEIGHT}" height="{CHART_HEIGHT}" ', 1)
        for number, picture in enumerate(pictures)
    ]
    height = max(1, len(pictures)) * CHART_HEIGHT
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}">{"".join(placed)}</svg>\n'


def _products(calibration: Calibration, measurements: Measurements) -> str:
    device, series = calibration.platform.device, []
    together = measurements.num_local / (device.concurrent_devices or measurements.num_local)
    kinds = sorted({(sample.dtype, bool(sample.groups)) for sample in measurements.products})
    for colour, (dtype, is_grouped) in enumerate(kinds):
        points, law = [], []
        for s in measurements.products:
            if (s.dtype, bool(s.groups)) != (dtype, is_grouped):
                continue
            shape = f"[{s.m}, {s.k}] x [{s.k}, {s.n}]" + (f" for {s.groups} experts" if s.groups else "")
            seconds = s.predicted(device)
            points.append(Point(s.flop, s.flop * together / s.seconds, title=shape))
            law.append(Point(s.flop, s.flop / seconds, title=f"{shape}, law"))
        name = f"{dtype} {'experts' if is_grouped else 'dense'}"
        series += [
            Series(name=name, points=points, colour=colour),
            Series(name="", points=sorted(law), colour=colour, joined=True, dots=False, dashed=True),
        ]
    return plot(
        series,
        x=Axis(title="FLOP of a product (dots measured, lines the law)", log=True, show="{:.0e}".format),
        y=Axis(title="FLOP per second of a device alone", log=True, show="{:.1e}".format),
        height=CHART_HEIGHT,
    )


def _exchange(calibration: Calibration, name: str, samples: Sequence[ExchangeSample]) -> str:
    some = [sample for sample in samples if sample.collective == name]
    groups = sorted({sample.groups for sample in some})
    series = []
    for colour, group in enumerate(groups):
        chosen = sorted((s for s in some if s.groups == group), key=lambda s: s.num_bytes)
        law = predicted_seconds(calibration.platform, chosen)
        label = " then ".join(f"{part.size} devices {part.stride} apart" for part in group)
        series += [
            Series(name=label, points=[Point(s.num_bytes, s.seconds) for s in chosen], colour=colour),
            Series(
                name="",
                points=[Point(s.num_bytes, float(y)) for s, y in zip(chosen, law, strict=True)],
                colour=colour,
                joined=True,
                dots=False,
                dashed=True,
            ),
        ]
    return plot(
        series,
        x=Axis(title=f"bytes of {name.replace('_', '-')}", log=True, show="{:.0e}".format),
        y=Axis(title="seconds", log=True, show="{:.0e}".format),
        height=CHART_HEIGHT,
    )
