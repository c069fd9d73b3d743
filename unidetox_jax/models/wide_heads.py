"""Caches for TPUs, which pad an array's last dimension to 128: heads of 64 are stored in pairs, which halves the memory
that a step reads.

A wide head concatenates W key-value heads of size D. Queries are zero at the other heads' positions, so scores are
unchanged, and each query keeps its head's part of the output. That is W times the arithmetic in a step that is bound by
memory.

Axes: B batch, N key-value heads, H query heads, T and Q time, W heads per wide head, D head size.
"""

import jax
import jax.numpy as jnp

from unidetox_jax.models.config import ModelConfig

LANES = 128


def width(cfg: ModelConfig, shards: int = 1) -> int:
    """How many heads to store as one, if heads are split over so many shards; 1: no wide heads."""
    heads = LANES // cfg.head_size if LANES % cfg.head_size == 0 else 1
    fits = cfg.num_kv_heads % (heads * shards) == 0 or (shards == 1 and not cfg.alibi)
    return heads if fits and heads <= cfg.num_kv_heads else 1


def shape(cfg: ModelConfig) -> tuple[int, int]:
    """The number of a cache's (wide) heads and their size."""
    return -(-cfg.num_kv_heads // cfg.wide_heads), cfg.wide_heads * cfg.head_size


def widen(cfg: ModelConfig, x: jax.Array) -> jax.Array:
    """Keys or values [B,N,T,D] in the cache's layout, [B, wide heads, T, W·D]; missing heads are zero."""
    if cfg.wide_heads == 1:
        return x
    heads, size = shape(cfg)
    x = jnp.pad(x, ((0, 0), (0, heads * cfg.wide_heads - x.shape[1]), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], heads, cfg.wide_heads, *x.shape[2:])
    return jnp.moveaxis(x, 2, 3).reshape(x.shape[0], heads, x.shape[3], size)


def widen_query(cfg: ModelConfig, query: jax.Array) -> jax.Array:
    """Queries [B,Q,H,D] for wide heads: [B, Q, padded H, W·D], zero outside their own head's part."""
    if cfg.wide_heads == 1:
        return query
    grouped = _group_by_wide_head(cfg, query)
    padded = jnp.einsum("bqnwgd,wv->bqnwgvd", grouped, jnp.eye(cfg.wide_heads, dtype=query.dtype))
    return padded.reshape(*query.shape[:2], -1, cfg.wide_heads * cfg.head_size)


def narrow(cfg: ModelConfig, out: jax.Array) -> jax.Array:
    """Each head's own part of attention's output for `widen_query`: [B,Q,H,D]."""
    if cfg.wide_heads == 1:
        return out
    heads, _ = shape(cfg)
    batch, length = out.shape[:2]
    out = out.reshape(batch, length, heads, cfg.wide_heads, -1, cfg.wide_heads, cfg.head_size)
    parts = jnp.stack([out[:, :, :, index, :, index] for index in range(cfg.wide_heads)], axis=3)
    return parts.reshape(batch, length, -1, cfg.head_size)[:, :, : cfg.num_heads]


def _group_by_wide_head(cfg: ModelConfig, query: jax.Array) -> jax.Array:
    """[B,Q,H,D] → [B, Q, wide heads, W, query heads per key-value head, D]."""
    heads, _ = shape(cfg)
    groups = cfg.num_heads // cfg.num_kv_heads
    padding = heads * cfg.wide_heads * groups - cfg.num_heads
    query = jnp.pad(query, ((0, 0), (0, 0), (0, padding), (0, 0)))
    return query.reshape(*query.shape[:2], heads, cfg.wide_heads, groups, cfg.head_size)
