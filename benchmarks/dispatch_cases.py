"""What the tests of expert dispatch share: tokens, routings, and the truth, the sum over all experts by dense gates.

On simulated devices, inside shard_map with check_vma=True. Each device has tokens of its own.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from meshes.axes import BATCH, EXPERT
from meshes.mesh import build_mesh
from models.moe import weigh
from piperjax.runtime import permute
from piperjax.runtime.varying import vary

D = 8
FACTORS = {1: (1, 1, 1), 2: (1, 1, 2), 4: (1, 2, 2), 8: (2, 2, 2)}
ROUTINGS = ("random", "zipf", "all to one expert", "an expert with none", "one node only")


def route(rng, routing, num_tokens, E, k):
    """Distinct experts for every token, [num_tokens, k]."""
    if routing == "all to one expert":
        return np.tile((5 + np.arange(k)) % E, (num_tokens, 1)).astype(np.int32)
    weights = 1.0 / np.arange(1, E + 1) ** 1.5 if routing == "zipf" else np.ones(E)
    if routing == "an expert with none":
        weights[3] = 0.0
    if routing == "one node only":
        weights[E // 2 :] = 0.0
    # The k largest of Gumbel-perturbed log weights are k draws without replacement.
    with np.errstate(divide="ignore"):
        scores = np.log(weights) - np.log(-np.log(rng.uniform(size=(num_tokens, E))))
    return np.argsort(-scores, axis=1)[:, :k].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens, gates, weights of the experts, and weights of the loss, for T tokens on each of P devices."""

    P: int
    E: int
    k: int
    T: int = 12
    dtype: str = "float32"
    data: int = 1
    factors: tuple[int, int, int] | None = None

    def arrays(self, rng):
        tokens = self.T * self.P * self.data
        shapes = {"x": (tokens, D), "gates": (tokens, self.k), "w": (self.E, D, D), "out": (tokens, D)}
        return {name: rng.normal(size=shape).astype(self.dtype) for name, shape in shapes.items()}

    def mesh(self):
        devices = jax.devices()[: self.P * self.data]
        factors = self.factors or FACTORS[self.P]
        return build_mesh(pipe=1, data=self.data, expert_factors=factors, devices=devices)

    def function(self, experts, multiply):
        """(x, gates, w, ids) -> (y, dropped rows of every device)."""
        spec = jax.P(BATCH)

        def per_device(x, gates, w, ids):
            w = vary(w, BATCH)

            def expert_ffn(rows, sizes, gates):
                return weigh(jnp.tanh(multiply(rows, w, sizes)), gates)

            y, dropped = experts(expert_ffn, x, ids, gates, self.E)
            return y, dropped[None]

        return jax.shard_map(
            per_device, mesh=self.mesh(), in_specs=(spec, spec, jax.P(EXPERT), spec), out_specs=(spec, spec)
        )

    def compiled(self, experts, multiply):
        """(x, gates, w, out, ids) -> ((y, dropped), gradients of sum(out * y) by x, gates and w)."""
        function = self.function(experts, multiply)

        def loss(x, gates, w, out, ids):
            y, dropped = function(x, gates, w, ids)
            return jnp.sum(out * y), (y, dropped)

        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

        def run(arrays, ids):
            (_, aux), grads = gradient(arrays["x"], arrays["gates"], arrays["w"], arrays["out"], ids)
            return aux, grads

        return run


def masked_multiply(rows, w, sizes):
    """Every row times the matrix of its group, dead rows zero and unread: plain, and quick to compile."""
    row = jax.lax.iota(jnp.int32, rows.shape[0])
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    y = jnp.zeros((rows.shape[0], w.shape[2]), rows.dtype)
    for g in range(w.shape[0]):
        mine = ((row >= ends[g] - sizes[g]) & (row < ends[g]))[:, None]
        y = y + jnp.where(mine, jnp.matmul(jnp.where(mine, rows, 0), w[g], precision="highest"), 0)
    return y


@functools.cache
def dense():
    """The truth: all experts on all tokens, weighted by gates that are zero where a slot was dropped."""

    def loss(x, gates, w, out, ids, kept):
        hidden = jnp.tanh(jnp.einsum("td,edf->tef", x, w, precision="highest"))
        chosen = jax.nn.one_hot(ids, w.shape[0], dtype=x.dtype)
        y = jnp.einsum("tk,tke,tef->tf", gates * kept, chosen, hidden, precision="highest")
        return jnp.sum(out * y), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def truth(arrays, ids, kept=None):
    """Results and gradients, dense."""
    kept = np.ones(ids.shape, bool) if kept is None else kept
    (_, y), grads = dense()(arrays["x"], arrays["gates"], arrays["w"], arrays["out"], ids, kept)
    return y, grads


def assert_close(found, expected, relative):
    """Within a fraction of the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max() + 1e-30


def check(case, run, rng, *, forward=1e-6, backward=1e-5, kept_of=None, overflow="drop", routings=ROUTINGS):
    """Compares with the truth under every routing; `kept_of` says which slots find room, given their experts."""
    for routing in routings:
        arrays = case.arrays(rng)
        ids = route(rng, routing, len(arrays["x"]), case.E, case.k)
        kept = kept_of(ids) if kept_of else np.ones(ids.shape, bool)
        (y, dropped), grads = run(arrays, ids)
        expected, expected_grads = truth(arrays, ids, kept if overflow == "drop" else None)
        assert_close(y, expected, forward)
        for found, wanted in zip(grads, expected_grads, strict=True):
            assert found.dtype == case.dtype
            assert_close(found, wanted, backward)
        by_device = (~kept).reshape(case.P * case.data, -1).sum(1)
        np.testing.assert_array_equal(dropped, by_device)


def check_dead_rows(case, experts, multiply, rng, monkeypatch):
    """Results and gradients do not change where dead rows of buffers hold NaN.

    But for roundings: what rows hold is a constant of the program, with which the compiler may fuse in another way.
    """
    arrays = case.arrays(rng)
    ids = route(rng, "zipf", len(arrays["x"]), case.E, case.k)
    plain = case.compiled(experts, multiply)(arrays, ids)
    monkeypatch.setattr(permute, "DEAD_FILL", math.nan)
    poisoned = case.compiled(experts, multiply)(arrays, ids)
    jax.tree.map(lambda found, wanted: assert_close(found, wanted, 1e-6), poisoned, plain)
