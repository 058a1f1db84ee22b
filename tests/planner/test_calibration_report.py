"""Reports of a calibration: a sentence and a line for each law, and a picture with every sample."""

from xml.etree import ElementTree

from meshes.device import Device
from meshes.platform import Link, Platform
from piperjax.planner.calibration import ExchangeSample, Measurements, ProductSample, calibrate
from piperjax.planner.calibration_report import charts, quality_notes, table
from piperjax.planner.network import Group

LINK = Link(name="wire", devices=4, bytes_per_second=1e9, latency_seconds=1e-5)
PLATFORM = Platform(name="a", description="b", device=Device(), devices_per_node=4, links=(LINK,))
MEASUREMENTS = Measurements(
    num_local=4,
    products=tuple(ProductSample(m, 64, 64, 0, "float32", "forward", m * 1e-6) for m in (8, 64, 512)),
    exchanges=tuple(
        ExchangeSample(name, (Group(4, 1, 4),), size, 1e-5 + size / 1e9)
        for name in ("permute", "all_to_all")
        for size in (1e3, 1e5, 1e7)
    ),
)
CALIBRATION = calibrate(PLATFORM, MEASUREMENTS, shares_cores=True)


def test_every_law_has_a_line_and_a_note():
    text = table(CALIBRATION)
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["device.matmul", "wire", "wire", "wire"]
    notes = quality_notes(CALIBRATION)
    assert notes["device.matmul"].startswith("3 samples, r^2 ")
    assert "half of them within" in notes["wire permute"]


def test_the_picture_shows_every_sample():
    picture = ElementTree.fromstring(charts(CALIBRATION, MEASUREMENTS))
    assert len([child for child in picture if child.tag.endswith("svg")]) == 3
    text = ElementTree.tostring(picture, encoding="unicode")
    for words in ("float32 dense", "bytes of permute", "bytes of all-to-all", "4 devices 1 apart"):
        assert words in text


def test_nothing_to_show():
    empty = Measurements(num_local=1)
    assert charts(calibrate(PLATFORM, empty, shares_cores=True), empty).startswith("<svg")
