"""Collectives of simulated devices: the table of passes, and that the closed forms of wires are left alone."""

from dataclasses import replace

import numpy as np
import pytest

from meshes.platform import Device, Link, Platform
from piperjax.planner import network
from piperjax.planner.network import Group

LINK = Link(
    name="memory",
    devices=8,
    medium="memory",
    bytes_per_second=3e9,
    latency_seconds=34e-6,
    message_seconds=12e-6,
)
PLATFORM = Platform(name="cpu", description="simulated", device=Device(), devices_per_node=8, links=(LINK,))


@pytest.mark.parametrize(
    ("collective", "size", "members", "passes"),
    [
        ("permute", 2, 8, 1),  # all devices of the mesh meet
        ("permute", 8, 8, 1),
        ("all_gather", 4, 4, 1),
        ("reduce_scatter", 2, 2, 1),
        ("all_reduce", 2, 2, 1.5),
        ("all_reduce", 4, 4, 2.25),
        ("all_to_all", 8, 8, 2),
    ],
)
def test_members_and_passes(collective, size, members, passes):
    transfer = getattr(network, collective)(PLATFORM, Group(size, 1, 8), 3e6)
    assert transfer.seconds == pytest.approx(34e-6 + (members - 1) * 12e-6 + passes * 1e-3)
    assert transfer.sent_bytes > 0


def test_as_measured_on_two_cores():
    measured = {2: 45e-6, 4: 77e-6, 8: 115e-6}
    for size, seconds in measured.items():
        assert network.all_reduce(PLATFORM, Group(size, 1, 8), 1024).seconds == pytest.approx(
            seconds, rel=0.12
        )


def test_arrays_and_groups_of_one():
    sizes = np.array([1e3, 1e6])
    for name in ("permute", "all_gather", "all_reduce", "all_to_all"):
        price = getattr(network, name)
        assert price(PLATFORM, Group(4, 1, 8), sizes).seconds.shape == (2,)
        assert np.all(price(PLATFORM, Group(1), sizes).seconds == 0)


def test_a_wire_costs_what_it_did():
    wire = replace(PLATFORM, links=(replace(LINK, medium="wire"),))
    assert network.permute(wire, Group(2, 1, 8), 3e6).seconds == pytest.approx(34e-6 + 1e-3)


def test_the_medium_is_one_of_two():
    with pytest.raises(ValueError, match="medium must be one of wire, memory, got 'aether'"):
        replace(LINK, medium="aether")
