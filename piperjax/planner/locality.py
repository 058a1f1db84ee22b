"""This file is where the members of a mesh axis sit: how many share a package, a node, a switch."""

from functools import lru_cache
from math import gcd, prod
from typing import NamedTuple, Protocol

from meshes.platform import Platform


class Group(NamedTuple):
    """Devices that talk to each other along a mesh axis.

    Attributes:
      size: members.
      stride: devices from one member to the next.
      num_devices: devices of the mesh, which is cut into such groups; 0 if this group is all of it.
    """

    size: int
    stride: int = 1
    num_devices: int = 0


class Sizes(Protocol):
    """Anything with the sizes of the three axes: a `Plan`, or `AxisSizes`."""

    pipe: int
    data: int
    expert: int


def axis_group(sizes: Sizes, axis: str) -> Group:
    """The group of an axis: "pipe", "data", "expert", or "batch" (data x expert). Expert is innermost.

    Raises:
      ValueError: if there is no such axis.
    """
    pipe, data, expert = sizes.pipe, sizes.data, sizes.expert
    groups = {
        "pipe": (pipe, data * expert),
        "data": (data, expert),
        "expert": (expert, 1),
        "batch": (data * expert, 1),
    }
    if axis not in groups:
        raise ValueError(f"a group lies along one of {', '.join(groups)}, got {axis!r}")
    return Group(*groups[axis], num_devices=pipe * data * expert)


class Layout(NamedTuple):
    """Where the members of a group sit.

    Attributes:
      members: members within one instance of each link, innermost first; the last is the whole group.
      local: members within one node.
    """

    members: tuple[int, ...]
    local: int

    @property
    def size(self) -> int:
        """Members of the group."""
        return self.members[-1] if self.members else 1

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """Members within the level inside each link, and within the link."""
        return tuple(zip((1, *self.members), self.members, strict=False))

    @property
    def peers(self) -> tuple[int, ...]:
        """Other members that a member reaches over each link as the innermost that joins them."""
        return tuple(n - inner for inner, n in self.steps)


@lru_cache(maxsize=8192)
def group_layout(platform: Platform, group: Group) -> Layout:
    """Where the members of a group sit on the links of a platform.

    Members within one instance of a link of n devices are the largest block of consecutive members that never
    straddles a boundary at a multiple of n: gcd(size, n / stride), or all of them if the mesh fits. Where groups
    straddle boundaries unevenly this is the worst case.

    Raises:
      ValueError: if the mesh is larger than the platform's outermost link.
    """
    size, stride, num_devices = group
    if size < 1 or stride < 1:
        raise ValueError(f"a group needs a positive size and stride, got {size} and {stride}")
    num_devices = max(num_devices, size * stride)

    def block(boundary: int) -> int:
        if num_devices <= boundary:
            return size
        return gcd(size, boundary // stride) if boundary % stride == 0 else 1

    _check_reach(platform, size, num_devices)
    return Layout(tuple(block(link.devices) for link in platform.links), block(platform.devices_per_node))


@lru_cache(maxsize=8192)
def factored_layout(platform: Platform, factors: tuple[int, int, int]) -> Layout:
    """Where the members of an expert axis sit that `Platform.expert_factors` split into (group, node, local).

    Raises:
      ValueError: if the axis is larger than the platform's outermost link.
    """
    group, node, local = factors
    size = prod(factors)
    _check_reach(platform, size, size)

    def block(boundary: int) -> int:
        if boundary <= platform.devices_per_node:
            return local if boundary == platform.devices_per_node else gcd(local, boundary)
        if boundary == platform.switch_devices:
            return node * local
        return size if group == 1 or size <= boundary else gcd(size, boundary)

    return Layout(tuple(block(link.devices) for link in platform.links), local)


def _check_reach(platform: Platform, size: int, num_devices: int) -> None:
    if size == 1:
        return
    if not platform.links:
        raise ValueError(
            f"platform '{platform.name}' describes no links, so a group of {size} devices cannot be priced; "
            "add [[links]] to its file, or write one with `python -m piperjax measure`"
        )
    reach = platform.links[-1].devices
    if num_devices > reach:
        raise ValueError(
            f"platform '{platform.name}' joins at most {reach} devices, got a mesh of {num_devices}; "
            "use fewer devices or another platform"
        )


def layout_of(platform: Platform, group_or_factors: Group | tuple[int, int, int]) -> Layout:
    """The layout of a group, or of an expert axis as (group, node, local)."""
    if isinstance(group_or_factors, Group):
        return group_layout(platform, group_or_factors)
    return factored_layout(platform, tuple(group_or_factors))
