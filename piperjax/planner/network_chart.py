"""This file is the picture of `python -m piperjax simulate`: speed-ups over flat by nodes, sizes and message costs."""

from collections.abc import Sequence

from meshes.platform import Platform
from piperjax.planner.charts import Axis, Point, Series, plot
from piperjax.planner.network_table import Row, show_bytes, show_seconds


def speedup_chart(platform: Platform, rows: Sequence[Row], alphas: Sequence[float]) -> str:
    """SVG of the speed-up of the quickest of halo2 and halo3 over a flat all-to-all, without de-duplication.

    A colour for each size. Lines are drawn through for the first cost of a message, which is the platform's unless
    another was asked for, and dashed for the others.
    """
    sizes = list(dict.fromkeys(row.num_bytes for row in rows))
    series = []
    for colour, size in enumerate(sizes):
        own = sorted((row for row in rows if row.num_bytes == size), key=lambda row: row.num_nodes)
        for number, alpha in enumerate(alphas):
            what = f"{show_bytes(size)} a device, {show_seconds(alpha)} a message"
            speedups = [(row.num_nodes, row.speedups[number]) for row in own]
            points = [Point(nodes, x, f"{what}, {nodes} nodes: {x:.2f}x") for nodes, x in speedups]
            points[-1] = points[-1]._replace(label=show_seconds(alpha))
            name = f"{show_bytes(size)} a device" if number == 0 else ""
            series.append(
                Series(
                    name=name, points=points, joined=True, dots=number == 0, colour=colour, dashed=number > 0
                )
            )
    nodes = tuple(sorted({float(row.num_nodes) for row in rows}))
    return plot(
        series,
        x=Axis(title=f"nodes of {platform.devices_per_node} devices", log=True, ticks=nodes),
        y=Axis(
            title=f"best speed-up over flat on {platform.name}, simulated; dashed: other costs of a message",
            log=True,
        ),
    )
