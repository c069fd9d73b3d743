"""Order statistics over a whole vocabulary by bisection instead of sorting.

B batch, V vocabulary. XLA sorts a GPT-2 vocabulary of 16 rows in about 200 ms on two CPU cores; thirty passes of "how
many (or how much mass) lies above this value?" take a twentieth of that. They are plain reductions, so a vocabulary
split over devices costs one number per row and pass, never an all-gather. Float32 values are bisected by their bits,
so the result is exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from unidetox_jax import sharding


def bisect(predicate: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array, steps: int = 32) -> jax.Array:
    """The largest integer in [low, high] for which a monotone predicate (true, then false) is true.

    Args:
      predicate: int32 [B,1] → bool [B,1]; assumed true at `low`.
      low, high: int32 [B,1].
      steps: enough to halve high − low down to 0.
    """

    def halve(_, bounds):
        low, high = bounds
        # The upper middle, without overflow over the whole int32 range.
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        true = predicate(middle)
        return jnp.where(true, middle, low), jnp.where(true, high, jnp.maximum(middle - 1, low))

    return lax.fori_loop(0, steps, halve, (low, high))[0]


def ordinal(values: jax.Array) -> jax.Array:
    """float32 → int32 of the same order (−0.0 counts as 0.0)."""
    bits = lax.bitcast_convert_type(values + 0.0, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def kth_largest(values: jax.Array, k: jax.Array | int) -> jax.Array:
    """The k-th largest value of each row, counting ties: float32 [B,V], k a number or int32 [B,1] → float32 [B,1]."""
    order = ordinal(values)
    low, high = order.min(-1, keepdims=True), order.max(-1, keepdims=True)
    bits = bisect(lambda cut: jnp.sum(order >= cut, -1, keepdims=True) >= k, low, high)
    return lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), jnp.float32)


def nucleus_floor(probabilities: jax.Array, mass: jax.Array | float) -> jax.Array:
    """The smallest probability in the smallest set of most probable tokens whose mass exceeds `mass`.

    {p ≥ floor} is that set, including the token that crosses `mass` and all tokens tied with it.
    If no set exceeds `mass` (mass 1), the floor is the row's smallest probability.

    Args:
      probabilities: float32 [B,V], not negative; mass: in (0, 1].
    Returns: float32 [B,1].
    """
    # The bits of non-negative floats are ordered like their values.
    low = lax.bitcast_convert_type(probabilities.min(-1, keepdims=True), jnp.int32)
    high = lax.bitcast_convert_type(probabilities.max(-1, keepdims=True), jnp.int32)

    def exceeds(cut):
        floor = lax.bitcast_convert_type(cut, jnp.float32)
        return jnp.sum(probabilities, -1, keepdims=True, where=probabilities >= floor) > mass

    return lax.bitcast_convert_type(bisect(exceeds, low, high, steps=31), jnp.float32)


def outside_tail(probabilities: jax.Array, tail: jax.Array | float) -> jax.Array:
    """The tokens that remain when a row's least probable ones are dropped up to a mass of `tail`; at least one remains.

    In ascending order of (probability, token id), a token is dropped while the mass up to and including it is ≤ `tail`.

    Args:
      probabilities: float32 [B,V], not negative; tail: in [0, 1].
    Returns: bool [B,V], true for tokens that remain.
    """
    size = probabilities.shape[-1]

    def below(floor):
        return jnp.sum(probabilities, -1, keepdims=True, where=probabilities < floor)

    low = jnp.zeros_like(probabilities[..., :1], jnp.int32)
    high = lax.bitcast_convert_type(probabilities.max(-1, keepdims=True), jnp.int32)
    cut = bisect(lambda bits: below(lax.bitcast_convert_type(bits, jnp.float32)) <= tail, low, high, steps=31)
    floor = lax.bitcast_convert_type(cut, jnp.float32)
    # Among tokens of the crossing probability, the lowest ids are dropped, as many as still fit into the tail.
    mass, tied = below(floor), probabilities == floor

    def first_kept():
        ids = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), tied.shape)
        last = jnp.max(jnp.where(tied, ids, 0), -1, keepdims=True)

        def fits(cut):
            return mass + floor * jnp.sum(tied & (ids < cut), -1, keepdims=True, dtype=jnp.float32) <= tail

        return ids >= bisect(fits, jnp.zeros_like(last), last, steps=size.bit_length())

    if sharding.device_of().platform == "cpu":  # a single token does not fit, or the cut would be higher
        several = jnp.any(jnp.sum(tied, -1) > 1)
        kept = lax.cond(several, first_kept, lambda: jnp.ones_like(tied))
    else:  # a branch would wait for the host
        kept = first_kept()
    return (probabilities > floor) | (tied & kept)
