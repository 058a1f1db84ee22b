"""Straight-line programs: a traced function that can be cut into parts.

Backward passes are split here, below the level at which models are written: what forward must keep, and what the
input gradient must hand to the weight gradient, is read off the equations. No layer has to be written for it.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal, Var

from piperjax.runtime.varying import vary

# Calls that are replaced by their bodies. What stays whole (loops, branches) is never cut.
_CALLS = frozenset(
    ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
)
# Not worth a buffer: made again from their one operand where that is no larger.
_RESHAPING = frozenset(
    ("broadcast_in_dim", "convert_element_type", "reshape", "transpose", "squeeze", "pcast", "pvary", "copy")
)


@dataclass(frozen=True, eq=False)
class Program:
    """Equations that lead from inputs to outputs.

    Attributes:
      inputs: variables that a caller gives values.
      equations: in order; none of them a call.
      outputs: variables, or literals.
      constants: values of variables that are neither inputs nor results.
    """

    inputs: tuple[Var, ...]
    equations: tuple
    outputs: tuple
    constants: dict[Var, jax.Array]

    def __call__(self, *values: jax.Array) -> list[jax.Array]:
        """Values of the outputs."""
        known = self.bound(*values)
        self.run(self.equations, known)
        return self.values_of(known)

    def bound(self, *values: jax.Array) -> dict[Var, jax.Array]:
        """What is known before any equation has run."""
        return self.constants | dict(zip(self.inputs, values, strict=True))

    def run(self, equations: Iterable, known: dict[Var, jax.Array]) -> None:
        """Adds the results of some of the equations to what is known."""
        for equation in equations:
            _run(equation, known)

    def values_of(self, known: dict[Var, jax.Array]) -> list[jax.Array]:
        """Values of the outputs, once all equations have run."""
        return [_value(output, known) for output in self.outputs]

    def cut(self, inputs: Iterable[Var], outputs: Sequence) -> "Program":
        """The part that leads from some variables to others.

        Raises:
          ValueError: if the outputs need more than those inputs.
        """
        inputs = tuple(inputs)
        given = set(inputs) | set(self.constants)
        wanted = {v for v in outputs if is_variable(v)}
        equations = []
        for equation in reversed(self.equations):
            if not wanted.isdisjoint(set(equation.outvars) - given):
                equations.append(equation)
                wanted.update(filter(is_variable, equation.invars))
        made = {v for equation in equations for v in equation.outvars}
        missing = wanted - given - made
        if missing:
            raise ValueError(f"a part of a program must not need more than its inputs, but needs {missing}")
        constants = {v: value for v, value in self.constants.items() if v in wanted}
        return Program(inputs, tuple(reversed(equations)), tuple(outputs), constants)

    def made_from(self, variables: Iterable[Var]) -> set[Var]:
        """Variables that follow from these (and from constants) alone, themselves included."""
        known = set(variables) | set(self.constants)
        for equation in self.equations:
            if all(v in known for v in equation.invars if is_variable(v)):
                known.update(equation.outvars)
        return known

    def to_keep(self, wanted: Iterable, free: Iterable[Var]) -> tuple[Var, ...]:
        """The smallest set we find of variables from which, with the free inputs, the wanted ones follow cheaply.

        A variable that follows from free inputs alone is not kept, and neither is one that is only another in a
        new shape or a wider type.
        """
        at_hand = self.made_from(free)
        producers = {v: equation for equation in self.equations for v in equation.outvars}
        kept: dict[Var, None] = {}
        stack = [v for v in wanted if is_variable(v)]
        while stack:
            variable = stack.pop(0)
            if variable in at_hand:
                continue
            producer = producers.get(variable)
            if producer is not None and producer.primitive.name in _RESHAPING:
                operands = [v for v in producer.invars if is_variable(v)]
                if len(operands) == 1 and _bytes(operands[0]) <= _bytes(variable):
                    stack.append(operands[0])
                    continue
            kept[variable] = None
        return tuple(kept)


class Call(NamedTuple):
    """A program and the values of its inputs, not run yet.

    Attributes:
      program, values: what to run.
      entry: which of the inputs is the one to begin with, when others may long have been there.
      finish: makes the result from the program's outputs.
      scope: name of the work in compiled programs.
    """

    program: Program
    values: Sequence[jax.Array]
    entry: int
    finish: Callable[[list[jax.Array]], Any]
    scope: str | None = None

    def __call__(self) -> Any:
        """The result."""
        with self.named_scope():
            return self.finish(self.program(*self.values))

    def then(self, change: Callable[[Any], Any], scope: str | None = None) -> "Call":
        """A call whose result is what `change` makes of that of this one."""
        return self._replace(finish=lambda outputs: change(self.finish(outputs)), scope=scope or self.scope)

    def named_scope(self) -> AbstractContextManager:
        """A context in which what is traced is called by the scope."""
        return jax.named_scope(self.scope) if self.scope else nullcontext()


def trace(function: Callable[..., Sequence[jax.Array]], *arguments: jax.Array) -> Program:
    """Traces a function of arrays to a program without calls."""
    called = jax.make_jaxpr(function)(*arguments)

    def without_calls(*values):
        return _run_jaxpr(called.jaxpr, called.consts, values)

    closed = jax.make_jaxpr(without_calls)(*arguments)
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    return Program(
        tuple(closed.jaxpr.invars), tuple(closed.jaxpr.eqns), tuple(closed.jaxpr.outvars), constants
    )


def _run_jaxpr(jaxpr, constants: Sequence, values: Sequence) -> list[jax.Array]:
    known = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, values, strict=True))
    for equation in jaxpr.eqns:
        body = _body_of_call(equation)
        if body is None:
            _run(equation, known)
            continue
        inner, inner_constants = body
        operands = [_value(v, known) for v in equation.invars]
        results = _run_jaxpr(inner, inner_constants, operands)
        known |= zip(equation.outvars, results, strict=True)
    return [_value(output, known) for output in jaxpr.outvars]


def _body_of_call(equation):
    if equation.primitive.name not in _CALLS:
        return None
    for name in ("jaxpr", "call_jaxpr"):
        body = equation.params.get(name)
        if body is not None:
            return (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())
    return None


def _run(equation, known: dict):
    operands = [_value(v, known) for v in equation.invars]
    if equation.primitive.name in ("pcast", "pvary"):
        # What has been in a buffer varies over all axes already.
        known[equation.outvars[0]] = vary(operands[0], equation.params["axes"])
        return
    params = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        results = equation.primitive.bind(*operands, **params)
    known |= zip(equation.outvars, results if equation.primitive.multiple_results else [results], strict=True)


def is_variable(atom) -> bool:
    """Whether an operand is a variable, not a literal."""
    return not isinstance(atom, Literal)


def _value(atom, known: dict) -> jax.Array:
    return known[atom] if is_variable(atom) else atom.val


def _bytes(variable: Var) -> int:
    return variable.aval.size * variable.aval.dtype.itemsize
