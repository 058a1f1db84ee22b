"""GPUs that are not here: what is said of them, and what is said where XLA's plugin is not installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshes.platform import known_platforms, load_platform
from piperjax.runtime import absent_gpus

ROOT = Path(__file__).parents[2]


def test_a_missing_plugin_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = absent_gpus.reason_to_skip("cuda")
    assert "JAX's plugin for CUDA, which is not installed: pip install --no-deps jax-cuda12-pjrt==" in reason
    with pytest.raises(ValueError, match="JAX's plugin for ROCM"):
        absent_gpus.devices(absent_gpus.target("mi250x"), 8, 8)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert absent_gpus.reason_to_skip("cuda") is None


@pytest.mark.parametrize("name", absent_gpus.names())
def test_descriptions_say_what_is_asked_of_them(name):
    target = absent_gpus.target(name)
    assert target.backend == ("rocm" if name.startswith("mi") else "cuda")
    assert target.description.count("{") == target.description.count("}") >= 3
    assert "device_memory_size" in target.description


def test_every_gpu_of_a_platform_is_described_and_every_description_used():
    named = {load_platform(name).device.gpu for name in known_platforms()} - {""}
    assert named == set(absent_gpus.names())


def test_an_unknown_gpu_is_a_sentence():
    with pytest.raises(ValueError, match="GPUs that can be compiled for are a100_40, .*mi355x, got 'tpu'"):
        absent_gpus.target("tpu")


def test_options_have_types():
    options = absent_gpus.compiler_options("cuda")
    assert options["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert options["xla_gpu_experimental_parallel_collective_overlap_limit"] == 4
    assert "" not in absent_gpus.compiler_options("rocm").values()


@pytest.mark.slow
@pytest.mark.skipif(absent_gpus.reason_to_skip("cuda") is not None, reason="no CUDA plugin of JAX")
def test_a_step_compiles_for_gpus_that_are_not_here():
    flags = "--model tiny --devices 8 --pipe 2 --expert 4 --platform h100_pod --target gpu --dtype bfloat16"
    command = [sys.executable, "-m", "piperjax", "compile", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert "= 8 h100 GPUs" in done.stdout, done.stderr
