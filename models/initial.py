"""This file is the initial value of a weight: a function of (seed, name, layer, expert) and nothing else.

`jax.random` would do but for two things: its normal numbers differ in the last bits between programs
and between backends, and its generator takes long to compile (eight times as long as this one for the
tiny model). Here all is integer arithmetic up to one exact conversion and one multiplication, so a seed
means the same model on every mesh, on every backend and in every version of JAX.
"""

import math
import zlib

import jax
import jax.numpy as jnp

Index = int | jax.Array


def normal(
    name: str, shape: tuple[int, ...], *, seed: Index, layer: Index, expert: Index, std: float
) -> jax.Array:
    """Returns float32 values of mean 0 and standard deviation `std`, near normal, within 3.47 std.

    An element is the sum of four independent uniform 16-bit integers (Irwin-Hall, excess kurtosis -0.3) that
    a hash makes of its index within the weight, `name`, `layer` and `expert`. At most 2^32 elements.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for dimension, stride in enumerate(math.prod(shape[d + 1 :]) for d in range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, dimension) * jnp.uint32(stride)
    # Two words of key: with one, some of the 10^5 experts of a large model would start equal.
    numbers = (zlib.crc32(name.encode()), seed, layer, expert)
    low, high = (_key(numbers, start) for start in (0x9E3779B9, 0x85EBCA6B))
    first = _mix(_mix(index ^ low) + high)
    second = _mix(first + low)
    total = (first >> 16) + (first & 0xFFFF) + (second >> 16) + (second & 0xFFFF)
    centred = total.astype(jnp.int32) - 2 * 0xFFFF
    return centred.astype(jnp.float32) * jnp.float32(std * math.sqrt(3 / (2**32 - 1)))


def _key(numbers: tuple[Index, ...], start: int) -> jax.Array:
    """Returns a uint32 that depends on every number."""
    key = jnp.uint32(start)
    for number in numbers:
        word = jnp.uint32(number % 2**32) if isinstance(number, int) else jnp.asarray(number, jnp.uint32)
        key = _mix(key * jnp.uint32(0x01000193) + word)
    return key


def _mix(x: jax.Array) -> jax.Array:
    """Returns a bijection of uint32 in which every bit of the result depends on every bit of x.

    The 32-bit finaliser with constants of C. Wellons, "Prospecting for hash functions" (2018).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
