"""Tests of piperjax/planner/row_blocks.py: what random groups waste in blocks."""

import numpy as np
import pytest

from piperjax.planner.row_blocks import block_rows, wasted_rows


@pytest.mark.parametrize(
    ("rows", "groups", "block"),
    [
        (1024, 8, 64),
        (16384, 32, 128),
        (4096, 256, 16),
        (128, 8, 16),
        (512, 8, 32),
        (10**6, 1, 128),
        (7, 2, 7),
        (1, 1, 1),
    ],
)
def test_a_block_is_half_a_share_within_limits(rows, groups, block):
    assert block_rows(rows, groups) == block


@pytest.mark.parametrize(("tokens", "experts"), [(512, 8), (4096, 8), (2048, 4)])
def test_random_groups_waste_half_a_block(tokens, experts):
    """Rows that draw their experts fill so many blocks more than rows that are divided evenly."""
    block = block_rows(tokens, experts)
    sizes = np.random.default_rng(0).multinomial(tokens, [1 / experts] * experts, size=2000)
    multiplied = block * -(-sizes // block)
    assert (multiplied - sizes).mean() == pytest.approx(wasted_rows(tokens, experts), rel=0.1)
