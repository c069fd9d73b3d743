"""Stochastic rounding to bfloat16: to either neighbour, with probabilities that make the mean exact.

It adds random bits below bfloat16's last bit of a float32 and truncates (Gupta et al. 2015; for AdamW in bfloat16,
Zamirai et al. 2020). A change of a weight may be so small that float32 rounds the sum too, always in the same direction
while the weight stays in its binade; `add` corrects for what that rounding lost.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

LOW = np.uint32(0xFFFF)  # a float32's bits that bfloat16 lacks
EXPONENT = np.uint32(0x7F800000)


def random_bits(seed: int, step: jax.Array, path: str, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Two uint32 arrays that depend only on seed, step, the parameter's path and each element's index.

    So they are the same on every mesh and platform. One evaluation of Threefry (Salmon et al. 2011) gives both: its key
    is the step and a hash of seed and path, its counter the element's index.
    """
    parameter = jnp.uint32(zlib.crc32(f"{seed}/{path}".encode()))
    rows = jnp.zeros(shape, jnp.uint32)  # the index needs both words: it may exceed 32 bits
    columns = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in range(len(shape) - 1, 0, -1):
        columns += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    if shape:
        rows += jax.lax.broadcasted_iota(jnp.uint32, shape, 0)
    return tuple(threefry2x32_p.bind(parameter, step.astype(jnp.uint32), rows, columns))


def to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds float32 x by the low 16 of the random bits (uint32). Infinities and NaN stay."""
    return _truncate(x, _as_bits(x) + (bits & LOW))


def add(weight: jax.Array, change: jax.Array, bits: jax.Array) -> jax.Array:
    """weight (bfloat16) + change (float32), rounded by all 32 bits: unbiased to 2^-16 of float32's spacing."""
    weight = weight.astype(jnp.float32)
    total = weight + change
    added = total - weight
    lost = (weight - (total - added)) + (change - added)  # the sum's exact rounding error (Knuth's TwoSum)
    raw = _as_bits(total)
    spacing = jax.lax.bitcast_convert_type(raw & EXPONENT, jnp.float32) * jnp.float32(2.0**-23)
    fraction = jnp.where(spacing > 0, lost * jnp.sign(total) / spacing, 0.0)  # truncation is of the magnitude
    carry = (jnp.floor(fraction * 65536).astype(jnp.int32) + (bits & LOW).astype(jnp.int32)) >> 16
    return _truncate(total, raw + (bits >> 16) + carry.astype(jnp.uint32))


def _as_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _truncate(x: jax.Array, raw: jax.Array) -> jax.Array:
    truncated = jax.lax.bitcast_convert_type(raw & ~LOW, jnp.float32)
    return jnp.where(jnp.isfinite(x), truncated, x).astype(jnp.bfloat16)
