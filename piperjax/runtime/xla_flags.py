"""This file is the compiler flags of each backend: which we add to XLA_FLAGS and why, beside what the user has set.

XLA reads XLA_FLAGS once, when JAX starts its devices, and ends the process over a flag that it does not know; flags
come and go with releases. So flags are first tried in a process of their own. What the user has set is never changed.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Backend = Literal["cpu", "cuda", "rocm"]

# Distributions that give JAX a backend, and the device file without which it has nothing to run on.
PLUGINS: Mapping[Backend, tuple[str, ...]] = {
    "rocm": ("jax-rocm7-plugin", "jax-rocm60-plugin"),
    "cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"),
}
DEVICE_FILES: Mapping[Backend, str] = {"rocm": "dev/kfd", "cuda": "dev/nvidiactl"}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One compiler flag.

    Attributes:
      name: with its xla_, without dashes.
      value: as XLA reads it.
      reason: why we set it, and where that was seen.
    """

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


_HIDING = "xla_gpu_enable_latency_hiding_scheduler"
_OVERLAP_LIMIT = "xla_gpu_experimental_parallel_collective_overlap_limit"

# "Schedules" are those of all-to-alls in steps beside expert products, as XLA compiled them for 32 absent devices.
FLAGS: Mapping[Backend, tuple[Flag, ...]] = {
    "cpu": (
        # None that changes a result. Simulated devices take turns on few cores, and the first to reach a collective
        # waits for the last; by default XLA ends the process after 40 seconds of it.
        Flag(
            name="xla_cpu_collective_call_warn_stuck_timeout_seconds",
            value="120",
            reason="simulated devices share cores: the first waits long for the last",
        ),
        Flag(
            name="xla_cpu_collective_call_terminate_timeout_seconds",
            value="600",
            reason="the default of 40 seconds ends slow runs of many simulated devices",
        ),
    ),
    "cuda": (
        Flag(
            name=_HIDING,
            value="true",
            reason="all-to-alls run beside products; on by default in jax 0.12 for H100, said here for other releases",
        ),
        Flag(
            name=_OVERLAP_LIMIT,
            value="4",
            reason="in chunks, schedules for H100 have 24 of 24 products beside exchanges between nodes, 22 with 1",
        ),
    ),
    "rocm": (
        Flag(
            name=_HIDING,
            value="true",
            reason="off by default in jax-rocm7-plugin 0.12.0: schedules for gfx90a equal those with it turned off",
        ),
        Flag(
            name=_OVERLAP_LIMIT,
            value="1",
            reason="schedules for gfx90a hide all-to-alls behind 4 of 4 expert products with 1, behind 2 with 4",
        ),
        Flag(
            name="xla_gpu_enable_command_buffer",
            value="",
            reason="no graphs of commands, as AMD's maxtext-slurm has it since they broke in jax 0.8.2",
        ),
    ),
}

# Those of a program whose tokens travel in chunks between processes, by platform; of no other, for what they cost.
BESIDE_EXCHANGES: Mapping[str, tuple[Flag, ...]] = {
    "cpu": (
        Flag(
            name="xla_multiheap_size_constraint_per_heap",
            value="1",
            reason="no buffer lies where another was: else products wait for messages whose memory they take. A layer "
            "in 4 chunks takes 3 times the memory and hides 60 to 75 % of its products instead of 10 to 50",
        ),
    ),
}

# In what XLA writes about these, a line for every buffer each time that it lays one out.
NOISE_BESIDE_EXCHANGES = "larger than the per-heap size limit"

# How much of a GPU JAX may take; by default it leaves a quarter to nobody. The rest is for the collective library, for
# workspaces of products, and for the runtime. The second name is the old one, and JAX takes only one of them.
MEMORY_FRACTION = 0.93
MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

# Flags that people still have in their scripts, that neither jaxlib 0.10 nor 0.12 knows.
GONE = frozenset(
    {
        "xla_gpu_enable_async_collectives",
        "xla_gpu_enable_async_all_to_all",
        "xla_gpu_enable_pipelined_collectives",
        "xla_gpu_lhs_enable_gpu_async_tracker",
        "xla_latency_hiding_scheduler_rerun",
        "xla_gpu_collectives_use_persistent_cliques",
    }
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What XLA said to a set of flags.

    Attributes:
      rejected: names that it does not know, or whose value it cannot read; empty if it took all of them.
      failure: why nothing is known, "" if something is.
    """

    rejected: frozenset[str] = frozenset()
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Settled:
    """The value of XLA_FLAGS to start with.

    Attributes:
      text: the user's flags as they wrote them, then ours.
      added: ours.
      lines: what was added, kept or left out, for the log.
    """

    text: str
    added: tuple[Flag, ...]
    lines: tuple[str, ...]


def detect_backend(
    environ: Mapping[str, str], installed: Mapping[str, str], root: Path = Path("/")
) -> Backend:
    """Tells which backend JAX will start, without starting it.

    Args:
      environ: environment variables; JAX_PLATFORMS decides if it is set.
      installed: versions by distribution.
      root: where device files are looked for.
    """
    asked = environ.get("JAX_PLATFORMS", "").split(",")[0].strip().lower()
    if asked in get_args(Backend):
        return asked
    for backend, plugins in PLUGINS.items():
        if any(name in installed for name in plugins) and (root / DEVICE_FILES[backend]).exists():
            return backend
    return "cpu"


def given_flags(text: str) -> str:
    """Returns the flags that a value of XLA_FLAGS stands for: itself, or what is in the file that it names.

    Raises:
      ValueError: if that file cannot be read.
    """
    text = text.strip()
    if not text or text.startswith("-"):
        return text
    try:
        return " ".join(Path(text).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(
            f"XLA_FLAGS names the file {text}, since it does not begin with --, but that cannot be read: {reason}; "
            "write flags as --name=value"
        ) from None


def parse_flags(text: str) -> dict[str, str]:
    """Returns values by name; the last of several wins, as it does for XLA. A flag without a value is "true".

    Raises:
      ValueError: if a quotation mark is not closed.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        raise ValueError(f"XLA_FLAGS has a quotation mark that is not closed: {text}; close it") from None
    pairs = (word.lstrip("-").partition("=") for word in words)
    return {name: value if equals else "true" for name, equals, value in pairs}


def settle(
    given: str, backend: Backend, attempt: Callable[[str], Trial], *, versions: str = "this XLA"
) -> Settled:
    """Puts our flags for a backend after the user's.

    A flag that the user has set is left to them. One of ours that XLA does not take is left out.

    Args:
      given: the user's XLA_FLAGS.
      backend: what JAX will run on.
      attempt: tries a value of XLA_FLAGS in another process.
      versions: whose flags they are, for messages.

    Raises:
      ValueError: if XLA would end the process over one of the user's flags.
    """
    given = given_flags(given)
    theirs = parse_flags(given)
    ours = [flag for flag in FLAGS[backend] if flag.name not in theirs]
    kept = [flag for flag in FLAGS[backend] if theirs.get(flag.name, flag.value) != flag.value]
    lines = [
        f"XLA_FLAGS has --{flag.name}={theirs[flag.name]}, which stays instead of {flag}" for flag in kept
    ]
    while ours or given:
        trial = attempt(_joined(given, ours))
        wrong = sorted(trial.rejected & theirs.keys())
        if wrong:
            raise ValueError(rejection(wrong[0], theirs[wrong[0]], versions))
        if trial.failure:
            lines.append(f"{'nothing added to' if ours else 'no trial of'} XLA_FLAGS: {trial.failure}")
            ours = []
            break
        dropped = [flag for flag in ours if flag.name in trial.rejected]
        if not dropped:
            break
        lines += [f"{flag} left out: {versions} does not take it" for flag in dropped]
        ours = [flag for flag in ours if flag not in dropped]
    if ours:
        lines.insert(0, f"{' '.join(map(str, ours))} added to XLA_FLAGS for {backend}")
    return Settled(text=_joined(given, ours), added=tuple(ours), lines=tuple(lines))


def options_beside_exchanges(platform: str, given: str, *, chunks: int, processes: int) -> dict[str, str]:
    """Returns compiler options of a program, by name: `BESIDE_EXCHANGES`, less what the user has set.

    Args:
      platform: what the program runs on, as JAX calls it.
      given: the user's XLA_FLAGS.
      chunks: in which the tokens of a layer travel.
      processes: among which they do. In one there is no wire to hide anything behind.
    """
    if chunks == 1 or processes == 1:
        return {}
    theirs = parse_flags(given_flags(given))
    return {flag.name: flag.value for flag in BESIDE_EXCHANGES.get(platform, ()) if flag.name not in theirs}


def rejection(name: str, value: str, versions: str) -> str:
    """Returns the sentence about a flag of the user over which XLA would end the process."""
    why = "was removed from XLA" if name in GONE else "is not known, or not with this value, to " + versions
    return f"XLA_FLAGS has --{name}={value}, which {why} and would end the process; take it out"


def trial_program(backend: Backend) -> list[str]:
    """Returns the arguments of Python that read XLA_FLAGS as JAX on this backend does, and then end."""
    # jaxlib reads them at once; a plugin has an XLA of its own, which reads them when it first compiles.
    program = "from jaxlib import _jax; _jax.CompileOptions()"
    if backend != "cpu":
        program += "; import jax; jax.jit(lambda x: x + 1)(0.0).block_until_ready()"
    return ["-c", program]


def read_trial(*, returncode: int | None, stderr: str) -> Trial:
    """Returns what a process that ran `trial_program` tells of the flags.

    Args:
      returncode: None if it had to be stopped.
      stderr: what it printed.
    """
    rejected = set()
    for line in re.findall(r"Unknown flags? in XLA_FLAGS: (.*)", stderr):
        rejected |= {word.lstrip("-").partition("=")[0] for word in line.split()}
    rejected |= set(re.findall(r"Couldn't interpret value .* for flag (\w+)\.", stderr))
    if rejected:
        return Trial(rejected=frozenset(rejected))
    if returncode is None:
        return Trial(failure="the process that tried the flags did not end in time")
    if returncode < 0 or "parse_flags_from_env" in stderr:
        reason = (stderr.strip() or f"signal {-returncode}").splitlines()[0]
        return Trial(failure=f"the process that tried the flags failed ({reason})")
    # Python's own errors, such as a device that cannot be opened, come after the flags were read.
    return Trial()


def _joined(given: str, ours: Sequence[Flag]) -> str:
    return " ".join([given, *map(str, ours)]).strip()
