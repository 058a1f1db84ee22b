"""What is said where XLA's plugin is not installed."""

import importlib.util

from benchmarks import absent_gpus


def test_a_missing_plugin_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs the CUDA plugin of this jax" in absent_gpus.reason_to_skip()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert absent_gpus.reason_to_skip() is None


def test_the_description_of_the_device_is_there():
    assert absent_gpus.TARGET.is_file()
