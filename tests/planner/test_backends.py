"""Which compiler's memory is predicted: known by the release of JAX, without importing it."""

import importlib.metadata

import pytest

from benchmarks import memory as benchmark
from piperjax.planner import backends
from piperjax.planner.memory import estimate_memory


@pytest.mark.parametrize(
    ("release", "backend"),
    [
        ("0.10.2", "cpu"),
        ("0.11.0", "cpu"),
        ("0.12.0.1", "native_cpu"),
        ("0.13.1rc1", "native_cpu"),
        ("1.0", "native_cpu"),
    ],
)
def test_releases_of_jax(release, backend):
    assert backends.cpu_of(release) == backend


def test_what_is_installed(monkeypatch):
    assert backends.installed_cpu() == backends.cpu_of(importlib.metadata.version("jax"))

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(backends, "version", missing)
    backends.installed_cpu.cache_clear()
    assert backends.installed_cpu() == "cpu"
    backends.installed_cpu.cache_clear()


@pytest.mark.parametrize("memory_mode", ["layer", "stash"])
def test_products_as_they_are_need_less_where_they_were_converted(memory_mode):
    """In bfloat16 nothing is there in float32 as well; in float32 both are the same."""
    model = benchmark.scaled("mixtral_8x7b")
    for dtype in ("bfloat16", "float32"):
        one = benchmark.case(model, (2, 1, 2), memory_mode=memory_mode, dtype=dtype)
        widened, natively = (
            max(rank.total for rank in estimate_memory(one.model, one.plan, dtype=dtype, backend=name))
            for name in ("cpu", "native_cpu")
        )
        assert widened > 1.05 * natively if dtype == "bfloat16" else widened == natively
