"""This file is the checks of software: Python, JAX and what goes with it, plugins, ROCm's libraries."""

import os
import re

from piperjax.doctor.environment import Environment
from piperjax.doctor.finding import Finding, error, note, ok, warning
from piperjax.runtime.xla_flags import DEVICE_FILES, PLUGINS

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def python_version(env: Environment) -> list[Finding]:
    """Python against requires-python."""
    text = ".".join(map(str, env.python))
    wanted = env.requirements.get("python", "")
    if not satisfies(text, wanted):
        return [
            error(
                "python",
                f"Python {text} is outside {wanted}",
                "make .venv with another, make train PYTHON=...",
            )
        ]
    return [ok("python", f"Python {text}")]


def package_versions(env: Environment) -> list[Finding]:
    """JAX and what is built on it against the ranges that pyproject.toml gives."""
    findings, good = [], []
    for name in PACKAGES:
        # jaxlib is required by jax, in the same releases.
        wanted = env.requirements.get(name, env.requirements.get("jax", "") if name == "jaxlib" else "")
        version = env.versions.get(name)
        if version is None:
            findings.append(error("packages", f"{name} is not installed", "run make install"))
        elif not satisfies(version, wanted):
            advice = "run make install, or pip install -c constraints.txt"
            findings.append(error("packages", f"{name} {version} is outside {wanted}", advice))
        else:
            good.append(f"{name} {version}")
    return [*findings, *([ok("packages", ", ".join(good))] if good else [])]


def matching_jaxlib(env: Environment) -> list[Finding]:
    """JAX and jaxlib of one release."""
    jax, jaxlib = env.versions.get("jax"), env.versions.get("jaxlib")
    if jax and jaxlib and release(jax)[:2] != release(jaxlib)[:2]:
        advice = f"install jaxlib=={jax}, since jax calls what is inside jaxlib"
        return [error("packages", f"jax {jax} and jaxlib {jaxlib} are of different releases", advice)]
    return []


def plugins(env: Environment) -> list[Finding]:
    """A plugin for the GPU that is here, of jaxlib's release, with both of its halves."""
    findings = []
    for backend, names in PLUGINS.items():
        installed = [name for name in names if name in env.versions]
        device_file = env.root / DEVICE_FILES[backend]
        extra = f"make install EXTRA={backend}"
        if not installed and device_file.exists():
            found = f"there is a GPU (/{DEVICE_FILES[backend]}) but none of {', '.join(names)} is installed"
            findings.append(warning("plugin", found, f"run {extra}, or JAX trains on the CPU"))
        if len(installed) > 1:
            found = f"{' and '.join(installed)} are both installed"
            findings.append(error("plugin", found, f"pip uninstall {installed[-1]}: JAX loads one of them"))
        for name in installed[:1]:
            findings += _one_plugin(env, name, extra)
            findings += _device_file(env, name, DEVICE_FILES[backend])
    if not env.plugin and not any(finding.check == "plugin" for finding in findings):
        findings.append(note("plugin", "no plugin for a GPU is installed: JAX runs on the CPU"))
    return findings


def _one_plugin(env: Environment, name: str, extra: str) -> list[Finding]:
    jaxlib, findings = env.versions.get("jaxlib", ""), []
    # JAX refuses a plugin of another release, with one line of warning, and goes on with the CPU.
    for part in (name, name.replace("-plugin", "-pjrt")):
        version = env.versions.get(part)
        if version is None:
            findings.append(error("plugin", f"{name} is installed without {part}", f"run {extra}"))
        elif release(version) != release(jaxlib):
            advice = (
                f"install {part}=={'.'.join(map(str, release(jaxlib)))}: JAX does not load another release"
            )
            findings.append(
                error("plugin", f"{part} {version} is not of the release of jaxlib {jaxlib}", advice)
            )
    return findings or [ok("plugin", f"{name} {env.versions[name]} matches jaxlib {jaxlib}")]


def _device_file(env: Environment, name: str, device: str) -> list[Finding]:
    path = env.root / device
    if not path.exists():
        advice = (
            "run this on a compute node, and in a container pass its devices (--device=/dev/kfd --device=/dev/dri, or "
            "--gpus all)"
        )
        return [warning("plugin", f"{name} is installed but there is no /{device}, so no GPU", advice)]
    if not os.access(path, os.R_OK | os.W_OK):
        advice = "add the user to the groups render and video"
        return [error("plugin", f"/{device} may not be opened by this user", advice)]
    return []


def rocm_libraries(env: Environment) -> list[Finding]:
    """ROCm's libraries, which jax-rocm7-plugin does not bring along, of the version that it was built for."""
    match = re.fullmatch(r"jax-rocm(\d)\d*-plugin", env.plugin)
    if not match:
        return []
    wanted, findings = match[1], []
    for library in ("libamdhip64.so", "librccl.so"):
        if env.library(library) is None:
            advice = f"load a ROCm {wanted} module, or set ROCM_PATH or LD_LIBRARY_PATH to where it is"
            findings.append(
                error("rocm", f"no {library} on LD_LIBRARY_PATH, in ROCM_PATH or /opt/rocm", advice)
            )
    home = env.environ.get("ROCM_PATH", "/opt/rocm").lstrip("/")
    version = env.text(f"{home}/.info/version")
    if version and version.split(".")[0] != wanted:
        found = f"ROCm is {version}, but {env.plugin} was built for ROCm {wanted}"
        findings.append(error("rocm", found, f"load a ROCm {wanted} module"))
    return findings or [ok("rocm", f"ROCm {version or wanted} with RCCL")]


def clashing_packages(env: Environment) -> list[Finding]:
    """TensorFlow beside the ROCm plugin: both bring an LLVM, and their symbols clash with a crash."""
    installed = next((name for name in ("tensorflow", "tensorflow-rocm") if name in env.versions), None)
    if installed and env.plugin.startswith("jax-rocm"):
        advice = (
            "pip uninstall it: nothing here needs it, and its LLVM can crash JAX's (a segmentation fault)"
        )
        return [warning("packages", f"{installed} is installed beside {env.plugin}", advice)]
    return []


CHECKS = (python_version, package_versions, matching_jaxlib, plugins, rocm_libraries, clashing_packages)


def release(version: str) -> tuple[int, ...]:
    """Returns the first three numbers of a version: 0.12.0.1 and 0.12.0.post3 are of release (0, 12, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    found = tuple(map(int, numbers[0].split("."))) if numbers else ()
    return (*found, 0, 0, 0)[:3]


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version lies in a range such as ">=0.10,<0.13"; releases are compared, not their candidates."""
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>|~=)\s*([\d.]+).*", part)
        if match is None:
            continue
        have, bound = release(version), release(match[2])
        holds = {
            ">=": have >= bound,
            "~=": have >= bound,
            ">": have > bound,
            "<=": have <= bound,
            "<": have < bound,
            "==": have == bound,
            "!=": have != bound,
        }
        if not holds[match[1]]:
            return False
    return True
