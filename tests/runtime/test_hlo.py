"""Reading compiled programs: loops counted in full, groups in every notation, bytes that are sent."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from piperjax.runtime import hlo

LOOPED = """
HloModule drawn

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[8,8]{1,0} constant({...})
  %y = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[4,8]{1,0} all-reduce(%y), replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %t = (s32[], f32[4,8]) tuple(%i, %z)
}

%on (q: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0} parameter(0)
  %v = f32[8,8]{1,0} constant({...})
  ROOT %d = f32[4,8]{1,0} dot(%q, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="a/on"}
}

%off (r: f32[4,8]) -> f32[4,8] {
  ROOT %r = f32[4,8]{1,0} parameter(0)
}

ENTRY %main (a: (s32[], f32[4,8]), b: pred[]) -> f32[4,8] {
  %a = (s32[], f32[4,8]) parameter(0)
  %b = pred[] parameter(1)
  %loop = (s32[], f32[4,8]) while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %r = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %k = f32[4,8]{1,0} conditional(%b, %r, %r), true_computation=%on, false_computation=%off
}
"""


def test_turns_and_branches_are_counted():
    module = hlo.parse(LOOPED)
    product = 2 * 4 * 8 * 8

    def weigh(conditional):
        assert conditional == hlo.Conditional(0, ("", "a/on"))
        return [0.75, 0.25]

    visits = list(module.visits(weigh))
    assert sum(map(module.product_flop, visits)) == 5 * product + 0.25 * product
    ((reduction, times),) = [
        (visit.instruction, visit.times) for visit in visits if visit.instruction.operation == "all-reduce"
    ]
    assert times == 5
    assert hlo.first_group(reduction) == (0, 2)
    assert hlo.sent_bytes(reduction, 2) == 4 * 8 * 4  # Half of it twice.


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,1},{2,3}}", (0, 1)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['node'=4,'local'=2] {'node'}", (0, 2, 4, 6)),
        ("source_target_pairs={{0,2},{2,0}}", (0, 2)),
    ],
)
def test_groups_are_read_in_every_notation(text, group):
    assert hlo.first_group(hlo.Instruction("x", "f32[4]", "all-reduce", f"%y), {text}")) == group


def test_axes_are_those_along_which_a_group_differs():
    sizes = {"pipe": 2, "data": 2, "expert": 2}
    assert hlo.axes_of((0, 1), sizes) == ("expert",)
    assert hlo.axes_of((0, 1, 2, 3), sizes) == ("data", "expert")
    assert hlo.axes_of((0, 4), sizes) == ("pipe",)


def test_a_compiled_loop_counts_every_turn():
    def turn(x, _):
        return x @ jnp.ones((16, 16)), None

    compiled = jax.jit(lambda x: lax.scan(turn, x, length=7)[0]).lower(jnp.ones((8, 16))).compile()
    module = hlo.parse(compiled.as_text())
    assert sum(map(module.product_flop, module.visits())) == 7 * 2 * 8 * 16 * 16


def test_a_loop_of_unknown_turns_counts_as_often_as_its_scope_says():
    def run(x, turns):
        with jax.named_scope("layers_moe"):
            return lax.fori_loop(0, turns, lambda _, x: x @ jnp.ones((16, 16)), x)

    compiled = jax.jit(run).lower(jnp.ones((8, 16)), jax.ShapeDtypeStruct((), "int32")).compile()
    module = hlo.parse(compiled.as_text())

    def turns(scope):
        assert scope.endswith("/layers_moe/while")
        return 2.5

    visits = module.visits(unknown_turns=turns)
    assert sum(map(module.product_flop, visits)) == 2.5 * 2 * 8 * 16 * 16
