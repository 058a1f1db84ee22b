"""Expert dispatch: rows travel to the devices that hold their experts, and results travel back.

Shapes are static and every permutation is a gather in both directions. This file chooses among the dispatchers;
what they do is in `dispatch_copies` and `dispatch_nodes`.
"""

import difflib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from piperjax.planner.dispatchers import check_overflow
from piperjax.runtime import dispatch_passes
from piperjax.runtime.dispatch_copies import COPIES
from piperjax.runtime.dispatch_nodes import ONCE_PER_NODE
from piperjax.runtime.dispatcher import Sharing
from piperjax.runtime.permute import take
from piperjax.runtime.varying import vary, vary_like

# (expert_ffn, x, expert_ids, gates, num_experts, placement=None) -> (y, overflow)
Experts = Callable[..., tuple[jax.Array, jax.Array]]

DISPATCHERS = {dispatcher.name: dispatcher for dispatcher in (*COPIES, *ONCE_PER_NODE)}


def make_experts(
    dispatch: str,
    axes: tuple[str, ...],
    capacity_factor: float,
    *,
    chunks: int = 1,
    overflow: str = "drop",
    splits: bool = False,
) -> Experts:
    """Returns the `experts` function of a layer context, which runs per device.

    It takes (expert_ffn, x [T, D], expert_ids [T, k] int32, gates [T, k], num_experts), where the k experts of a
    token are distinct, and returns (y [T, D], number of rows here that found no room as a float32 scalar). With
    `placement` [E] int32, expert e is the physical expert placement[e] (`piperjax.runtime.placement`).

    Args:
      dispatch: name of a dispatcher.
      axes: mesh axes whose devices share the experts, outermost first. Device p of P along them holds physical
        experts p E/P to (p + 1) E/P - 1.
      capacity_factor: rows that a device accepts from another at a time, over the balanced T k / P; 0 accepts all.
      chunks: parts in which the tokens travel, one after the other (`dispatch_chunks`).
      overflow: what becomes of rows that find no room: "drop" them, or let them travel in later "passes"
        (`dispatch_passes`).
      splits: whether gradients of weights are asked for apart from others; then later passes run once for each.

    Raises:
      ValueError: if there is no such dispatcher, or an argument makes no sense.
    """
    if dispatch not in DISPATCHERS:
        near = difflib.get_close_matches(dispatch, DISPATCHERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"no dispatcher named {dispatch!r}; there are {', '.join(DISPATCHERS)}; did you mean {near!r}?"
        )
    if not 0 <= capacity_factor < math.inf:
        raise ValueError(
            f"capacity_factor must be 0 (drop nothing) or a positive number, got {capacity_factor}"
        )
    if chunks < 1:
        raise ValueError(f"dispatch_chunks must be at least 1, got {chunks}")
    check_overflow(overflow, capacity_factor)

    def experts(expert_ffn, x, expert_ids, gates, num_experts, placement=None):
        expert_ids = expert_ids.astype(jnp.int32)
        if placement is not None:
            if placement.shape != (num_experts,):
                raise ValueError(
                    f"a placement must hold the {num_experts} experts of the model, got {list(placement.shape)}"
                )
            expert_ids = take(placement, expert_ids)
        if len(expert_ids) % chunks:
            raise ValueError(
                f"dispatch_chunks must divide the {len(expert_ids)} tokens of a microbatch on a device, got {chunks}"
            )
        sharing = Sharing(
            axes=axes,
            sizes=tuple(lax.axis_size(axis) for axis in axes),
            num_experts=num_experts,
            experts_per_token=expert_ids.shape[1],
            num_tokens=len(expert_ids) // chunks,
            capacity_factor=capacity_factor,
        )
        # Alike in their types, as the hand-written gradients of the permutations expect.
        tokens = tuple(vary(vary_like(array, x, expert_ids, gates), axes) for array in (x, expert_ids, gates))
        way = dispatch_passes.Way(DISPATCHERS[dispatch], sharing, chunks)
        if overflow == "drop":
            return dispatch_passes.run_dropping(way, expert_ffn, *tokens)
        return dispatch_passes.run_all(way, expert_ffn, *tokens, splits=splits)

    return experts
