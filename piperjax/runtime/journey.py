"""One journey of rows: to the devices of a node, or to those of the same local index in all nodes, and back."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.runtime.all_to_all import Axes, axes_size, by_leaders, split_axes


class Journey(NamedTuple):
    """Who exchanges rows, and by which messages. Any way moves the same bits to the same places.

    Attributes:
      axes: along which the n devices are that exchange rows; if there are none, nothing moves.
      leaders: the axis inside of a node whose devices lead what its devices send to another (`all_to_all`): it is
        handed to them, crosses, and is handed out. If there is none, everything travels directly.
    """

    axes: Axes
    leaders: Axes = ()

    @property
    def size(self) -> int:
        """Devices n that exchange rows."""
        return axes_size(self.axes)

    def exchanged(self, x: jax.Array) -> jax.Array:
        """Per device: rows [n C, ...], C for each device, to what these sent. Its gradient must be given: `travel`."""
        if not self.axes:
            return x
        if self.leaders:
            return by_leaders(x, self.axes, self.leaders, to_same_index=True)
        return lax.all_to_all(x, self.axes, 0, 0, tiled=True)

    def gathered(self, x: jax.Array) -> jax.Array:
        """Per device: rows [C, ...] to those of all devices [n C, ...]."""
        if not self.axes:
            return x
        if self.leaders:
            return self.exchanged(jnp.tile(x, (self.size, *(1,) * (x.ndim - 1))))
        return lax.all_gather(x, self.axes, tiled=True)


def journeys(axes: Axes, *, by_leaders: bool) -> tuple[Journey, Journey]:
    """Those to nodes and inside a node, of devices along expert axes."""
    nodes, local = split_axes(axes)
    return Journey(nodes, local if by_leaders else ()), Journey(local)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def travel(x: jax.Array, journey: Journey) -> jax.Array:
    """Per device: `journey.exchanged`, which is its own transpose."""
    return journey.exchanged(x)


travel.defvjp(
    lambda x, journey: (journey.exchanged(x), None), lambda journey, _, dy: (journey.exchanged(dy),)
)
