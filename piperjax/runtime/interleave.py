"""Two programs in one, so that the exchanges of each can run beside the products of the other.

Both are cut where rows leave for other devices and where they have arrived. For a layer, with F its forward for one
microbatch and B its backward for another, and exchanges in brackets:

    step   0               1                2                3                4                5
    B      sums, gates     [to experts]     experts          [to tokens]      attention
    F                      attention        [to experts]     experts          [to tokens]      sums

This is the order of DualPipe (DeepSeek-V3, arXiv:2412.19437, 3.2.1, figure 4). Between steps a barrier holds what both
have made and still need: without it a compiler is free to run everything of one before anything of the other, and a
scheduler for latency finds nothing to put beside the exchanges.
"""

from typing import Any

from jax import lax
from jax.extend.core import Var

from piperjax.runtime.program import Call, Program, is_variable

_EXCHANGES = frozenset(("all_to_all", "all_gather", "all_gather_invariant", "ppermute", "ragged_all_to_all"))
# What is long enough to run beside an exchange. `multiply` and `weight_gradient` are those of `grouped_matmul`.
_PRODUCTS = frozenset(("dot_general", "multiply", "weight_gradient", "scan", "while", "pallas_call"))


def parts(program: Program) -> list[list]:
    """The equations of a program in parts: computations, exchanges, computations, ..., computations.

    Everything is as early as it can be. Exchanges with no products between them are one part, with what else is between
    them. A program without exchanges is one part.
    """
    computations: list[list] = [[]]
    exchanges: list[list] = []
    for equation, level in zip(program.equations, _levels(program), strict=True):
        while len(exchanges) < level + _is_exchange(equation):
            exchanges.append([])
            computations.append([])
        (exchanges if _is_exchange(equation) else computations)[level].append(equation)
    found = [computations[0]]
    for sent, computed in zip(exchanges, computations[1:], strict=True):
        if len(found) > 1 and not _has_product(found[-1]):
            between = found.pop()
            found[-1] += between + sent
        else:
            found.append(sent)
        found.append(computed)
    return found


def _levels(program: Program) -> list[int]:
    """How many exchanges come before each equation: as few as can be, but for what is neither product nor exchange.

    That is next to what reads it. Elementwise work that a forward runs again would be done before the exchanges that
    its backward waits for, and everything that it makes for that backward would be held meanwhile.
    """
    depth: dict[Var, int] = {}
    levels = []
    for equation in program.equations:
        levels.append(max((depth.get(v, 0) for v in equation.invars if is_variable(v)), default=0))
        depth.update(dict.fromkeys(equation.outvars, levels[-1] + _is_exchange(equation)))
    varies = any(_axes(v) for equation in program.equations for v in equation.outvars)
    first_read: dict[Var, int] = {}
    for number in reversed(range(len(levels))):
        equation = program.equations[number]
        axes = {_axes(v) for v in (*equation.invars, *equation.outvars) if is_variable(v)}
        # Behind a barrier all values vary, so what does not stays where it is.
        may_wait = len(axes) == 1 and any(axes) == varies
        if may_wait and not _is_exchange(equation) and not _has_product([equation]):
            read = [first_read[v] for v in equation.outvars if v in first_read]
            levels[number] = max(levels[number], min(read, default=levels[number]))
        for v in equation.invars:
            if is_variable(v):
                first_read[v] = min(first_read.get(v, levels[number]), levels[number])
    return levels


def _axes(variable: Var) -> frozenset[str]:
    """Mesh axes over which it varies."""
    return variable.aval.manual_axis_type.varying


def _is_exchange(equation) -> bool:
    return equation.primitive.name in _EXCHANGES


def _has_product(equations: list) -> bool:
    return any(equation.primitive.name in _PRODUCTS for equation in equations)


def interleave(first: Call, second: Call) -> tuple[Any, Any]:
    """Results of both calls; exchanges of each are beside computations of the other.

    The first begins: its first computations run alone, as do the last of the second.
    """
    runs = [_Run(call) for call in (first, second)]
    # Part n of the second is beside part n + 1 of the first: an exchange and a computation, or the reverse.
    for step in range(max(len(runs[0].parts), len(runs[1].parts) + 1)):
        with first.named_scope():
            runs[0].run(step)
        with second.named_scope():
            runs[1].run(step - 1)
        waiting = runs[0].waiting(step + 1), runs[1].waiting(step)
        if all(waiting):
            held = [[run.known[v] for v in of] for run, of in zip(runs, waiting, strict=True)]
            for run, of, values in zip(runs, waiting, lax.optimization_barrier(held), strict=True):
                run.known.update(zip(of, values, strict=True))
    results = []
    for call, run in zip((first, second), runs, strict=True):
        with call.named_scope():
            results.append(call.finish(run.program.values_of(run.known)))
    return tuple(results)


class _Run:
    """A program under way: what is known, and what is left."""

    def __init__(self, call: Call):
        self.program, self.parts = call.program, parts(call.program)
        self.known = self.program.bound(*call.values)
        # Neither weights nor what was kept need to wait.
        self.at_hand = set(self.known) - {self.program.inputs[call.entry]}

    def run(self, number: int) -> None:
        """Runs a part, if there is one of that number."""
        if 0 <= number < len(self.parts):
            self.program.run(self.parts[number], self.known)

    def waiting(self, number: int) -> list[Var]:
        """What is to be held for the parts from a number on."""
        needed = {v for part in self.parts[number:] for e in part for v in e.invars if is_variable(v)}
        return [v for v in self.known if v in needed and v not in self.at_hand]
