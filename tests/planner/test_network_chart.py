"""The picture of `python -m piperjax simulate`: a line for every size and cost of a message."""

from xml.etree import ElementTree

from meshes.platform import load_platform
from piperjax.planner.network_chart import speedup_chart
from piperjax.planner.network_table import Row

FRONTIER = load_platform("frontier")


def test_every_size_and_cost_of_a_message_has_its_line():
    rows = [
        Row(size, nodes, {"flat": 1.0}, (), (1.5 * nodes, 1.25 * nodes))
        for size in (1e6, 8e6)
        for nodes in (2, 16, 4)
    ]
    root = ElementTree.fromstring(speedup_chart(FRONTIER, rows, (5e-6, 20e-6)))
    paths = [element for element in root.iter() if element.tag.endswith("path")]
    lines = [path for path in paths if path.get("stroke-width") == "2"]
    assert [bool(line.get("stroke-dasharray")) for line in lines] == [False, True, False, True]
    for line in lines:
        places = [float(place.split(" ")[0]) for place in line.get("d")[1:].split("L")]
        assert places == sorted(places) and len(set(places)) == 3
    text = " ".join(root.itertext())
    assert "1 MB a device, 5 us a message, 16 nodes: 24.00x" in text
    assert "8 MB a device" in text and "20 us" in text and "simulated" in text
