"""Platform files as text: what is written reads back, and reads well."""

from dataclasses import replace

import pytest

from meshes.platform import known_platforms, load_platform
from meshes.writing import platform_toml


@pytest.mark.parametrize("name", known_platforms())
def test_every_machine_reads_back_as_it_was(name, tmp_path):
    path = tmp_path / f"{name}.toml"
    path.write_text(platform_toml(load_platform(name), header=["one", "", "three"]))
    assert load_platform(str(path)) == load_platform(name)


def test_numbers_notes_and_texts(tmp_path):
    frontier = load_platform("frontier")
    by_size = {"norm": 3e10, "layout": ((1e6, 2e10), (1e7, 1.5e9))}
    device = replace(frontier.device, elementwise_bytes_per_second=by_size)
    odd = replace(frontier, description='a "quoted" back\\slash', device=device)
    text = platform_toml(
        odd, header=["By hand."], notes={"device.matmul": "9 samples", "switch": "3 samples"}
    )
    lines = text.splitlines()
    assert lines[0] == "# By hand."
    assert "memory_bytes = 68_719_476_736" in lines
    assert "bytes_per_second = 1.25e10" in lines
    assert "latency_seconds = 2e-5" in lines
    assert "elementwise_bytes_per_second = { norm = 3e10, layout = [[1e6, 2e10], [1e7, 1.5e9]] }" in lines
    assert "efficiency = 0.75" in lines
    assert any(line.startswith("[device.matmul]") and line.endswith("# 9 samples") for line in lines)
    assert lines[lines.index('name = "switch"') - 1] == "# 3 samples"
    path = tmp_path / "frontier.toml"
    path.write_text(text)
    assert load_platform(str(path)) == odd
