"""Stochastic rounding to bfloat16: to one of the two neighbours, each with the probability that makes the mean exact.

Adding random bits below a float32's last kept bit and cutting them off is that (Gupta et al. 2015; for AdamW in
bfloat16, Zamirai et al. 2020). A weight's change may be so small that float32 rounds it as well, always in one
direction while the weight stays in its binade: `add` takes what that rounding lost into account.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

LOW = np.uint32(0xFFFF)  # the bits of a float32 that bfloat16 lacks
EXPONENT = np.uint32(0x7F800000)


def random_bits(seed: int, step: jax.Array, path: str, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Two uint32 of a shape, functions of the seed, the step, the parameter's path and an element's index in it alone:
    the same on every mesh and platform. One evaluation of Threefry (Salmon et al. 2011) gives both: its key is the step
    and a hash of the others, its counter the element's place."""
    parameter = jnp.uint32(zlib.crc32(f"{seed}/{path}".encode()))
    rows = jnp.zeros(shape, jnp.uint32)  # a layer and an index in it: together they may pass 32 bits
    columns = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in range(len(shape) - 1, 0, -1):
        columns += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    if shape:
        rows += jax.lax.broadcasted_iota(jnp.uint32, shape, 0)
    return tuple(threefry2x32_p.bind(parameter, step.astype(jnp.uint32), rows, columns))


def to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """x float32 as bfloat16, by the low 16 of the bits (uint32). What is not finite stays as it is."""
    return _cut(x, _raw(x) + (bits & LOW))


def add(weight: jax.Array, change: jax.Array, bits: jax.Array) -> jax.Array:
    """weight (bfloat16) + change (float32) as bfloat16, by all 32 bits: unbiased to 2^-16 of float32's own spacing."""
    weight = weight.astype(jnp.float32)
    total = weight + change
    moved = total - weight
    lost = (weight - (total - moved)) + (change - moved)  # exactly what the sum's rounding lost (Knuth's TwoSum)
    raw = _raw(total)
    spacing = jax.lax.bitcast_convert_type(raw & EXPONENT, jnp.float32) * jnp.float32(2.0**-23)
    part = jnp.where(spacing > 0, lost * jnp.sign(total) / spacing, 0.0)  # of magnitude, as the cutting is
    carry = (jnp.floor(part * 65536).astype(jnp.int32) + (bits & LOW).astype(jnp.int32)) >> 16
    return _cut(total, raw + (bits >> 16) + carry.astype(jnp.uint32))


def _raw(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _cut(x: jax.Array, raw: jax.Array) -> jax.Array:
    cut = jax.lax.bitcast_convert_type(raw & ~LOW, jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)
