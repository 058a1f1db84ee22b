"""This file is what is settled before JAX starts its devices: compiler flags, and how many devices a CPU simulates."""

import hashlib
import json
import os
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import jax

from meshes.mesh import simulate_devices
from piperjax.runtime.bounded_process import run_bounded
from piperjax.runtime.xla_flags import (
    MEMORY_FRACTION,
    MEMORY_VARIABLES,
    PLUGINS,
    Backend,
    Trial,
    detect_backend,
    options_beside_exchanges,
    read_trial,
    settle,
    trial_program,
)

# Starting all of a node's GPUs is slow on a busy file system; a jaxlib alone reads its flags in a tenth of a second.
TRIAL_SECONDS = 120


def prepare(num_devices: int | None = None) -> tuple[str, ...]:
    """Settles what JAX reads when it starts its devices; must run before it does.

    Adds our compiler flags to XLA_FLAGS (`xla_flags.FLAGS`), lets JAX take nearly all memory of a GPU unless the user
    has said how much, and lets a CPU appear as `num_devices` devices. If JAX has started already, all stays as it is:
    nothing would read it.

    Args:
      num_devices: devices of this process that a CPU simulates; None leaves them.

    Returns:
      Lines about what was set, for the log.

    Raises:
      ValueError: if XLA would end the process over the user's XLA_FLAGS, or has started with fewer devices.
    """
    lines = () if has_started() else _set_flags(num_devices)
    if num_devices is not None:
        simulate_devices(num_devices)
    return lines


def has_started() -> bool:
    """Whether JAX has started its devices; asking does not start them."""
    given = jax.config.jax_num_cpu_devices
    try:
        # JAX says it nowhere, but refuses another number of devices once they run.
        jax.config.update("jax_num_cpu_devices", given + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", given)
    return False


def compiler_options(mesh: jax.sharding.Mesh, *, chunks: int) -> dict[str, str]:
    """Compiler options, by name, of a program whose tokens travel in chunks (`xla_flags.BESIDE_EXCHANGES`)."""
    devices = mesh.devices.flat
    return options_beside_exchanges(
        devices[0].platform,
        os.environ.get("XLA_FLAGS", ""),
        chunks=chunks,
        processes=len({device.process_index for device in devices}),
    )


def _set_flags(num_devices: int | None) -> tuple[str, ...]:
    versions, given = _versions(), os.environ.get("XLA_FLAGS", "")
    environ = {**os.environ, "JAX_PLATFORMS": jax.config.jax_platforms or ""}
    backend = detect_backend(environ, versions)
    if backend == "cpu" and num_devices in (None, 1) and not given:
        return ()  # A lone device waits for nobody.
    relevant = {
        name: version for name, version in versions.items() if name in ("jaxlib", *PLUGINS.get(backend, ()))
    }
    settled = settle(
        given,
        backend,
        lambda text: _remembered_trial(text, backend, relevant),
        versions=" and ".join(f"{name} {version}" for name, version in relevant.items()),
    )
    if settled.text:
        os.environ["XLA_FLAGS"] = settled.text
    return (*settled.lines, *_set_memory(backend))


def _set_memory(backend: Backend) -> tuple[str, ...]:
    if backend == "cpu" or any(name in os.environ for name in MEMORY_VARIABLES):
        return ()
    os.environ[MEMORY_VARIABLES[0]] = str(MEMORY_FRACTION)
    return (
        f"{MEMORY_VARIABLES[0]}={MEMORY_FRACTION} set, as JAX would leave a quarter of each GPU to nobody",
    )


def _versions() -> dict[str, str]:
    """Versions by distribution, of those that are installed."""
    found = {}
    for name in ("jaxlib", *(plugin for plugins in PLUGINS.values() for plugin in plugins)):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def cache_file() -> Path:
    """Returns where trials are remembered, beside the token caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "piperjax" / "xla_flags.json"


def _remembered_trial(text: str, backend: Backend, versions: dict[str, str]) -> Trial:
    """Tries flags, unless this text was tried with these versions before.

    The file is a convenience: where it cannot be read or written, flags are tried again.
    """
    key = hashlib.sha256(json.dumps([text, backend, sorted(versions.items())]).encode()).hexdigest()
    path, known = cache_file(), {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(known, dict) and isinstance(known.get(key), list):
        return Trial(rejected=frozenset(map(str, known[key])))
    trial = _trial(text, backend)
    if not trial.failure and isinstance(known, dict):
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Many processes may do this at once; each writes a whole file.
            temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
            temporary.write_text(json.dumps({**known, key: sorted(trial.rejected)}), encoding="utf-8")
            temporary.replace(path)
    return trial


def _trial(text: str, backend: Backend) -> Trial:
    local = os.environ.get("SLURM_LOCALID", "0")
    environ = {
        **os.environ,
        "XLA_FLAGS": text,
        # Opens the one device that this process will use, for a moment and with little memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_CUDA_VISIBLE_DEVICES": local,
        "JAX_ROCM_VISIBLE_DEVICES": local,
    }
    ended = run_bounded(
        [sys.executable, *trial_program(backend)], limit_seconds=TRIAL_SECONDS, environ=environ
    )
    return read_trial(returncode=ended.returncode, stderr=ended.stderr)
