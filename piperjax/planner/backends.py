"""This file names the compilers whose memory is predicted, and says which of those for CPUs is installed."""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

# GPUs; CPUs that compute products of what is narrower in float32; CPUs whose products read it and write float32.
BACKENDS = ("gpu", "cpu", "native_cpu")
# The first release of JAX whose XLA hands such products to a library that takes bfloat16.
NATIVE_SINCE = (0, 12)


@cache
def installed_cpu() -> str:
    """Which of the backends for CPUs the installed JAX has, which is not imported; the older where there is none."""
    try:
        release = version("jax")
    except PackageNotFoundError:
        return "cpu"
    return cpu_of(release)


def cpu_of(release: str) -> str:
    """Which of the backends for CPUs a release of JAX has, such as "0.10.2"."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return "native_cpu" if found and tuple(map(int, found.groups())) >= NATIVE_SINCE else "cpu"
