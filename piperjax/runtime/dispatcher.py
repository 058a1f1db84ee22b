"""What a way to bring rows to their experts consists of: three stages, each with its own part of the network."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

# What the memory mode "named" keeps: rows as they reach their experts.
DISPATCHED = "dispatched"

# (rows [R, D], sizes [G] int32, gates [R]) -> [R, D]: expert g on the g-th group of rows, weighed by the gates.
ExpertFFN = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How devices share the experts of a layer, at trace time.

    Attributes:
      axes: mesh axes whose devices share them, outermost first; the last joins the devices of a node.
      sizes: devices along each.
      num_experts: physical experts E. Device p of P holds experts p E/P to (p + 1) E/P - 1.
      experts_per_token: distinct experts k that a token takes.
      num_tokens: tokens T of a device.
      capacity_factor: rows that a device accepts from another at a time, over the balanced number; 0 accepts all.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    num_experts: int
    experts_per_token: int
    num_tokens: int
    capacity_factor: float

    def __post_init__(self):
        if self.num_experts % self.num_devices:
            raise ValueError(
                "the experts must divide evenly over the devices of the expert axes, got "
                f"{self.num_experts} experts on {self.num_devices} devices"
            )

    @property
    def num_devices(self) -> int:
        """Devices P that share the experts."""
        return math.prod(self.sizes)

    @property
    def num_nodes(self) -> int:
        """Nodes N among which these devices are."""
        return math.prod(self.sizes[:-1])

    @property
    def experts_per_device(self) -> int:
        """Experts that a device holds."""
        return self.num_experts // self.num_devices


@dataclass(frozen=True, kw_only=True)
class Dispatcher:
    """A way to bring rows to their experts and results back, in stages that can run beside those of other tokens.

    All stages run per device. What they hand on are trees of arrays. Of the expert ids [T, k], which are those of
    physical experts, E itself stands for a copy that does not travel.

    Attributes:
      name: what a plan calls it.
      num_rows: sharing -> rows of the buffer for the experts of a device, dead places included.
      admit: (expert_ids, sharing) -> which copies find room [T, k] bool, at least one if any is to travel; None if
        there is always room for all.
      send: (x [T, D], expert_ids, gates [T, k], sharing) -> (what arrives, what `collect` must remember), where all
        copies find room.
      work: (expert_ffn, what arrived, sharing) -> results that are ready to travel.
      collect: (results, what `send` remembered, sharing) -> y [T, D].
      waits_for_all: whether its messages wait for all devices of a mesh, not only for those that share the experts.
    """

    name: str
    num_rows: Callable[[Sharing], int]
    admit: Callable[[jax.Array, Sharing], jax.Array | None]
    send: Callable[[jax.Array, jax.Array, jax.Array, Sharing], tuple[Any, Any]]
    work: Callable[[ExpertFFN, Any, Sharing], Any]
    collect: Callable[[Any, Any, Sharing], jax.Array]
    waits_for_all: bool = False
