"""Routing: how many nodes a token reaches, against published values and sampling."""

import numpy as np
import pytest

from piperjax.planner.routing import expected_nodes, reached_nodes


def test_by_hand():
    # Two experts in two groups, one each: a token takes both, or one.
    assert expected_nodes(2, 2, 2) == 2
    assert expected_nodes(2, 1, 2) == 1
    # Four experts in two groups, two per token: the second is beside the first in one case of three.
    assert expected_nodes(4, 2, 2) == pytest.approx(5 / 3)
    assert expected_nodes(8, 3, 1) == 1
    assert expected_nodes(6, 6, 3) == pytest.approx(3)


def test_published_redundancy():
    # X-MoE (arXiv 2508.13337): copies that de-duplication saves for 256 experts, 8 per token.
    assert 1 - expected_nodes(256, 8, 4) / 8 == pytest.approx(0.548, abs=0.0005)
    assert 1 - expected_nodes(256, 8, 2) / 8 == pytest.approx(0.751, abs=0.0005)


# Copies per token that leave its node, sampled elsewhere with 20,000 tokens.
@pytest.mark.parametrize(
    ("experts", "per_token", "nodes", "limit", "remote"),
    [
        (64, 6, 2, None, 0.99),
        (64, 6, 4, None, 2.51),
        (64, 6, 8, None, 3.97),
        (64, 6, 16, None, 4.98),
        (64, 6, 8, 4, 3.34),
        (64, 6, 16, 4, 3.69),
        (256, 8, 8, 4, 7 / 2.02),
        (256, 8, 16, 4, 7.5 / 2.00),
    ],
)
def test_sampled_copies_off_node(experts, per_token, nodes, limit, remote):
    found = expected_nodes(experts, per_token, nodes, limit=limit) * (nodes - 1) / nodes
    assert found == pytest.approx(remote, rel=0.01 if limit is None else 0.025)


@pytest.mark.parametrize(("experts", "per_token", "nodes", "limit", "tolerance"), [
    (160, 6, 8, 3, 0.005),  # DeepSeek-V2
    (256, 8, 8, 4, 0.005),  # DeepSeek-V3
    (256, 8, 4, 3, 0.005),
    (256, 8, 8, 2, 0.005),
    (64, 6, 8, 4, 0.02),
    (128, 8, 16, 8, 0.04),
    (64, 4, 8, 4, 0.04),
    (256, 8, 8, None, 0.005),
])  # fmt: skip
def test_against_sampling(experts, per_token, nodes, limit, tolerance):
    found = expected_nodes(experts, per_token, nodes, limit=limit)
    assert found == pytest.approx(sampled_nodes(experts, per_token, nodes, limit or nodes), rel=tolerance)


def sampled_nodes(experts, per_token, nodes, limit, tokens=8_000):
    """Nodes per token, where routing chooses `limit` nodes by their two best experts, then the best experts in them."""
    scores = np.random.default_rng(0).standard_normal((tokens, experts))
    inside = experts // nodes
    best = np.sort(scores.reshape(tokens, nodes, inside), -1)[..., -2:].sum(-1)
    allowed = np.zeros((tokens, nodes), bool)
    np.put_along_axis(allowed, np.argsort(-best, 1)[:, :limit], True, 1)
    scores = np.where(np.repeat(allowed, inside, 1), scores, -np.inf)
    chosen = np.argpartition(-scores, per_token - 1, 1)[:, :per_token] // inside
    reached = np.zeros((tokens, nodes), bool)
    np.put_along_axis(reached, chosen, True, 1)
    return reached.sum(1).mean()


@pytest.mark.parametrize(("nodes", "error"), [(2, 0.01), (4, 0.01), (8, 0.01), (16, 0.06), (32, 0.06)])
def test_groups_that_are_not_nodes(nodes, error):
    scores = np.random.default_rng(0).random((4000, 8, 32))
    best = np.sort(scores, -1)[..., -2:].sum(-1)
    np.put_along_axis(scores, np.argsort(best, 1)[:, :4, None], -1, 1)  # The four worst of eight groups.
    chosen = np.argsort(-scores.reshape(4000, 256), 1)[:, :8] // (256 // nodes)
    sampled = np.mean([len(set(row)) for row in chosen])
    found = reached_nodes(256, 8, nodes, num_groups=8, groups_per_token=4)
    assert (1 - error / 4) * sampled <= found <= (1 + error) * sampled


def test_groups_that_do_not_line_up_limit_nothing():
    assert reached_nodes(192, 6, 3, num_groups=8, groups_per_token=2) == expected_nodes(192, 6, 3)
    assert reached_nodes(64, 6, 4, num_groups=4, groups_per_token=4) == expected_nodes(64, 6, 4)
    assert reached_nodes(64, 6, 4, num_groups=4, groups_per_token=2) == expected_nodes(64, 6, 4, limit=2)


def test_laws():
    for limit in (1, 2, 3, 4):
        found = expected_nodes(64, 6, 8, limit=limit)
        assert expected_nodes(64, 6, 8, limit=limit + 1) >= found
        assert 1 <= found <= limit
    unlimited = expected_nodes(64, 6, 8)
    assert expected_nodes(64, 6, 8, limit=8) == unlimited
    # Seven of eight groups bind almost never with six experts: the sum over reached groups is the short formula.
    assert expected_nodes(64, 6, 8, limit=7) == pytest.approx(unlimited, rel=1e-12)
    reached = [expected_nodes(64, 6, groups) for groups in (1, 2, 4, 8, 16, 32, 64)]
    assert reached == sorted(reached) and reached[-1] == pytest.approx(6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 2, 3), "experts must divide evenly over the groups, got 8 experts in 3 groups"),
        ((8, 9, 2), "between 1 and all 8 experts, got experts_per_token = 9"),
        (
            (8, 4, 8, 2),
            "must fit in the groups it is limited to, got 2 groups of 1 experts; allow more groups",
        ),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words):
    limit = arguments[3] if len(arguments) == 4 else None
    with pytest.raises(ValueError, match=words):
        expected_nodes(*arguments[:3], limit=limit)
