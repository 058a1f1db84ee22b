"""This file is how many queries attention works on at once, which both the program and its price depend on."""

from functools import lru_cache

# Sequences up to this length are faster with all their weights at once.
LONGEST_WHOLE = 1024
LARGEST_BLOCK = 512
SMALLEST_BLOCK = 64


def query_block(seq_len: int) -> int:
    """Queries that are worked on together: all of a short sequence, else the largest divisor up to 512.

    A length without a divisor between 64 and 512 is taken whole.
    """
    if seq_len <= LONGEST_WHOLE:
        return seq_len
    return _largest_divisor(seq_len, SMALLEST_BLOCK, LARGEST_BLOCK)


@lru_cache(maxsize=1024)
def _largest_divisor(seq_len: int, smallest: int, largest: int) -> int:
    """Of those from the smallest to the largest; the length itself if there is none."""
    fits = [size for size in range(smallest, largest + 1) if seq_len % size == 0]
    return max(fits, default=seq_len)


def is_in_blocks(seq_len: int) -> bool:
    """Whether attention works on less than all queries at a time."""
    return query_block(seq_len) < seq_len
