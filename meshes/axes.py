"""This file is the mesh axes: their names, their order, and how the sizes a person gives become a whole mesh."""

from math import prod
from typing import NamedTuple

# Outermost first: consecutive devices differ in the last axis. Transfers between pipe ranks are small and may cross
# the slowest link; gradients are reduced over data once per step; tokens go to their experts in every layer and
# microbatch, so the expert axis stays on the fastest links. It is three axes, one per locality level of the machine,
# so that each phase of a hierarchical all-to-all is a plain collective over one of them.
PIPE = "pipe"
DATA = "data"
EXPERT = ("expert_group", "expert_node", "expert_local")
AXES = (PIPE, DATA, *EXPERT)
BATCH = (DATA, *EXPERT)

FILL = -1


class AxisSizes(NamedTuple):
    """Devices along each axis; `expert` is the product of the three expert axes."""

    pipe: int
    data: int
    expert: int

    @property
    def num_devices(self) -> int:
        """Devices in the mesh."""
        return self.pipe * self.data * self.expert


def resolve_axes(
    num_devices: int, *, pipe: int | None = None, expert: int | None = None, data: int | None = None
) -> AxisSizes:
    """Completes axis sizes so that they multiply to `num_devices`.

    -1 takes the devices that the other axes leave; at most one axis may be -1. An axis that is not given (None) is 1,
    except that `data` takes what is left when no axis is -1. With nothing given the mesh is all data.

    Raises:
      ValueError: if no mesh has these sizes; the sentence names sizes that would work.
    """
    sizes = {"pipe": pipe, "expert": expert, "data": data}
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or size < 1) and size != FILL:
            raise ValueError(
                f"{name} must be a positive number of devices, or -1 to take those left over, got {size!r}"
            )
    filled = [name for name, size in sizes.items() if size == FILL]
    if len(filled) > 1:
        raise ValueError(f"only one axis can take the devices left over, got -1 for {' and '.join(filled)}")
    if not filled and data is None:
        filled = ["data"]
    chosen = {name: size or 1 for name, size in sizes.items() if name not in filled}
    taken = prod(chosen.values())
    if filled and num_devices % taken == 0:
        chosen[filled[0]] = num_devices // taken
    elif filled or taken != num_devices:
        raise ValueError(_no_such_mesh(chosen, filled, num_devices))
    return AxisSizes(**chosen)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, smallest first."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _no_such_mesh(chosen: dict[str, int], filled: list[str], num_devices: int) -> str:
    taken = prod(chosen.values())
    product = " x ".join(f"{name} {size}" for name, size in chosen.items() if size > 1 or not filled)
    product = f"{product} = {taken}" if " x " in product else product
    if filled:
        problem = f"{product} must divide the {num_devices} devices, so that {filled[0]} can take the rest"
    else:
        problem = f"{product} must equal the {num_devices} devices"
    remedies = []
    for name, size in chosen.items():
        others = taken // size
        if size > 1 and num_devices % others == 0:
            fits = divisors(num_devices // others) if filled else [num_devices // others]
            remedies.append(f"{name} = {' or '.join(map(str, fits))}")
    if not filled and num_devices % taken == 0:
        remedies = [f"{name} = {size * num_devices // taken}" for name, size in chosen.items()]
    if not remedies:
        remedies = [f"sizes that are divisors of {num_devices}: {', '.join(map(str, divisors(num_devices)))}"]
    return f"{problem}; use {', or '.join(remedies)}"
