"""How many rows a device may send to another, and where copies of tokens are placed."""

import numpy as np
import pytest

from piperjax.runtime.dispatch_copies import place_rows, row_capacity


@pytest.mark.parametrize(
    ("options", "capacity"),
    [
        (dict(num_experts=8, num_devices=1, capacity_factor=0.0), 20),
        (dict(num_experts=8, num_devices=4, capacity_factor=0.0), 20),
        (dict(num_experts=8, num_devices=8, capacity_factor=0.0), 10),  # one expert each: a token comes once
        (dict(num_experts=8, num_devices=4, capacity_factor=1.0), 5),
        (dict(num_experts=8, num_devices=8, capacity_factor=1.0), 3),  # 2.5 rounded up
        (dict(num_experts=8, num_devices=4, capacity_factor=9.0), 20),
    ],
)
def test_capacity_of_ten_tokens_and_two_experts_each(options, capacity):
    assert row_capacity(10, 2, **options) == capacity


def test_copies_are_placed_by_device_then_expert_then_token():
    ids = np.array([[3, 0], [1, 2], [0, 3]], np.int32)
    where, sizes = place_rows(ids, num_experts=4, num_devices=2, capacity_factor=0.0)
    # Copies t k + j of device 0: expert 0 of tokens 0 and 2, expert 1 of token 1; device 1: expert 2, then 3.
    np.testing.assert_array_equal(sizes, [2, 1, 1, 2])
    np.testing.assert_array_equal(
        np.where(where.live, where.copies, -1), [1, 4, 2, -1, -1, -1, 3, 0, 5, -1, -1, -1]
    )
    np.testing.assert_array_equal(where.places, [[7, 0], [2, 6], [1, 8]])
    assert where.kept is None
