"""Reading and writing buffers at indices known only at run time, in place and without scatters.

`buffer[i]` and `buffer.at[i].add(x)` say the same, but compile to gathers and scatters that check for negative
indices; these are one dynamic slice and one dynamic update.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def read(buffer: jax.Array, *index: jax.Array) -> jax.Array:
    """Returns `buffer[index]`, the leading dimensions indexed by int32 scalars, which must be within bounds."""
    sizes = (*(1,) * len(index), *buffer.shape[len(index) :])
    sliced = lax.dynamic_slice(buffer, _start(buffer, index), sizes, allow_negative_indices=False)
    return lax.reshape(sliced, buffer.shape[len(index) :])


def write(buffer: jax.Array, value: jax.Array, *index: jax.Array) -> jax.Array:
    """Returns `buffer` with `value` at `index`."""
    update = lax.reshape(value, (*(1,) * len(index), *value.shape))
    return lax.dynamic_update_slice(buffer, update, _start(buffer, index), allow_negative_indices=False)


def add(buffer: jax.Array, value: jax.Array, *index: jax.Array) -> jax.Array:
    """Returns `buffer` with `value` added at `index`, rounded once to the dtype of `buffer`.

    The sum has the leading dimensions of the buffer: where there is one place only, XLA drops both slices, and a sum
    behind a change of shape would not be made in place. On GPUs it is made in place, by one kernel, if both slices
    begin at the same value; what is computed for an index, such as a look-up in a table, XLA would compute for each of
    them, and so would write sums apart and copy them (compiled for H100).
    """
    # With the value, as XLA would evaluate constants behind a barrier of their own, and cannot.
    *behind, value = lax.optimization_barrier((*index, value))
    index = tuple(
        one if isinstance(one, np.generic) else later for one, later in zip(index, behind, strict=True)
    )
    start, shape = _start(buffer, index), (*(1,) * len(index), *value.shape)
    wide = jnp.promote_types(buffer.dtype, value.dtype)
    total = lax.dynamic_slice(buffer, start, shape, allow_negative_indices=False).astype(wide)
    total = (total + lax.reshape(value, shape).astype(wide)).astype(buffer.dtype)
    return lax.dynamic_update_slice(buffer, total, start, allow_negative_indices=False)


def _start(buffer: jax.Array, index: tuple) -> tuple:
    return (*index, *(np.int32(0),) * (buffer.ndim - len(index)))
