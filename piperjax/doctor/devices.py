"""This file is the checks of devices: what JAX finds, how much memory they have, whether two can exchange data."""

from piperjax.doctor.environment import Environment
from piperjax.doctor.finding import Finding, error, note, ok, warning
from piperjax.runtime.xla_flags import MEMORY_FRACTION, MEMORY_VARIABLES

GIB = 2**30
# Variables that hide GPUs; those of AMD count within what ROCR_VISIBLE_DEVICES leaves (ROCm documentation, "GPU
# isolation techniques"). HIP understands CUDA_VISIBLE_DEVICES as well.
VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def found_devices(env: Environment) -> list[Finding]:
    """What JAX starts on."""
    devices = env.devices
    if not devices.kinds:
        problem = devices.problem.removesuffix("; take it out")
        return [error("devices", f"JAX does not start: {problem}", _advice(env))]
    if devices.backend == "cpu":
        if env.has_gpu:
            if env.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
                return [note("devices", "JAX_PLATFORMS=cpu hides the GPUs", "unset it to train on them")]
            last = f": {devices.warnings[-1][:200]}" if devices.warnings else ""
            return [error("devices", f"JAX has {env.plugin} but fell back to the CPU{last}", _advice(env))]
        cores = f"{len(env.cpus)} processor cores" if env.cpus else "the processor"
        return [ok("devices", f"no GPU: JAX simulates devices on {cores} (train.py --devices N)")]
    memory = f" of {devices.memory_bytes / GIB:.1f} GiB for JAX" if devices.memory_bytes else ""
    kinds = sorted(set(devices.kinds))
    return [ok("devices", f"{len(devices.kinds)} x {' and '.join(kinds)} ({devices.backend}){memory}")]


def _advice(env: Environment) -> str:
    if "XLA_FLAGS" in env.devices.problem:
        return "correct XLA_FLAGS"
    if env.plugin.startswith("jax-rocm"):
        return "see whether rocminfo lists them, and what AMD_LOG_LEVEL=1 says"
    if env.plugin:
        return "see whether nvidia-smi lists them"
    if env.backend == "cpu":
        return "see what python -c 'import jax; jax.devices()' does"
    return f"make install EXTRA={env.backend} brings a plugin, and JAX_PLATFORMS=cpu uses the processor"


def exchange(env: Environment) -> list[Finding]:
    """An all-to-all of 1 MiB per device between two devices."""
    devices = env.devices
    if devices.exchange_seconds is not None:
        where = "simulated" if devices.backend == "cpu" else devices.backend
        took = f"{devices.exchange_seconds * 1e3:.2g} ms"
        return [ok("all-to-all", f"two {where} devices exchanged 1 MiB each in {took}")]
    if len(devices.kinds) == 1:
        return [note("all-to-all", "this process sees one device, so nothing was exchanged")]
    if not devices.kinds:
        return []
    advice = "set NCCL_DEBUG=INFO and try again; inside a node, settings of IOMMU or PCIe ACS can be at fault"
    return [error("all-to-all", f"two devices could not exchange data: {devices.problem}", advice)]


def expected_platform(env: Environment) -> list[Finding]:
    """What is here against the machine that --platform names."""
    expected, devices = env.expected, env.devices
    if expected is None or not devices.kinds:
        return []
    if devices.backend == "cpu":
        # Devices that are simulated meet in the memory of their process.
        if expected.links and expected.links[0].medium == "wire":
            advice = "run this on one of its compute nodes"
            return [
                warning("platform", f"{expected.name} has accelerators, but JAX found only the CPU", advice)
            ]
        return []
    findings = []
    count, per_node = len(devices.kinds), expected.devices_per_node
    if count not in (1, per_node) and env.number("SLURM_NTASKS_PER_NODE") is None:
        found = f"a node of {expected.name} has {per_node} devices, but this process sees {count}"
        findings.append(
            warning("platform", found, f"ask for all of a node's, or see {' and '.join(VISIBLE)}")
        )
    memory = expected.device.memory_bytes
    if memory and devices.memory_bytes and devices.memory_bytes > memory:
        has, given = f"{memory / GIB:.0f} GiB", f"{devices.memory_bytes / GIB:.0f}"
        found = f"a device of {expected.name} has {has}, but JAX was given {given}"
        findings.append(
            warning("platform", found, "another kind of machine, it seems: see python -m piperjax measure")
        )
    return findings or [ok("platform", f"{expected.name}: {expected.description}")]


def preallocation(env: Environment) -> list[Finding]:
    """How much of a GPU's memory JAX takes; plans count on nearly all of it."""
    if env.backend == "cpu":
        return []
    given = [name for name in MEMORY_VARIABLES if name in env.environ]
    if len(given) > 1:
        return [
            error("memory", f"{' and '.join(given)} are both set, which JAX refuses", f"unset {given[1]}")
        ]
    if env.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0"):
        advice = "unset it for training: memory taken piece by piece fragments"
        return [warning("memory", "XLA_PYTHON_CLIENT_PREALLOCATE is off", advice)]
    if not given:
        return [ok("memory", f"runs let JAX take {MEMORY_FRACTION:.0%} of a device")]
    name, text = given[0], env.environ[given[0]]
    try:
        fraction = float(text)
    except ValueError:
        return [error("memory", f"{name}={text} is not a number", "set it to 0.93")]
    if not 0.5 <= fraction <= 0.98:
        advice = "set it to 0.93: the collective library and the compiler need some memory of their own"
        return [warning("memory", f"{name}={text} is unusual", advice)]
    return [ok("memory", f"JAX takes {fraction:.0%} of a device")]


def visible_devices(env: Environment) -> list[Finding]:
    """Variables that hide GPUs, and whether they contradict each other."""
    given = {name: env.environ[name] for name in VISIBLE if name in env.environ}
    if env.backend == "cpu" or not given:
        return []
    empty = [name for name, value in given.items() if value.strip() in ("", "-1", "NoDevFiles")]
    if empty:
        return [error("devices", f"{empty[0]}={given[empty[0]]} hides every GPU", "unset it")]
    outer, inner = given.get("ROCR_VISIBLE_DEVICES"), given.get("HIP_VISIBLE_DEVICES")
    if outer and inner and inner.replace(",", "").isdigit():
        left = len(outer.split(","))
        if max(map(int, filter(None, inner.split(",")))) >= left:
            found = f"HIP_VISIBLE_DEVICES={inner} counts within the {left} that ROCR_VISIBLE_DEVICES={outer} leaves"
            return [error("devices", found, "set only one of the two")]
    return [note("devices", " ".join(f"{name}={value}" for name, value in given.items()))]


CHECKS = (found_devices, visible_devices, preallocation, expected_platform, exchange)
