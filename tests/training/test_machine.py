"""Tests of the machine that a run finds itself on."""

import jax
import pytest

from meshes.platform import load_platform
from piperjax.training import machine
from piperjax.training.machine import find_platform


@pytest.mark.parametrize(("count", "name"), [(8, "cpu8"), (1, "cpu"), (2, "cpu")])
def test_simulated_devices_are_recognised_and_share_the_memory_of_their_host(monkeypatch, count, name):
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: 24 * 2**30)
    platform = find_platform("auto", jax.devices()[:count])
    assert platform.name == name and platform.device.memory_bytes == 24 * 2**30 // count


def test_a_machine_that_is_named_keeps_its_memory():
    assert find_platform("frontier", jax.devices()) == load_platform("frontier")


def test_memory_that_nobody_tells_stays_unknown(monkeypatch):
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: None)
    assert find_platform("cpu8", jax.devices()) == load_platform("cpu8")
