"""This file is the blocks in which experts multiply rows where no kernel groups them (`runtime/grouped_matmul.py`).

A group is a whole number of blocks: its last one is half empty on average, as routers do not count in blocks. With 64
rows for every expert and blocks of 32 that is a quarter more work than the rows have.
"""

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128


def block_rows(num_rows: int, num_groups: int) -> int:
    """Rows per step of the loop: half an even share of a group, a power of two in [16, 128], at most all rows.

    A step costs a few microseconds, and a group wastes half a block on average. Measured on two cores, 64 is
    within 5 % of the best at 128 rows per group, and 64, 128 and 256 are equal at 512.
    """
    block = SMALLEST_BLOCK
    while block < LARGEST_BLOCK and 4 * block <= num_rows // num_groups:
        block *= 2
    return min(block, num_rows)


def wasted_rows(num_rows: int, num_groups: int) -> float:
    """Rows that are multiplied for a group beside its own, on average, in a buffer of `num_rows` for all groups."""
    return block_rows(num_rows, num_groups) / 2
