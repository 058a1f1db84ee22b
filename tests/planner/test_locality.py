"""Where members of an axis sit: drawn cases, and agreement with how the expert axis is factored."""

import pytest

from meshes.axes import AxisSizes
from meshes.platform import Device, Link, Platform, load_platform
from piperjax.planner.locality import Group, axis_group, factored_layout, group_layout, layout_of


def link(name, devices):
    return Link(name=name, devices=devices, bytes_per_second=1e9, latency_seconds=1e-6)


TOY = Platform(
    name="toy",
    description="nodes of 4, switches of 2 nodes, a system of 4 switches",
    device=Device(),
    devices_per_node=4,
    links=(link("node", 4), link("switch", 8), link("system", 32)),
)


def test_where_members_sit():
    sizes = AxisSizes(pipe=2, data=4, expert=4)
    assert axis_group(sizes, "expert") == Group(4, 1, 32)
    assert axis_group(sizes, "data") == Group(4, 4, 32)
    assert axis_group(sizes, "batch") == Group(16, 1, 32)
    assert axis_group(sizes, "pipe") == Group(2, 16, 32)
    assert group_layout(TOY, Group(4, 1, 32)) == ((4, 4, 4), 4)
    assert group_layout(TOY, Group(4, 4, 32)) == ((1, 2, 4), 1)
    assert group_layout(TOY, Group(16, 1, 32)) == ((4, 8, 16), 4)
    assert group_layout(TOY, Group(2, 16, 32)) == ((1, 1, 2), 1)
    # Every second device: two in a node.
    assert group_layout(TOY, Group(4, 2, 32)) == ((2, 4, 4), 2)
    # Groups of 6 straddle nodes: 0-5 is 4 + 2 but 6-11 is 2 + 4, and blocks of two never straddle.
    assert group_layout(TOY, Group(6, 1, 12)).members == (2, 2, 6)
    # Alone, they start at a boundary but still cross one: as `Platform.expert_factors` has it.
    assert group_layout(TOY, Group(6)).local == TOY.expert_factors(6, 1, 1)[2] == 2
    # Every third device: no two are sure to share a node.
    assert group_layout(TOY, Group(4, 3, 24)).members == (1, 1, 4)
    assert group_layout(TOY, Group(3, 1, 3)).members == (3, 3, 3)


def test_factors_say_the_same_as_the_axis():
    for platform in (TOY, load_platform("frontier"), load_platform("h100_pod")):
        for pipe, data, expert in [
            (1, 1, 4),
            (1, 1, 3),
            (2, 1, 8),
            (1, 2, 16),
            (1, 2, 6),
            (2, 2, 8),
            (1, 1, 32),
        ]:
            factors = platform.expert_factors(expert=expert, pipe=pipe, data=data)
            along = group_layout(platform, axis_group(AxisSizes(pipe, data, expert), "expert"))
            layout = factored_layout(platform, factors)
            assert layout.local == along.local and layout.members[-1] == expert
            if platform.links[0].devices == platform.devices_per_node:
                assert layout == along


def test_either_way_to_name_an_expert_axis():
    assert layout_of(TOY, Group(8)) == layout_of(TOY, (1, 2, 4)) == ((4, 8, 8), 4)
    assert layout_of(TOY, Group(8)).peers == (3, 4, 0)
    assert layout_of(TOY, (4, 2, 4)).steps == ((1, 4), (4, 8), (8, 32))
    assert layout_of(TOY, Group(1)).size == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: axis_group(AxisSizes(1, 1, 1), "tensor"), "one of pipe, data, expert, batch, got 'tensor'"),
        (lambda: group_layout(TOY, Group(0)), "a positive size and stride, got 0 and 1"),
        (lambda: group_layout(TOY, Group(64)), "'toy' joins at most 32 devices, got a mesh of 64"),
        (lambda: group_layout(TOY, Group(2, 1, 64)), "'toy' joins at most 32 devices, got a mesh of 64"),
    ],
)
def test_a_mistake_is_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()
