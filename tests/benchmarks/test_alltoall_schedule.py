"""Order of launch, read from the text of a schedule."""

from benchmarks.alltoall_schedule import beside, events, our_flags
from piperjax.runtime.hlo import parse

SCHEDULE = """HloModule m, is_scheduled=true

ENTRY %main (x: bf16[2048,2048]) -> bf16[2048,2048] {
  %x = bf16[2048,2048] parameter(0)
  %ids = s32[64] parameter(1)
  %few = (s32[64], s32[256]) all-gather-start(%ids), replica_groups={{0,8,16,24}}, dimensions={0}
  %few.done = s32[256] all-gather-done(%few)
  %out = (bf16[2048,2048], bf16[8192,2048]) all-gather-start(%x), replica_groups={{0,8,16,24}}, dimensions={0}
  %in = (bf16[2048,2048], bf16[2048,2048]) all-to-all-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %in.done = bf16[2048,2048] all-to-all-done(%in)
  %one = bf16[2048,2048] custom-call(%in.done), custom_call_target="__gpu$xla.gpu.triton"
  %out.done = bf16[8192,2048] all-gather-done(%out)
  %two = bf16[2048,2048] fusion(%one), kind=kCustom, calls=%c, backend_config={"kind":"__triton_gemm"}
  ROOT %sum = bf16[2048,2048] add(%one, %two)
}
"""


def test_exchanges_and_products_in_order_of_launch():
    module = parse(SCHEDULE)
    found = events(module.computations[module.entry])
    assert found == ["N+", "L!", "G", "N-", "G"]
    assert beside(found) == (1, 2)


def test_products_are_not_beside_an_exchange_inside_a_node_or_one_that_blocks():
    assert beside(["N!", "L+", "G", "L-", "N+", "N+", "N-", "G", "N-", "G"]) == (1, 3)


def test_flags_are_those_of_a_step():
    assert our_flags()["xla_gpu_experimental_parallel_collective_overlap_limit"] == "4"
