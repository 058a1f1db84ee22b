"""This file is the checks of XLA_FLAGS: flags that XLA would abort over, and flags that work against ours."""

import sys

from piperjax.doctor.environment import Environment
from piperjax.doctor.finding import Finding, error, note, ok, warning
from piperjax.runtime.xla_flags import Trial, given_flags, parse_flags, read_trial, settle, trial_program

TRIAL_SECONDS = 20


def known_flags(env: Environment) -> list[Finding]:
    """The user's flags and ours, tried on jaxlib; a plugin's own XLA is tried when devices are."""

    def attempt(text: str) -> Trial:
        ended = env.run(
            [sys.executable, *trial_program("cpu")], {**env.environ, "XLA_FLAGS": text}, TRIAL_SECONDS
        )
        return read_trial(returncode=ended.returncode, stderr=ended.stderr)

    versions = f"jaxlib {env.versions.get('jaxlib', '')}".strip()
    try:
        settled = settle(env.environ.get("XLA_FLAGS", ""), env.backend, attempt, versions=versions)
    except ValueError as problem:
        found, _, advice = str(problem).rpartition("; ")
        return [error("XLA_FLAGS", found, advice)]
    return [
        ok("XLA_FLAGS", line) if line.startswith("--") else note("XLA_FLAGS", line) for line in settled.lines
    ]


# Flag, backends where it matters, a value that does no harm (None: every value does), what it does, what to do.
HARMFUL = (
    (
        "xla_gpu_enable_latency_hiding_scheduler",
        ("cuda", "rocm"),
        ("true", "1"),
        "keeps all-to-alls and products apart",
        "take it out: overlap of dispatch and computation needs the scheduler",
    ),
    (
        # AMD-AGI/maxtext-slurm, skills/deterministic-training: 264.5 s a step instead of 1.74 on MI355X.
        "xla_gpu_deterministic_ops",
        ("cuda", "rocm"),
        ("false", "0"),
        "turns every scatter into a loop, which made steps of a MoE 150 times longer on MI355X",
        "take it out: dispatch here has no scatter, and runs repeat without it",
    ),
    (
        "xla_gpu_disable_async_collectives",
        ("cuda", "rocm"),
        ("",),
        "makes collectives wait for themselves",
        "take it out: nothing overlaps with them then",
    ),
    (
        "xla_gpu_enable_command_buffer",
        ("rocm",),
        ("",),
        "builds graphs of commands, which broke on ROCm in jax 0.8.2",
        "set it to nothing: --xla_gpu_enable_command_buffer=",
    ),
)


def harmful_flags(env: Environment) -> list[Finding]:
    """Flags of the user that XLA takes, and that cost us what we planned for."""
    try:
        given = parse_flags(given_flags(env.environ.get("XLA_FLAGS", "")))
    except ValueError:
        return []  # known_flags tells it.
    findings = [
        warning("XLA_FLAGS", f"--{name}={given[name]} {effect}", advice)
        for name, backends, harmless, effect, advice in HARMFUL
        if env.backend in backends and given.get(name, harmless[0]).lower() not in harmless
    ]
    devices = given.get("xla_force_host_platform_device_count")
    if devices:
        found = (
            f"--xla_force_host_platform_device_count={devices} simulates {devices} devices on the processor"
        )
        findings.append(note("XLA_FLAGS", found, "train.py --devices N overrules it"))
    return findings


CHECKS = (known_flags, harmful_flags)
