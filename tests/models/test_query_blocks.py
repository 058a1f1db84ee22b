"""Tests of models/query_blocks.py."""

from models.query_blocks import LONGEST_WHOLE, is_in_blocks, query_block


def test_blocks_divide_long_sequences():
    assert query_block(128) == 128
    assert query_block(LONGEST_WHOLE) == LONGEST_WHOLE
    assert query_block(2048) == query_block(4096) == 512
    assert query_block(1536) == 512
    assert query_block(1538) == 1538, "no divisor from 64 to 512: taken whole"
    assert [is_in_blocks(length) for length in (LONGEST_WHOLE, 1536, 1538)] == [False, True, False]
