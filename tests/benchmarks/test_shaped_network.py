"""Shaped networks: what is run to make and remove them, and when they are refused. No root needed: nothing is made."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import shaped_network
from benchmarks.shaped_network import (
    NetworkError,
    ShapedNetwork,
    dropped_frames,
    reason_to_skip,
    remove_stale,
    up,
)

GONE = 4_194_304_0  # Larger than any process number.


class Machine:
    """Takes commands as `subprocess.run` does, and keeps what names they make and remove."""

    def __init__(self, refuse=()):
        self.refuse, self.done, self.namespaces, self.links = refuse, [], [], ["lo"]

    def __call__(self, command):
        text = " ".join(command)
        self.done.append(text)
        missing = text.startswith("ip netns del") and text.split()[3] not in self.namespaces
        if missing or any(word in text for word in self.refuse):
            return subprocess.CompletedProcess(command, 1, "", "Operation not permitted\nmore\n")
        words, output = text.split(), ""
        if text == "ip netns list":
            output = "".join(f"{name} (id: 3)\n" for name in self.namespaces)
        elif text == "ip -o link show":
            output = "".join(f"{n}: {name}@if2: <UP> mtu 1500\n" for n, name in enumerate(self.links, 1))
        elif text.startswith("tc") and "-s qdisc" in text:
            output = "qdisc tbf 8001: root\n Sent 290 bytes 3 pkt (dropped 2, overlimits 0 requeues 0)\n"
        elif text.startswith("ip netns add"):
            self.namespaces.append(words[3])
        elif text.startswith("ip netns del"):
            self.namespaces.remove(words[3])
        elif text.startswith("ip link add"):
            self.links.append(words[3])
        elif text.startswith("ip link del"):
            self.links.remove(words[3])
        return subprocess.CompletedProcess(command, 0, output, "")

    @property
    def clean(self):
        return not self.namespaces and self.links == ["lo"]


def test_two_nodes_drawn_out():
    network = ShapedNetwork(num_nodes=2, bytes_per_second=25e6, queue_seconds=0.4, owner=7)
    shape = "root tbf rate 200000000bit burst 65536 latency 400ms"
    commands = [" ".join(command) for command in network.commands()]
    assert commands[:10] == [
        "ip link add pj7b type bridge",
        "ip link set pj7b up",
        "ip netns add pj7n0",
        "ip link add pj7v0 type veth peer name eth0 netns pj7n0",
        "ip link set pj7v0 master pj7b up",
        "ip -n pj7n0 addr add 10.77.0.1/24 dev eth0",
        "ip -n pj7n0 link set eth0 up",
        "ip -n pj7n0 link set lo up",
        f"tc -n pj7n0 qdisc add dev eth0 {shape}",
        f"tc qdisc add dev pj7v0 {shape}",
    ]
    commands = [" ".join(command) for command in replace(network, shaped="medium").commands()]
    redirect = "protocol all u32 match u32 0 0 action mirred egress redirect dev pj7v2"
    assert [command for command in commands if "pj7v2" in command or "pj7v3" in command] == [
        "ip link add pj7v2 type veth peer name pj7v3",
        "ip link set pj7v3 master pj7b up",
        "ip link set pj7v3 type bridge_slave learning off",
        "ip link set pj7v2 gso_max_size 16384 up",
        f"tc qdisc add dev pj7v2 {shape}",
        f"tc filter add dev pj7v0 parent ffff: {redirect}",
        f"tc filter add dev pj7v1 parent ffff: {redirect}",
    ]
    assert max(len(name) for name in (network.bridge, "pj4194304v15")) <= 15  # What Linux allows.


def test_what_is_made_is_removed(tmp_path):
    machine, hosts = Machine(), tmp_path / "netns"
    with up(ShapedNetwork(num_nodes=3, bytes_per_second=1e7, owner=7), run=machine, hosts=hosts) as network:
        assert machine.namespaces == ["pj7n0", "pj7n1", "pj7n2"]
        assert machine.links == ["lo", "pj7b", "pj7v0", "pj7v1", "pj7v2"]
        lines = (hosts / "pj7n2" / "hosts").read_text().splitlines()
        assert lines[1].startswith("10.77.0.3 ")
        assert dropped_frames(network, run=machine) == 12
    assert machine.clean and not hosts.exists()


@pytest.mark.parametrize("refuse", ["netns add pj7n1", "veth", "tc qdisc", "tc -n pj7n2", "reno"])
def test_what_was_made_before_a_failure_is_removed(refuse, tmp_path):
    machine, hosts = Machine((refuse,)), tmp_path / "netns"
    (hosts / "other").mkdir(parents=True)
    network = ShapedNetwork(num_nodes=3, bytes_per_second=1e7, owner=7)
    said = pytest.raises(NetworkError, match=r"^'(ip|tc) .*' failed: Operation not permitted")
    with said, up(network, run=machine, hosts=hosts):
        pytest.fail("the network is not there")
    assert machine.clean and [path.name for path in hosts.iterdir()] == ["other"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_removes_everything(stop, tmp_path):
    machine, before = Machine(), signal.getsignal(signal.SIGTERM)
    expected = KeyboardInterrupt if stop is signal.SIGINT else SystemExit
    network = ShapedNetwork(num_nodes=2, bytes_per_second=1e7, owner=7)
    # Where a shell started the tests in the background, SIGINT is ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(expected), up(network, run=machine, hosts=tmp_path):
        os.kill(os.getpid(), stop)
    signal.signal(signal.SIGINT, inherited)
    assert machine.clean and signal.getsignal(signal.SIGTERM) is before


def test_only_what_dead_processes_left_is_stale(tmp_path):
    machine, alive = Machine(), os.getppid()
    process = subprocess.Popen(["true"])
    zombie = process.pid
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    machine.namespaces = [f"pj{GONE}n0", f"pj{zombie}n0", f"pj{alive}n0", "mine", "pjx"]
    machine.links += [f"pj{GONE}b", f"pj{GONE}v0", f"pj{alive}b", "pjxb"]
    (tmp_path / f"pj{GONE}n0").mkdir()
    remove_stale(run=machine, hosts=tmp_path)
    assert machine.namespaces == [f"pj{alive}n0", "mine", "pjx"]
    assert machine.links == ["lo", f"pj{alive}b", "pjxb"]
    process.wait()


def test_an_owner_removes_nothing_of_another_whose_number_begins_alike(tmp_path):
    machine = Machine()
    machine.namespaces, machine.links = ["pj7n0", "pj71n0"], ["lo", "pj7b", "pj71b", "pj7v1", "pj71v1"]
    shaped_network.remove(7, run=machine, hosts=tmp_path)
    assert machine.namespaces == ["pj71n0"] and machine.links == ["lo", "pj71b", "pj71v1"]


def test_a_machine_that_allows_it():
    machine = Machine()
    assert reason_to_skip(euid=lambda: 0, which=lambda name: name, run=machine) is None
    assert machine.clean


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(euid=lambda: 1000), "need root"),
        (dict(which=lambda name: name if name != "tc" else None), "needs tc; install iproute2"),
        (dict(run=Machine(("netns add",))), "'ip netns add .*' is refused here: Operation not permitted$"),
        (
            dict(run=Machine(("netns exec",))),
            "'ip netns exec .* true' is refused here: Operation not permitted$",
        ),
    ],
)
def test_a_machine_that_does_not_says_why_in_one_line(arguments, words):
    usual = dict(euid=lambda: 0, which=lambda name: name, run=Machine())
    reason = reason_to_skip(**usual | arguments)
    assert __import__("re").search(words, reason) and "\n" not in reason
    if "run" in arguments:
        assert arguments["run"].clean


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(num_nodes=1), "2 to 200 nodes, got 1"),
        (dict(bytes_per_second=100), "at least 1e5 bytes per second"),
        (dict(queue_seconds=0.01), "queues must hold at least 0.2 s, or TCP collapses"),
    ],
)
def test_networks_that_make_no_sense(fields, words):
    with pytest.raises(ValueError, match=words):
        ShapedNetwork(**dict(num_nodes=2, bytes_per_second=1e7) | fields)


@pytest.fixture
def without_namespaces(monkeypatch):
    """Processes of two nodes, started as they are without namespaces."""
    start = subprocess.Popen

    def popen(command, **options):
        assert command[:3] == ["timeout", "-s", "KILL"] and command[4:7] == ["ip", "netns", "exec"]
        return start(command[:4] + command[8:], **options)

    monkeypatch.setattr(shaped_network.subprocess, "Popen", popen)
    return ShapedNetwork(num_nodes=2, bytes_per_second=1e7, owner=7)


def program(tmp_path, monkeypatch, text):
    (tmp_path / "program.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "program"


def test_every_node_runs_the_program_and_knows_its_number(without_namespaces, tmp_path, monkeypatch):
    module = program(tmp_path, monkeypatch, "import sys; print(sys.argv[1:])")
    printed = shaped_network.run_on_nodes(without_namespaces, module, ["--far"], limit_seconds=20)
    meeting = ["--coordinator", "10.77.0.1:29500", "--processes", "2", "--process-id"]
    assert printed == [f"{[*meeting, '0', '--far']}\n", f"{[*meeting, '1', '--far']}\n"]


def test_when_one_fails_the_others_are_ended(without_namespaces, tmp_path, monkeypatch):
    text = "import sys, time\nif '1' in sys.argv: sys.exit('no such device')\nopen(sys.argv[-1], 'w'); time.sleep(60)"
    module = program(tmp_path, monkeypatch, text)
    with pytest.raises(NetworkError, match="^'program' on node 1 failed with exit code 1: no such device$"):
        shaped_network.run_on_nodes(without_namespaces, module, [str(tmp_path / "out")], limit_seconds=20)
    out, patience = str(tmp_path / "out"), time.monotonic() + 10
    # On a busy machine a process that was ended is there for some time yet.
    while any(out in command_line(process) for process in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < patience
        time.sleep(0.1)


def command_line(process):
    try:
        return (process / "cmdline").read_text()
    except OSError:  # It has just ended.
        return ""


def test_nothing_outlives_the_limit(without_namespaces, tmp_path, monkeypatch):
    text = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    module = program(tmp_path, monkeypatch, text)
    with pytest.raises(NetworkError, match="did not end within 0.5 s: it wrote nothing"):
        shaped_network.run_on_nodes(without_namespaces, module, [], limit_seconds=0.5)


def test_this_is_linux_or_a_reason():
    assert sys.platform.startswith("linux") or "Linux" in reason_to_skip()
