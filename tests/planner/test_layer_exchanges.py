"""What exchanges of rows add to the seconds of a layer: by hand."""

import dataclasses

import pytest

from meshes.platform import Device, Link, Platform
from piperjax.planner.layer_exchanges import HIDDEN_FRACTION, Exchanges, exposed_seconds, static_exchanges
from piperjax.planner.network import Stages, Transfer, dispatch_stages

LINKS = (
    Link(name="node", devices=4, bytes_per_second=1e9, latency_seconds=1e-6),
    Link(name="system", devices=64, bytes_per_second=1e8, latency_seconds=1e-5),
)


def machine(**changes):
    device = Device(memory_bytes_per_second=1e30, **changes)
    return Platform(name="m", description="m", device=device, devices_per_node=4, links=LINKS)


def test_chunks_travel_beside_experts():
    platform = machine()
    one = Stages(Transfer(seconds=1.0), Transfer(seconds=0.0))
    # Four chunks: 1, 2, 2, 2, 2, 1 seconds, where 8 of experts and 8 of wire follow each other otherwise.
    exposed = exposed_seconds(platform, one, 4, 8.0)
    assert exposed == pytest.approx(8 - HIDDEN_FRACTION * (16 - 10))
    assert exposed_seconds(platform, one, 1, 8.0) == 2
    # What is inside of nodes comes with the experts: 1, 4, 4, 4, 4, 1.
    inside = Stages(Transfer(seconds=1.0), Transfer(seconds=1.0))
    assert exposed_seconds(platform, inside, 4, 8.0) == pytest.approx(16 - HIDDEN_FRACTION * (24 - 18))
    # The wire takes a quarter of the experts' rate: 2 seconds beside 1 or 2 of wire become 2.25, or 2.5.
    slowed = machine(interference_fraction=0.25)
    exposed = exposed_seconds(slowed, one, 4, 8.0)
    assert exposed == pytest.approx(8 - HIDDEN_FRACTION * (16 - (1 + 2.25 + 2.5 + 2.5 + 2.25 + 1)))
    simulated = dataclasses.replace(platform, device=machine(concurrent_devices=2.0).device)
    assert exposed_seconds(simulated, one, 4, 8.0) == 8


def test_modes_repeat_what_they_do_not_keep():
    found = Exchanges(once=4.0, back=5.0, there=1.5)
    assert [found.again(mode) for mode in ("stage", "layer", "named", "products", "stash")] == [
        5.5,
        1.5,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(("dispatcher", "messages"), [("flat", 1), ("halo2", 1), ("halo2_dedup", 0)])
def test_gates_travel_beside_rows_or_in_their_message(dispatcher, messages):
    platform = machine()
    one = dict(
        expert_factors=(1, 2, 4), tokens=1024, num_experts=16, experts_per_token=2, dispatcher=dispatcher
    )
    rows, gates = (
        sum(t.seconds for t in dispatch_stages(platform, row_bytes=size, **one)) for size in (2048, 4)
    )
    found = static_exchanges(platform, chunks=1, forward=1.0, backward=1.0, row_bytes=2048, **one)
    assert found.once == pytest.approx(2 * rows + messages * gates)
    assert found.back == found.once and found.there == pytest.approx(rows + messages * gates)
