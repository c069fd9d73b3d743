"""Global and local (sliding-window) layers: their masks and rotary tables, as pairs (global, local).

In the scanned layer loop the kind of a layer is data, so that one body serves both and weights need no regrouping. In
the unrolled loop it is static, and local layers' caches are ring buffers.

Axes: B batch, T time, K keys, P prefixes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from unidetox_jax import sharding
from unidetox_jax.models import cache as kv
from unidetox_jax.models.attention import causal_mask
from unidetox_jax.models.cache import Cache
from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.rotary import rotary_tables


def left_padded(tokens: jax.Array, attention_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same rows, padded on the left."""
    real = jnp.asarray(attention_mask).astype(bool)
    order = jnp.argsort(real, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order, axis=1), jnp.take_along_axis(real, order, axis=1)


def select(cfg: ModelConfig, layer, pair: tuple[Any, Any]) -> Any:
    """The element of a pair (global, local) for a layer."""
    local = cfg.is_local(layer)
    if isinstance(local, bool):
        return pair[local]
    return jax.tree.map(functools.partial(jnp.where, local), pair[1], pair[0])


def rotary_pair(cfg: ModelConfig, positions: jax.Array) -> tuple[Any, Any]:
    """The rotary tables; None if the family has none."""
    recomputed = cfg.layer_loop == "unroll" and sharding.device_of().platform == "cpu"

    def tables(rotary):
        if rotary is None:
            return None
        cos_sin = rotary_tables(rotary, cfg.head_size, positions)
        return tuple(map(_computed_once, cos_sin)) if recomputed else cos_sin

    shared = tables(cfg.rotary)
    return shared, shared if cfg.local_rotary is None else tables(cfg.local_rotary)


def _computed_once(table: jax.Array) -> jax.Array:
    """The table [B,T,D], multiplied by the identity: XLA would compute the sines anew in every layer's loop over heads,
    a twentieth of a decoding step on a CPU, but it does not merge a product into other loops."""
    return jnp.einsum("btd,de->bte", table, jnp.eye(table.shape[-1]), precision="highest")


def masks(cfg: ModelConfig, segments: jax.Array | None, positions: jax.Array) -> tuple[Any, Any]:
    """The masks of whole texts: bool [B or 1, T, T], None for causal."""
    length = positions.shape[1]
    if length <= cfg.window or not cfg.window:
        mask = None if segments is None else causal_mask(segments, length)
        return mask, mask
    mask = causal_mask(segments, length)
    positions = positions if segments is not None else positions[:1]
    return mask, mask & (positions[:, :, None] - positions[:, None, :] < cfg.window)


def cache_masks(cfg: ModelConfig, cache: Cache, causal: jax.Array, positions: jax.Array) -> tuple[Any, Any]:
    """The masks over a cache's slots and over its prefix: (bool [B,T,K], None or bool [P,K] or [P,T,K]).

    causal: bool [B,T,K], the real tokens up to each query; positions: int32 [B,T], the queries'.
    """
    prefix = None if cache.prefix is None else cache.prefix.mask
    if not cfg.window:
        return (causal, prefix), (causal, prefix)
    slot = cache.slot + jnp.arange(positions.shape[1])  # of each query
    layer = cfg.local.index(True)

    def within_window(distance, limit):
        return ((distance >= 0) & (distance < cfg.window))[None] & (distance[None] <= limit[:, :, None])

    slots = kv.num_slots(cfg, layer, cache.length)
    distance = kv.distances(cache.slot, positions.shape[1], slots, slots < cache.length)
    mask = within_window(distance, jnp.minimum(positions, slot[None]))
    if prefix is None:
        return (causal, None), (mask, None)
    prefixes, length = prefix.shape
    slots = kv.num_slots(cfg, layer, length)
    distance = slot[:, None] + slots - jnp.arange(slots)[None]
    positions = positions.reshape(prefixes, -1, positions.shape[1])[:, 0]
    return (causal, prefix[:, None]), (mask, within_window(distance, positions))


def is_ring(cfg: ModelConfig, layer, length: int) -> bool:
    """Whether a layer keeps only the newest tokens in a cache of `length`."""
    return bool(cfg.local) and kv.num_slots(cfg, layer, length) < length
