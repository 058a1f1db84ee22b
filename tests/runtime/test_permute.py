"""Gathers and their gradients equal plain indexing and its gradients, without a scatter."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.moe import weigh
from piperjax.runtime import permute
from piperjax.runtime.permute import Exchange, Places


@pytest.mark.parametrize(("N", "G"), [(1, 1), (2, 1), (7, 3), (64, 8), (1000, 16)])
def test_order_by_group_is_a_stable_sort(N, G):
    groups = (
        np.random.default_rng(N).integers(0, G + 1, N).astype(np.int32)
    )  # G itself: rows that belong nowhere
    order = jax.jit(permute.order_by_group, static_argnums=1)(groups, G)
    row = np.argsort(groups, kind="stable")
    np.testing.assert_array_equal(order.row, row)
    np.testing.assert_array_equal(order.place, np.argsort(row))
    np.testing.assert_array_equal(order.bounds, np.searchsorted(groups[row], np.arange(G + 1)))
    assert {array.dtype for array in order} == {jnp.dtype("int32")}


def test_too_many_rows_for_one_key_are_refused():
    with pytest.raises(
        ValueError, match="got 1048576 rows on one device for 4096 groups; use more microbatches"
    ):
        jax.eval_shape(functools.partial(permute.order_by_group, num_groups=4096), np.zeros(2**20, np.int32))


@pytest.mark.parametrize("search", [permute._search_in_a_loop, permute._search_unrolled])
@pytest.mark.parametrize("N", [1, 2, 3, 8, 9, 100])
def test_count_below_is_searchsorted(search, N):
    rng = np.random.default_rng(N)
    ordered = np.sort(rng.integers(0, N, N).astype(np.int32))
    queries = np.arange(-2, N + 3, dtype=np.int32)
    np.testing.assert_array_equal(jax.jit(search)(ordered, queries), np.searchsorted(ordered, queries))


def places_of(T, k, R, *, dropped, rng):
    """Some of the T k copies at random places among R, the other places dead."""
    copies = rng.permutation(T * k)[dropped:]
    taken = rng.permutation(R)[: len(copies)]
    at, live = np.zeros(R, np.int32), np.zeros(R, bool)
    places, kept = np.zeros(T * k, np.int32), np.zeros(T * k, bool)
    at[taken], live[taken] = copies, True
    places[copies], kept[copies] = taken, True
    where = Places(
        at, None if live.all() else live, places.reshape(T, k), kept.reshape(T, k) if dropped else None
    )
    return jax.tree.map(jnp.asarray, where)


def weigh_first(rows, gates, where):
    """What experts that are given gates do, and the sum of what they return."""
    return permute.collect_rows(weigh(rows, permute.spread_gates(gates, where)), where)


@pytest.mark.parametrize(("R", "dropped"), [(24, 0), (40, 0), (40, 5), (19, 5)])
def test_spread_and_combine_equal_indexing(R, dropped):
    T, k, D = 8, 3, 5
    rng = np.random.default_rng(R + dropped)
    where = places_of(T, k, R, dropped=dropped, rng=rng)
    live = np.ones(R, bool) if where.live is None else where.live
    kept = np.ones((T, k), bool) if where.kept is None else where.kept
    shapes = ((T, D), (R, D), (T, D), (T, k))
    x, scale, out, gates = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def loss(x, gates, scale, spread, combine):
        rows = jnp.tanh(spread(x) * scale)
        return (combine(rows, gates) * out).sum()

    def plain_combine(rows, gates):
        return ((gates * kept)[..., None] * rows[where.places]).sum(1)

    plain = jax.grad(loss, (0, 1, 2))(x, gates, scale, lambda x: x[where.copies // k], plain_combine)
    ours = jax.grad(loss, (0, 1, 2))(
        x,
        gates,
        scale,
        lambda x: permute.spread_rows(x, where),
        lambda r, g: weigh_first(r, g, where),
    )
    for found, wanted in zip(ours, plain, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(permute.spread_rows(x, where)[live], x[where.copies // k][live])


def test_moving_there_and_back_is_the_identity_on_live_rows():
    R, D, n = 12, 4, 7
    rng = np.random.default_rng(0)
    first, second = rng.permutation(R)[:n], rng.permutation(R)[:n]
    source, target = np.zeros(R, np.int32), np.zeros(R, np.int32)
    live_source, live_target = np.zeros(R, bool), np.zeros(R, bool)
    source[second], target[first] = first, second
    live_source[first], live_target[second] = True, True
    exchange = Exchange(*map(jnp.asarray, (source, target, live_source, live_target)))
    x = jnp.asarray(rng.normal(size=(R, D)), jnp.float32)

    def there_and_back(x):
        return permute.move_rows(permute.move_rows(x, exchange), exchange.reversed())

    y, vjp = jax.vjp(there_and_back, x)
    np.testing.assert_array_equal(y[first], x[first])
    (dx,) = vjp(jnp.ones_like(x))
    np.testing.assert_array_equal(dx, np.where(live_source[:, None], np.ones_like(x), 0))


def test_a_fill_shows_in_dead_places_only(monkeypatch):
    where = places_of(8, 3, 40, dropped=0, rng=np.random.default_rng(0))
    monkeypatch.setattr(permute, "DEAD_FILL", np.nan)
    rows = permute.spread_rows(jnp.ones((8, 2)), where)
    np.testing.assert_array_equal(np.isnan(rows).all(1), ~where.live)
    np.testing.assert_array_equal(np.isnan(rows).any(1), ~where.live)


def test_gradients_compile_without_a_scatter():
    where = places_of(8, 3, 40, dropped=5, rng=np.random.default_rng(0))

    def loss(x, gates, where):
        return weigh_first(jnp.tanh(permute.spread_rows(x, where)), gates, where).sum()

    text = (
        jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((8, 4)), jnp.ones((8, 3)), where).compile().as_text()
    )
    assert re.search(r"\bgather\(", text)
    assert not re.search(r"\bscatter\(", text)
