"""How many rows a device may send to another, and where copies of tokens are placed."""

import numpy as np
import pytest

from piperjax.runtime.dispatch_copies import admit, place_rows, row_capacity
from piperjax.runtime.dispatcher import Sharing


def sharing(T, k, *, num_experts, num_devices, capacity_factor):
    return Sharing(
        axes=("local",), sizes=(num_devices,), num_experts=num_experts, experts_per_token=k, num_tokens=T,
        capacity_factor=capacity_factor,
    )  # fmt: skip


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
    assert row_capacity(sharing(10, 2, **options)) == capacity


def test_copies_are_placed_by_device_then_expert_then_token():
    ids = np.array([[3, 0], [1, 2], [0, 3]], np.int32)
    where, sizes = place_rows(ids, sharing(3, 2, num_experts=4, num_devices=2, capacity_factor=0.0))
    # Copies t k + j of device 0: expert 0 of tokens 0 and 2, expert 1 of token 1; device 1: expert 2, then 3.
    np.testing.assert_array_equal(sizes, [2, 1, 1, 2])
    np.testing.assert_array_equal(
        np.where(where.live, where.copies, -1), [1, 4, 2, -1, -1, -1, 3, 0, 5, -1, -1, -1]
    )
    np.testing.assert_array_equal(where.places, [[7, 0], [2, 6], [1, 8]])
    assert where.kept is None


def test_first_copies_for_a_device_find_room_and_absent_ones_take_none():
    # Two devices of two experts with room for two copies each; 4 is no expert.
    limited = sharing(3, 2, num_experts=4, num_devices=2, capacity_factor=0.5)
    ids = np.array([[0, 4], [1, 2], [0, 1]], np.int32)
    np.testing.assert_array_equal(admit(ids, limited), [[True, False], [True, True], [False, False]])
    alone = sharing(3, 2, num_experts=4, num_devices=1, capacity_factor=0.5)
    np.testing.assert_array_equal(admit(ids, alone), [[True, False], [True, True], [False, False]])
    assert admit(ids, sharing(3, 2, num_experts=4, num_devices=2, capacity_factor=2.0)) is None


def test_absent_copies_have_no_place():
    where, sizes = place_rows(
        np.array([[0, 4], [1, 2], [4, 4]], np.int32),
        sharing(3, 2, num_experts=4, num_devices=2, capacity_factor=0.5),
    )
    np.testing.assert_array_equal(sizes, [1, 1, 1, 0])
    np.testing.assert_array_equal(np.where(where.live, where.copies, -1), [0, 2, 3, -1])
    np.testing.assert_array_equal(where.kept, [[True, False], [True, True], [False, False]])
