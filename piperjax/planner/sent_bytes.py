"""This file is the bytes that expert dispatch moves in a step, by how far they go: a closed form of the plan."""

from collections.abc import Mapping

from models.config import ModelConfig, MoEFFN
from piperjax.planner.collectives import handed_fraction
from piperjax.planner.dispatchers import named
from piperjax.planner.kept import Share, message_bytes
from piperjax.planner.plan import Plan

# Outermost last: the device itself, others of its node, other nodes of its group, other groups.
LEVELS = ("self", "local", "node", "group")
# How often rows go to their experts in a forward, and again in the recomputation of a backward; and how often results
# return: a backward does not need them.
TIMES_THERE, TIMES_BACK = {"stage": 3, "layer": 2}, {"stage": 2}


def dispatch_bytes(model: ModelConfig, plan: Plan, *, dtype: str = "bfloat16") -> Mapping[str, float]:
    """Bytes of rows that a device sends in a step to itself and over each level, on average over pipe ranks.

    Of the rows that an exchange of P devices moves, those on N nodes of L devices: a flat one sends each to its device;
    hierarchical ones send all of them inside of the node and all between nodes, halo3 inside twice; once per node, rows
    between nodes are those that arrive at a node, and those inside what arrives at a device, and with halo3 those of a
    node twice more. Levels of nothing are left out. Counts of rows, a few bytes per expert, are not counted.
    """
    share, sent = Share.of(plan, dtype), dict.fromkeys(LEVELS, 0.0)
    if plan.expert == 1:
        return {}
    for layer, mode in zip(model.layers, plan.layer_modes, strict=True):
        if isinstance(layer.ffn, MoEFFN):
            for level, num_bytes in _layer_bytes(model.d_model, layer.ffn, plan, mode, share).items():
                sent[level] += plan.num_microbatches / plan.pipe * num_bytes
    return {level: num_bytes for level, num_bytes in sent.items() if num_bytes}


def _layer_bytes(D: int, ffn: MoEFFN, plan: Plan, memory_mode: str, share: Share) -> dict[str, float]:
    """Bytes of all passes of one layer and microbatch."""
    way, rows = named(plan.dispatch), share.buffers(ffn)
    sent, returned = (times.get(memory_mode, 1) for times in (TIMES_THERE, TIMES_BACK))
    row, there, back = (D * share.itemsize,) * 3
    if way.deduplicates:
        there, back = (message_bytes(D, ffn, share, ids=ids) for ids in (True, False))
    # Results return as rows. Backward sends their gradients there, and those of rows and gates back.
    each = sent * there + returned * row + row + back
    group, node, local = plan.expert_factors
    # In one node, or with one device in each, the phases of copies are a flat exchange.
    if way.algorithm == "flat" or (not way.deduplicates and min(group * node, local) == 1):
        return _spread(plan.expert_factors, each * rows.experts, "all")
    between = each * (rows.of_node if way.deduplicates else rows.experts)
    inside = each * rows.arrived
    if way.algorithm == "halo3" and min(group * node, local) > 1:  # To leaders and from them.
        handed = 2 * handed_fraction(group * node, local) * between
        inside = inside + handed if way.deduplicates else handed
    found = _spread(plan.expert_factors, between, "between")
    for level, num_bytes in _spread(plan.expert_factors, inside, "inside").items():
        found[level] += num_bytes
    return found


def _spread(factors: tuple[int, int, int], num_bytes: float, where: str) -> dict[str, float]:
    """Equal parts to all devices, to those of the node, or to those of the same index in all nodes; by level."""
    group, node, local = factors
    if where == "inside":
        group = node = 1
    elif where == "between":
        local = 1
    part = num_bytes / (group * node * local)
    return {
        "self": part,
        "local": (local - 1) * part,
        "node": (node - 1) * local * part,
        "group": (group - 1) * node * local * part,
    }
