"""The grouped matmul of the experts against what a library offers: forward and gradients, in turns.

    python -m benchmarks.grouped_matmul [--rows 4096 --experts 16 --d-model 256 --d-ff 512]

Alternatives: `lax.ragged_dot`; a batched product of groups padded to a capacity of twice the mean, whose
overflowing rows are not multiplied at all; and every expert on every row. Rows are unevenly divided, as a router
does it.
"""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from models.transformer import masked_grouped_matmul
from piperjax.runtime.grouped_matmul import grouped_matmul


def padded(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Groups padded to twice the mean: [R, D], [G, D, F], [G] -> [R, F]."""
    R, G = x.shape[0], w.shape[0]
    capacity = -(-2 * R // G)
    starts = jnp.cumsum(group_sizes) - group_sizes
    row = starts[:, None] + jnp.arange(capacity)
    held = jnp.arange(capacity) < group_sizes[:, None]
    blocks = jnp.where(held[..., None], x[jnp.minimum(row, R - 1)], 0)
    products = jnp.einsum("gcd,gdf->gcf", blocks, w)
    group = jnp.searchsorted(starts, jnp.arange(R), side="right") - 1
    place = jnp.arange(R) - starts[group]
    return jnp.where((place < capacity)[:, None], products[group, jnp.minimum(place, capacity - 1)], 0)


ALTERNATIVES = {
    "PiperJAX": grouped_matmul,
    "ragged_dot": lax.ragged_dot,
    "padded to 2x the mean": padded,
    "every expert on every row": masked_grouped_matmul,
}


def main() -> int:
    """Prints a table; fails if the library's own operation is faster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("rows", 4096), ("experts", 16), ("d-model", 256), ("d-ff", 512), ("rounds", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(args.experts, 4.0))
    sizes = jnp.asarray(rng.multinomial(args.rows, shares), jnp.int32)
    x = jnp.asarray(rng.normal(size=(args.rows, args.d_model)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(args.experts, args.d_model, args.d_ff)), jnp.float32)
    print(f"{args.rows} rows over {args.experts} experts, {int(sizes.min())} to {int(sizes.max())} each, on "
          f"{jax.devices()[0].device_kind}")  # fmt: skip

    def gradient_of(function):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(function(x, w, sizes))), argnums=(0, 1))

    functions = {
        name: {"forward": jax.jit(lambda x, w, f=function: f(x, w, sizes)), "gradients": jax.jit(gradient_of(function))}
        for name, function in ALTERNATIVES.items()
    }  # fmt: skip
    seconds = {(name, what): [] for name in functions for what in ("forward", "gradients")}
    for _ in range(args.rounds):
        for (name, what), values in seconds.items():
            function = functions[name][what]
            jax.block_until_ready(function(x, w))
            start = time.perf_counter()
            jax.block_until_ready(function(x, w))
            values.append(time.perf_counter() - start)
    print(
        f"{'':28s}{'forward':>12s}{'forward + gradients':>22s}   milliseconds, median of {args.rounds}, and ratio"
    )
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    for name in functions:
        cells = [
            f"{medians[name, what] * 1e3:8.2f} ({medians[name, what] / medians['PiperJAX', what]:.2f})"
            for what in ("forward", "gradients")
        ]
        print(f"{name:28s}{cells[0]:>16s}{cells[1]:>18s}")
    ratio = medians["ragged_dot", "gradients"] / medians["PiperJAX", "gradients"]
    print(
        f"ragged_dot takes {ratio:.2f} times as long (bar: at least 1): "
        + ("met" if ratio >= 1 else "MISSED")
    )
    return ratio < 1


if __name__ == "__main__":
    sys.exit(main())
