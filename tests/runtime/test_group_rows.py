"""Groups and bins equal those that a loop over rows fills."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piperjax.runtime.group_rows import fill_bins, group_by_expert


@pytest.mark.parametrize(("k", "G", "first"), [(2, 4, 4), (4, 2, 6), (3, 8, 0), (1, 1, 7), (8, 8, 0)])
def test_groups_hold_the_rows_that_name_them(k, G, first):
    E, M = 8, 11
    rng = np.random.default_rng(k * G)
    ids = np.stack([rng.permutation(E + 1)[:k] for _ in range(M)]).astype(np.int16)  # E is nobody
    gates = rng.normal(size=(M, k)).astype(np.float32)
    places = M * min(k, G)
    grouped = jax.jit(group_by_expert, static_argnames=("first", "num_groups", "num_places"))(
        ids, gates, first=first, num_groups=G, num_places=places
    )
    expected = [
        (row, gates[row, ids[row] == first + g].item())
        for g in range(G)
        for row in range(M)
        if first + g in ids[row]
    ]
    where, slots = grouped.where, min(k, G)
    np.testing.assert_array_equal(grouped.sizes, [(ids == first + g).sum() for g in range(G)])
    np.testing.assert_array_equal(where.live, np.arange(places) < len(expected))
    copies = np.asarray(where.copies)[: len(expected)]
    np.testing.assert_array_equal(copies // slots, [row for row, _ in expected])
    np.testing.assert_array_equal(np.asarray(grouped.gates).reshape(-1)[copies], [g for _, g in expected])
    # From the other end: the kept slots are those copies, at their places.
    kept, place = np.asarray(where.kept).reshape(-1), np.asarray(where.places).reshape(-1)
    assert set(np.flatnonzero(kept)) == set(copies)
    np.testing.assert_array_equal(place[copies], np.arange(len(expected)))
    assert not np.asarray(grouped.gates).reshape(-1)[~kept].any()


def test_bins_hold_rows_in_order():
    mask = jnp.asarray([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], bool)
    bins = fill_bins(mask, 3)
    np.testing.assert_array_equal(bins.live, [[1, 1, 1], [0, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(np.where(bins.live, bins.member, -1), [[0, 2, 3], [-1] * 3, [1, 3, -1]])
    np.testing.assert_array_equal(np.where(mask, bins.place, -1), [[0, -1, 1, 2], [-1] * 4, [-1, 6, -1, 7]])
