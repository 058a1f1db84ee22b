"""Static deadlock check: no collective may wait for devices that took another branch.

A predicate that varies over some mesh axes sends the devices along those axes into different branches, or
different numbers of loop trips. A collective inside over any of these axes would wait for ever. The check
reads the varying axes that `check_vma=True` has recorded in the jaxpr.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

_AXIS_PARAMETERS = ("axes", "axis_name", "axis_index_groups_axis")
_COLLECTIVES = (
    "psum", "psum_invariant", "pmax", "pmin", "ppermute", "all_to_all", "all_gather", "all_gather_invariant",
    "reduce_scatter", "psum_scatter", "pbroadcast", "ragged_all_to_all",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a program.

    Attributes:
      name: JAX primitive.
      axes: mesh axes it joins.
      divergent_axes: mesh axes over which an enclosing predicate varies.
    """

    name: str
    axes: frozenset[str]
    divergent_axes: frozenset[str]

    @property
    def may_deadlock(self) -> bool:
        """Whether some partner may never come. A permute waits for all devices, also those of no pair of its own."""
        return bool(self.divergent_axes if self.name == "ppermute" else self.axes & self.divergent_axes)


def collectives(jaxpr: ClosedJaxpr) -> list[Collective]:
    """Every collective of a jaxpr with the axes along which devices may have taken another branch."""
    return list(_walk(jaxpr.jaxpr, frozenset()))


def check_no_deadlock(jaxpr: ClosedJaxpr) -> Counter:
    """Counts the collectives of a jaxpr by (name, sorted axes).

    Raises:
      ValueError: if a collective stands in a branch or loop whose predicate varies over its axes.
    """
    found = collectives(jaxpr)
    bad = [c for c in found if c.may_deadlock]
    if bad:
        listed = "; ".join(
            f"{c.name} over {sorted(c.axes)} under a predicate that varies over {sorted(c.divergent_axes)}"
            for c in bad
        )
        raise ValueError(f"these collectives may wait for devices in another branch: {listed}")
    return Counter((c.name, tuple(sorted(c.axes))) for c in found)


def _walk(jaxpr: Jaxpr, divergent: frozenset[str]) -> Iterator[Collective]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _COLLECTIVES:
            yield Collective(name=name, axes=_axes_of(eqn.params), divergent_axes=divergent)
        inner = divergent
        if name == "cond":
            inner = divergent | _varying(eqn.invars[0])
        elif name == "while":
            inner = divergent | _loop_divergence(eqn)
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, ClosedJaxpr):
                    yield from _walk(item.jaxpr, inner)
                elif isinstance(item, Jaxpr):
                    yield from _walk(item, inner)


def _axes_of(params: dict) -> frozenset[str]:
    for key in _AXIS_PARAMETERS:
        if key in params:
            axes = params[key]
            return frozenset(axes if isinstance(axes, tuple | list) else (axes,))
    return frozenset()


def _loop_divergence(eqn: jax.extend.core.JaxprEqn) -> frozenset[str]:
    """Axes over which the trip count of a `while` varies: those of its predicate."""
    return frozenset().union(*(_varying(var) for var in eqn.params["cond_jaxpr"].jaxpr.outvars))


def _varying(var) -> frozenset[str]:
    return getattr(getattr(var.aval, "manual_axis_type", None), "varying", frozenset())
