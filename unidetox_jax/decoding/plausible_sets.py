"""The tokens that an objective leaves a chance, and what imposes such a set. Letters as in `objectives`."""

import jax
import jax.numpy as jnp

from unidetox_jax.decoding import order_statistics


def plausible(logits: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """APC(z, α): bool [..., V]."""
    logits = float32(logits)
    return logits >= jnp.log(jnp.asarray(alpha, jnp.float32)) + logits.max(-1, keepdims=True)


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """TopP(z, q): bool [..., V]; tokens tied with the crossing one are in the set too."""
    probabilities = jax.nn.softmax(float32(logits), -1)
    return probabilities >= order_statistics.nucleus_floor(probabilities, top_p)


def on(kept: jax.Array, scores: jax.Array) -> jax.Array:
    """The scores on a set, −inf elsewhere."""
    return jnp.where(kept, scores, -jnp.inf)


def float32(logits) -> jax.Array:
    """Logits of any float dtype as those that everything is computed from."""
    return jnp.asarray(logits).astype(jnp.float32)


def log_softmax(logits) -> jax.Array:
    """l of logits z, float32."""
    return jax.nn.log_softmax(float32(logits), -1)
