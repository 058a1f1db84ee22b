"""This file is the rows that a device has room for in one layer, by dispatcher: what memory and streams follow.

Static buffers hold the worst case, or what a capacity factor allows, for every chunk of tokens. T tokens of a device,
k of E experts for each, P devices on N nodes:

| | copies (flat, halo2, halo3) | rows once per node |
|---|---|---|
| rows for experts, grouped by expert | P C, C = T min(k, E/P) | P T min(k, E/P) |
| rows that arrive at a device | P C | P T |
| rows that arrive at a node's device of the same local index | - | N T |
| with capacity factor c, at a time | C = ceil(c T k/P) | P ceil(c T k/P), P ceil(c T d/P), N ceil(c T n/N) |

where n nodes and d devices hold the experts of a token on average.
"""

import math
from typing import NamedTuple

from models.config import MoEFFN
from piperjax.planner.dispatchers import named
from piperjax.planner.routing import expected_nodes


class Buffers(NamedTuple):
    """Rows of all chunks together.

    Attributes:
      experts: for experts, grouped by expert.
      arrived: as they arrive at a device.
      of_node: as they arrive at a node, if they are then spread inside; else 0.
      may_overflow: whether there can be more.
    """

    experts: int
    arrived: int
    of_node: int
    may_overflow: bool


def buffers(
    ffn: MoEFFN,
    tokens: int,
    *,
    expert: int = 1,
    nodes: int = 1,
    dispatch: str = "flat",
    chunks: int = 1,
    capacity_factor: float = 0.0,
) -> Buffers:
    """Rows for `tokens` of a device."""
    P, k, E = expert, ffn.experts_per_token, ffn.num_experts
    T = tokens / chunks

    def limited(most: float, balanced: float) -> int:
        return math.ceil(min(most, math.ceil(capacity_factor * balanced)) if capacity_factor else most)

    most = T * min(k, E // P)
    if not named(dispatch).deduplicates:
        rows = chunks * P * limited(most, T * k / P)
        return Buffers(rows, rows, 0, rows < chunks * P * most)
    of_device = limited(T, T * expected_nodes(E, k, P) / P)
    of_node = limited(T, T * expected_nodes(E, k, nodes) / nodes)
    of_token = min(k, E // P)
    copies = max(of_token, limited(of_device * of_token, T * k / P))
    return Buffers(chunks * P * copies, chunks * P * of_device, chunks * nodes * of_node, copies < most)
