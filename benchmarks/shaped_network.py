"""Nodes as network namespaces of one Linux machine, on links whose rate is set, with real sockets between them.

Every node has one end of a pair of virtual interfaces; the other ends are ports of a bridge. Both ends are shaped by a
token bucket, so that a node sends and receives at the set rate and no faster. What does not fit at once waits, as the
fabrics that this stands for lose nothing. Needs root and Debian's iproute2; what is made is removed whatever happens,
and what a killed run left behind is removed by the next.

Instead, one token bucket may be a medium that all frames share, whichever way they go. Gloo sends a message between two
processes in both directions at once or one after the other, as they happen to meet: what one has to say about what it
can receive waits behind what it already sends on the same connection. On links that makes a factor of one to two, by
chance; on a medium it makes none.

Rates are set, not the seconds of a message: these are the CPU seconds of the kernel and of gloo on the cores that all
nodes share.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PREFIX = "pj"
PORT = 29_500
HOSTS = Path("/etc/netns")
ROOT = Path(__file__).resolve().parent.parent
BURST_BYTES = 65_536
# What one socket may leave waiting at its interface; all that it has would wait there in front of others.
SOCKET_BYTES = 16_384
# Congestion control of the host may pace or probe, and after a pause a flow would grow its window anew in steps of a
# round trip through full queues. Fabrics do neither: Reno's window stays as large as it once was.
_TCP = (
    "cd /proc/sys/net/ipv4; echo reno > tcp_congestion_control; echo 0 > tcp_slow_start_after_idle; "
    f"echo {SOCKET_BYTES} > tcp_limit_output_bytes"
)
# A program's buffers are new memory in every call, which Linux hands out page by page when it is first written; drivers
# of accelerators keep what they have. In pages of 2 MiB instead of 4 KiB that costs a fifth of the seconds.
LARGE_PAGES = "glibc.malloc.hugetlb=1"

Run = Callable[[Sequence[str]], subprocess.CompletedProcess]


class NetworkError(RuntimeError):
    """What could not be done, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class ShapedNetwork:
    """A network of nodes with one link each.

    Attributes:
      num_nodes: nodes.
      bytes_per_second: of the link of a node, per direction, headers included.
      queue_seconds: what may wait at either end of a link, in seconds of its rate. Shallow queues drop what arrives
        from several nodes at once, and TCP then waits for time-outs.
      shaped: the "links" of nodes, or the "medium" between them, which then has that rate for all and both directions.
      owner: number of the process that makes it; part of all names.
    """

    num_nodes: int
    bytes_per_second: float
    queue_seconds: float = 1.0
    shaped: Literal["links", "medium"] = "links"
    owner: int = 0

    def __post_init__(self):
        if not 2 <= self.num_nodes <= 200:
            raise ValueError(f"a shaped network needs 2 to 200 nodes, got {self.num_nodes}")
        if self.bytes_per_second < 1e5:
            raise ValueError(
                f"a link needs at least 1e5 bytes per second to carry frames, got {self.bytes_per_second:g}"
            )
        if self.queue_seconds < 0.2:
            raise ValueError(
                f"queues must hold at least 0.2 s, or TCP collapses when all nodes send to one, "
                f"got {self.queue_seconds:g}"
            )

    @property
    def bridge(self) -> str:
        """Name of the bridge."""
        return f"{PREFIX}{self.owner}b"

    @property
    def nodes(self) -> list[str]:
        """Names of the namespaces."""
        return [f"{PREFIX}{self.owner}n{node}" for node in range(self.num_nodes)]

    @property
    def ports(self) -> list[str]:
        """Names of the ends of links outside of the namespaces."""
        return [f"{PREFIX}{self.owner}v{node}" for node in range(self.num_nodes)]

    @property
    def medium(self) -> str:
        """Name of the interface through which all frames go, if that is what is shaped."""
        return f"{PREFIX}{self.owner}v{self.num_nodes}"

    def address(self, node: int) -> str:
        """IPv4 address of a node."""
        return f"10.77.0.{node + 1}"

    def commands(self) -> list[list[str]]:
        """What makes the network."""
        made = [f"ip link add {self.bridge} type bridge", f"ip link set {self.bridge} up"]
        shape = (
            f"root tbf rate {round(self.bytes_per_second * 8)}bit burst {BURST_BYTES} "
            f"latency {round(self.queue_seconds * 1e3)}ms"
        )
        for number, (node, port) in enumerate(zip(self.nodes, self.ports, strict=True)):
            made += [
                f"ip netns add {node}",
                f"ip link add {port} type veth peer name eth0 netns {node}",
                f"ip link set {port} master {self.bridge} up",
                f"ip -n {node} addr add {self.address(number)}/24 dev eth0",
                f"ip -n {node} link set eth0 up",
                f"ip -n {node} link set lo up",
                f"tc -n {node} qdisc add dev eth0 {shape}",
            ]
            if self.shaped == "links":
                made.append(f"tc qdisc add dev {port} {shape}")
        if self.shaped == "medium":
            made += self._medium_commands(shape)
        made += [f"ip -n {node} link set eth0 gso_max_size {SOCKET_BYTES}" for node in self.nodes]
        return [command.split() for command in made] + [
            ["ip", "netns", "exec", node, "sh", "-c", _TCP] for node in self.nodes
        ]

    def _medium_commands(self, shape: str) -> list[str]:
        """What comes from a node does not enter the bridge by its port, but by way of the medium."""
        end = f"{PREFIX}{self.owner}v{self.num_nodes + 1}"
        made = [
            f"ip link add {self.medium} type veth peer name {end}",
            f"ip link set {end} master {self.bridge} up",
            # All addresses come from here, and none is here: without knowing where, a bridge sends to all others.
            f"ip link set {end} type bridge_slave learning off",
            f"ip link set {self.medium} gso_max_size {SOCKET_BYTES} up",
            f"tc qdisc add dev {self.medium} {shape}",
        ]
        redirect = f"protocol all u32 match u32 0 0 action mirred egress redirect dev {self.medium}"
        for port in self.ports:
            made += [f"tc qdisc add dev {port} ingress", f"tc filter add dev {port} parent ffff: {redirect}"]
        return made


def reason_to_skip(
    *, euid: Callable[[], int] = os.geteuid, which: Callable = shutil.which, run: Run | None = None
) -> str | None:
    """Why this machine cannot have a shaped network, in one line; None if it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if euid() != 0:
        return "network namespaces need root; run it as root"
    missing = [name for name in ("ip", "tc", "timeout") if which(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}; install iproute2 and coreutils"
    probe = f"{PREFIX}{os.getpid()}n"
    run = run or _run
    for command in (f"ip netns add {probe}", f"ip netns exec {probe} true"):
        done = run(command.split())
        if done.returncode:
            run(f"ip netns del {probe}".split())
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            return f"'{command}' is refused here: {lines[0]}"
    run(f"ip netns del {probe}".split())
    return None


@contextlib.contextmanager
def up(network: ShapedNetwork, *, run: Run | None = None, hosts: Path = HOSTS) -> Iterator[ShapedNetwork]:
    """Makes the network, and removes it with all that runs on it, also after an error, ctrl-C or SIGTERM."""
    run = run or _run
    with _terminated_is_interrupted():
        remove_stale(run=run, hosts=hosts)
        try:
            for command in network.commands():
                done = run(command)
                if done.returncode:
                    raise NetworkError(
                        f"'{' '.join(command)}' failed: {done.stderr.strip() or 'no reason given'}"
                    )
            for number, node in enumerate(network.nodes):
                # JAX takes the address of its host's name for gloo; `ip netns exec` puts this in place of /etc/hosts.
                (hosts / node).mkdir(parents=True)
                (hosts / node / "hosts").write_text(
                    f"127.0.0.1 localhost\n{network.address(number)} {socket.gethostname()}\n"
                )
            yield network
        finally:
            with _uninterrupted():
                remove(network.owner, run=run, hosts=hosts)


def remove(owner: int, *, run: Run | None = None, hosts: Path = HOSTS) -> None:
    """Ends what runs in the namespaces of an owner, and removes them, their links and their files of hosts."""
    run = run or _run
    made = _existing(run, hosts).get(owner, [])
    for name in (name for kind, name in made if kind == "n"):
        for pid in run(["ip", "netns", "pids", name]).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    # Links first: those of a namespace outlive its name for a moment.
    for command, kinds in (("ip link del", "vb"), ("ip netns del", "n")):
        for name in (name for kind, name in made if kind in kinds):
            run([*command.split(), name])
    for directory in hosts.glob(f"{PREFIX}{owner}n*"):
        shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        hosts.rmdir()  # If nobody else has anything there.


def remove_stale(*, run: Run | None = None, hosts: Path = HOSTS) -> None:
    """Removes what runs left behind that were killed: networks whose owner is no more."""
    run = run or _run
    for owner in _existing(run, hosts):
        if not _is_alive(owner):
            remove(owner, run=run, hosts=hosts)


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    # The state follows the name, which is in brackets. A killed process may stay as a zombie.
    return stat.rpartition(")")[2].split()[0] != "Z"


def _existing(run: Run, hosts: Path) -> dict[int, list[tuple[str, str]]]:
    """(kind, name) of every namespace n, port v and bridge b there is, by owner."""
    listed = [line.split()[0] for line in run(["ip", "netns", "list"]).stdout.splitlines() if line.strip()]
    listed += re.findall(r"^\d+: ([^:@]+)[@:]", run(["ip", "-o", "link", "show"]).stdout, re.MULTILINE)
    listed += [path.name for path in hosts.glob(f"{PREFIX}*") if path.name not in listed]
    made: dict[int, list[tuple[str, str]]] = {}
    for name in listed:
        if found := re.fullmatch(rf"{PREFIX}(\d+)([nvb])\d*", name):
            made.setdefault(int(found[1]), []).append((found[2], name))
    return made


def dropped_frames(network: ShapedNetwork, *, run: Run | None = None) -> int:
    """Frames that found a full queue since the network was made."""
    run = run or _run
    shaped = network.ports if network.shaped == "links" else [network.medium]
    ports = [["tc", "-s", "qdisc", "show", "dev", name] for name in shaped]
    inner = [["tc", "-n", node, "-s", "qdisc", "show", "dev", "eth0"] for node in network.nodes]
    return sum(int(n) for command in ports + inner for n in re.findall(r"dropped (\d+)", run(command).stdout))


def run_on_nodes(
    network: ShapedNetwork, module: str, arguments: Sequence[str], *, limit_seconds: float
) -> list[str]:
    """Runs `python -m module` on every node of a network that is up, and returns what each printed.

    Each gets `--coordinator HOST:PORT --processes N --process-id N` in front of the arguments. When one fails the
    others are ended, and nothing lives longer than the limit: what waits in a collective heeds no other signal.

    Raises:
      NetworkError: if one fails or the limit is reached; the sentence ends with the last line that it wrote.
    """
    meeting = ["--coordinator", f"{network.address(0)}:{PORT}", "--processes", str(network.num_nodes)]
    environment = {"GLIBC_TUNABLES": LARGE_PAGES} | os.environ | {"JAX_PLATFORMS": "cpu"}
    with contextlib.ExitStack() as stack:
        printed, errors = (
            [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in network.nodes] for _ in range(2)
        )
        processes = []
        for number, node in enumerate(network.nodes):
            command = ["timeout", "-s", "KILL", f"{limit_seconds:g}", "ip", "netns", "exec", node]
            command += [sys.executable, "-m", module, *meeting, "--process-id", str(number), *arguments]
            process = subprocess.Popen(
                command, env=environment, stdout=printed[number], stderr=errors[number],
                stdin=subprocess.DEVNULL, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
            stack.callback(_end, process)
            processes.append(process)
        failed = _wait(processes)
        if failed is not None:
            code = processes[failed].returncode
            what = (
                f"did not end within {limit_seconds:g} s"
                if code in (137, -9)
                else f"failed with exit code {code}"
            )
            raise NetworkError(f"'{module}' on node {failed} {what}: {_last_line(errors[failed])}")
        return [_text(file) for file in printed]


def _wait(processes: Sequence[subprocess.Popen]) -> int | None:
    """Waits for all to end, or for the first that fails, whose number is returned."""
    while True:
        codes = [process.poll() for process in processes]
        for number, code in enumerate(codes):
            if code:
                return number
        if None not in codes:
            return None
        time.sleep(0.05)


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text(file) -> str:
    file.seek(0)
    return file.read()


def _last_line(file) -> str:
    return next((line for line in reversed(_text(file).splitlines()) if line.strip()), "it wrote nothing")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Inside, SIGTERM ends the program as an exception does, so that everything is removed."""

    def stop(number, _frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Inside, neither ctrl-C nor SIGTERM interrupts."""
    before = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
