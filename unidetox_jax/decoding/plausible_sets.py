"""Sets of plausible tokens, and the restriction of scores to them. Notation as in `objectives`."""

import jax
import jax.numpy as jnp

from unidetox_jax.decoding import order_statistics


def plausible(logits: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """APC(z, α): bool [..., V]."""
    logits = float32(logits)
    return logits >= jnp.log(jnp.asarray(alpha, jnp.float32)) + logits.max(-1, keepdims=True)


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """TopP(z, q): bool [..., V]; includes all tokens tied with the one that crosses q."""
    probabilities = jax.nn.softmax(float32(logits), -1)
    return probabilities >= order_statistics.nucleus_floor(probabilities, top_p)


def restrict(mask: jax.Array, scores: jax.Array) -> jax.Array:
    """Scores where the mask is true, −inf elsewhere."""
    return jnp.where(mask, scores, -jnp.inf)


def float32(logits) -> jax.Array:
    """Logits of any float dtype as float32."""
    return jnp.asarray(logits).astype(jnp.float32)


def log_softmax(logits) -> jax.Array:
    """Log-probabilities of logits, float32."""
    return jax.nn.log_softmax(float32(logits), -1)
