"""Rows of buffers by hand, and those of the runtime."""

import pytest

from models.config import MoEFFN
from piperjax.planner.buffers import Buffers, buffers
from piperjax.planner.dispatchers import DISPATCHERS

FFN = MoEFFN(num_experts=8, experts_per_token=3, d_ff=1)


def test_rows_by_hand():
    assert buffers(FFN, 48) == Buffers(48 * 3, 48 * 3, 0, False)
    # Four devices with two experts each: a token sends at most two copies to one.
    assert buffers(FFN, 48, expert=4) == Buffers(4 * 96, 4 * 96, 0, False)
    assert buffers(FFN, 48, expert=4, capacity_factor=1.0) == Buffers(4 * 36, 4 * 36, 0, True)
    once = dict(expert=4, nodes=2, dispatch="halo2_dedup")
    assert buffers(FFN, 48, **once) == Buffers(4 * 96, 4 * 48, 2 * 48, False)
    # Of 8 experts on 2 nodes and 4 devices a token reaches 2 (1 - 4/56) and 4 (1 - 20/56): 44.6 and 30.9 tokens of 48.
    assert buffers(FFN, 48, capacity_factor=1.0, **once) == Buffers(4 * 36, 4 * 31, 2 * 45, True)


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_chunks_share_the_rows(dispatch):
    whole = buffers(FFN, 48, expert=4, nodes=2, dispatch=dispatch)
    assert buffers(FFN, 48, expert=4, nodes=2, dispatch=dispatch, chunks=4) == whole


def test_limits_are_those_of_the_runtime():
    limited = pytest.importorskip("piperjax.runtime.dispatch_nodes_limited")
    from piperjax.runtime.dispatcher import Sharing

    for factor in (0.5, 1.0, 1.25, 8.0):
        sharing = Sharing(
            axes=("node", "local"), sizes=(2, 2), num_experts=8, experts_per_token=3, num_tokens=48,
            capacity_factor=factor,
        )  # fmt: skip
        found, limits = (
            buffers(FFN, 48, expert=4, nodes=2, dispatch="halo2_dedup", capacity_factor=factor),
            limited.limits(sharing),
        )
        assert (found.experts, found.arrived, found.of_node) == (
            4 * limits.copies,
            4 * limits.device,
            2 * limits.node,
        )
