"""This file is how far tokens spread: the number of nodes or devices that hold the experts of one token."""

from functools import lru_cache
from math import ceil, comb


@lru_cache(maxsize=4096)
def expected_nodes(
    num_experts: int, experts_per_token: int, groups: int, *, limit: int | None = None
) -> float:
    """Expected number of groups (nodes, or devices) that hold the experts of one token under uniform routing.

    Without a limit it is `R (1 - C(E - E/R, k) / C(E, k))` for E experts in R equal groups: the probability that a
    group is missed, times the groups. It gives the 75.1 % and 54.8 % of redundant copies that X-MoE publishes for
    E = 256, k = 8 on 2 and 4 nodes.

    With a limit, routing first chooses the `limit` groups whose two best experts score most in sum, as DeepSeek-V3
    does, and then the k best experts among theirs. The value is `E[min(limit, D)]`, where D is the number of groups
    without a limit: a token that would have reached more groups reaches the limit, as each chosen group is chosen for
    an expert that is among the best. Sampling gives up to 0.5 % less for the models that limit (k >= 2 limit), and up
    to 4 % less elsewhere; how much depends on the distribution of scores.

    Raises:
      ValueError: if there is no such routing.
    """
    _check_routing(num_experts, experts_per_token, groups, limit)
    inside = num_experts // groups
    choices = comb(num_experts, experts_per_token)
    if limit is None or limit >= groups:
        return groups * (1 - comb(num_experts - inside, experts_per_token) / choices)
    return (
        sum(
            min(limit, reached) * _ways_to_reach(reached, inside, experts_per_token) * comb(groups, reached)
            for reached in range(1, min(groups, experts_per_token) + 1)
        )
        / choices
    )


def reached_nodes(
    num_experts: int,
    experts_per_token: int,
    num_nodes: int,
    *,
    num_groups: int = 1,
    groups_per_token: int = 1,
) -> float:
    """Expected number of nodes (or devices) that hold the experts of one token whose router has groups of experts.

    Groups that are not nodes: several on a node are chosen as if at random, which gives
    `expected_nodes(num_groups, groups_per_token, num_nodes)`; of one on several nodes, a token takes k over the chosen
    groups, rounded up, as if at random. Sampling gives up to 0.5 % less with as many groups as nodes, and up to 6 %
    less with fewer. Groups that do not line up with nodes limit nothing here.
    """
    limits = groups_per_token < num_groups
    if limits and num_nodes == num_groups:
        return expected_nodes(num_experts, experts_per_token, num_nodes, limit=groups_per_token)
    if limits and num_groups % num_nodes == 0:
        return expected_nodes(num_groups, groups_per_token, num_nodes)
    if limits and num_nodes % num_groups == 0:
        each = ceil(experts_per_token / groups_per_token)
        inside = expected_nodes(num_experts // num_groups, each, num_nodes // num_groups)
        return min(experts_per_token, groups_per_token * inside)
    return expected_nodes(num_experts, experts_per_token, num_nodes)


def _ways_to_reach(groups: int, inside: int, experts_per_token: int) -> int:
    """Ways to choose experts that lie in all of these groups: inclusion and exclusion over the groups left out."""
    return sum(
        (-1) ** left_out * comb(groups, left_out) * comb((groups - left_out) * inside, experts_per_token)
        for left_out in range(groups)
    )


def _check_routing(num_experts: int, experts_per_token: int, groups: int, limit: int | None) -> None:
    if groups < 1 or num_experts < 1 or num_experts % groups:
        raise ValueError(
            f"experts must divide evenly over the groups, got {num_experts} experts in {groups} groups; "
            "choose a number of groups that divides them"
        )
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(
            f"a token takes between 1 and all {num_experts} experts, got experts_per_token = {experts_per_token}"
        )
    if limit is not None and (limit < 1 or limit * (num_experts // groups) < experts_per_token):
        raise ValueError(
            f"a token's {experts_per_token} experts must fit in the groups it is limited to, got {limit} groups of "
            f"{num_experts // groups} experts; allow more groups"
        )
