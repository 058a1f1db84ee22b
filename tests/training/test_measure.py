"""`python -m piperjax measure`: a file that reads back, alone and across processes, and one sentence per mistake."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meshes.platform import load_platform
from piperjax.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
# The command, with the fewest shapes that every table needs.
SMALLEST = """
import sys
from piperjax.__main__ import main
from piperjax.runtime import exchange_benchmarks, microbenchmarks as m

shapes = m.Shapes(
    layers=(m.Layer(32, 64, 64), m.Layer(128, 64, 128), m.Layer(16, 32, 64, groups=2)),
    heads=(m.Heads(1, 32, 4, 16), m.Heads(1, 64, 4, 16)),
    stream_bytes=(2**12, 2**18),
    copy_bytes=(2**16,),
    working_bytes=2**12,
    dtypes=("float32",),
)
m.shapes_for = lambda backend, *, quick: shapes
exchange_benchmarks.exchange_sizes = lambda *, quick, backend: (2**10, 2**18)
sys.exit(main(sys.argv[1:]))
"""


def start(arguments, directory):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-c", SMALLEST, "measure", "--quick", *arguments],
        cwd=directory,
        env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_simulated_devices(tmp_path):
    process = start(["--devices", "2", "--out", "mine.toml"], tmp_path)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "wrote mine.toml and mine.svg" in out
    assert "device.matmul" in out and "memory all_to_all" in out
    assert "100%" in errors  # the bar
    assert (tmp_path / "mine.svg").read_text().startswith("<svg")
    text = (tmp_path / "mine.toml").read_text()
    assert text.startswith("# Measured on ") and "by `python -m piperjax measure --quick`" in text
    assert "r^2" in text
    platform = load_platform(str(tmp_path / "mine.toml"))
    assert (platform.name, platform.devices_per_node) == ("mine", 2)
    assert platform.rated("float32")
    device, (link,) = platform.device, platform.links
    assert {
        table.provenance for table in (device, device.matmul, device.grouped_matmul, device.attention, link)
    } == {"measured"}
    assert 1 <= device.concurrent_devices <= 2
    assert (link.devices, link.medium) == (2, "memory")
    assert device.matmul.covers(2.0 * 128 * 64 * 128) and not device.matmul.covers(1e15)
    assert link.covers(2.0**16) and not link.covers(1e12)
    assert 1e8 < device.peak_flop_per_second["float32"] < 1e14


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    flags = ["--devices", "2", "--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
    processes = [start([*flags, "--process-id", str(process)], tmp_path) for process in range(2)]
    try:
        ended = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ended
    assert "wrote measured.toml" in ended[0][0] and "wrote" not in ended[1][0]
    platform = load_platform(str(tmp_path / "measured.toml"))
    assert [(link.name, link.devices, link.medium) for link in platform.links] == [
        ("memory", 2, "memory"),
        ("network", 4, "wire"),
    ]
    assert {link.provenance for link in platform.links} == {"measured"}
    assert platform.links[1].latency_seconds > platform.links[0].latency_seconds


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "mine.yaml"], "the file to write must end in .toml, got mine.yaml"),
        (
            ["--out", "nowhere/mine.toml"],
            "cannot write nowhere/mine.toml: there is no folder nowhere; make it first",
        ),
        (["--plot", "mine.png"], "the file to write must end in .svg, got mine.png"),
        (["--platform", "fronteir"], "no platform named 'fronteir', did you mean 'frontier'?"),
        (["--devices", "0"], "the number of simulated devices must be at least 1, got 0"),
        (["--processes", "2"], "--coordinator, --processes and --process-id go together"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["measure", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
