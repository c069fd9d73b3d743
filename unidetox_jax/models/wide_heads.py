"""Caches for TPUs, which fill the last dimension of an array up to 128: heads of 64 lie in pairs, so that nothing is
filled up, and a step reads half as much.

A wide head holds W key-value heads of D beside each other. Queries get zeros where the others' keys are, so scores stay
what they were; of what is weighed, each keeps its own part. Twice the arithmetic, where memory is what takes the time.

Letters: B batch, N key-value heads, H query heads, T and Q time, W heads of a wide one, D head size.
"""

import jax
import jax.numpy as jnp

from unidetox_jax.models.config import ModelConfig

LANES = 128


def width(cfg: ModelConfig, ways: int = 1) -> int:
    """How many heads lie together where heads are split `ways` ways; 1: each on its own."""
    together = LANES // cfg.head_size if LANES % cfg.head_size == 0 else 1
    fits = cfg.num_kv_heads % (together * ways) == 0 or (ways == 1 and not cfg.alibi)
    return together if fits and together <= cfg.num_kv_heads else 1


def shape(cfg: ModelConfig) -> tuple[int, int]:
    """A cache's key-value heads, the last one filled up, and their size."""
    return -(-cfg.num_kv_heads // cfg.wide_heads), cfg.wide_heads * cfg.head_size


def widen(cfg: ModelConfig, x: jax.Array) -> jax.Array:
    """Keys or values [B,N,T,D] as a cache has them, [B, wide heads, T, W·D]."""
    if cfg.wide_heads == 1:
        return x
    heads, size = shape(cfg)
    x = jnp.pad(x, ((0, 0), (0, heads * cfg.wide_heads - x.shape[1]), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], heads, cfg.wide_heads, *x.shape[2:])
    return jnp.moveaxis(x, 2, 3).reshape(x.shape[0], heads, x.shape[3], size)


def widen_query(cfg: ModelConfig, query: jax.Array) -> jax.Array:
    """Queries [B,Q,H,D] for wide heads: [B, Q, H filled up, W·D], zeros beside each in its place."""
    if cfg.wide_heads == 1:
        return query
    placed = jnp.einsum("bqnwgd,wv->bqnwgvd", _by_place(cfg, query), jnp.eye(cfg.wide_heads, dtype=query.dtype))
    return placed.reshape(*query.shape[:2], -1, cfg.wide_heads * cfg.head_size)


def narrow(cfg: ModelConfig, out: jax.Array) -> jax.Array:
    """What attention gives for `widen_query`, each head's own part: [B,Q,H,D]."""
    if cfg.wide_heads == 1:
        return out
    heads, _ = shape(cfg)
    batch, length = out.shape[:2]
    out = out.reshape(batch, length, heads, cfg.wide_heads, -1, cfg.wide_heads, cfg.head_size)
    own = jnp.stack([out[:, :, :, place, :, place] for place in range(cfg.wide_heads)], axis=3)
    return own.reshape(batch, length, -1, cfg.head_size)[:, :, : cfg.num_heads]


def _by_place(cfg: ModelConfig, query: jax.Array) -> jax.Array:
    """[B,Q,H,D] → [B, Q, wide heads, W, queries of a head, D]."""
    heads, _ = shape(cfg)
    groups = cfg.num_heads // cfg.num_kv_heads
    filled = heads * cfg.wide_heads * groups - cfg.num_heads
    query = jnp.pad(query, ((0, 0), (0, 0), (0, filled), (0, 0)))
    return query.reshape(*query.shape[:2], heads, cfg.wide_heads, groups, cfg.head_size)
