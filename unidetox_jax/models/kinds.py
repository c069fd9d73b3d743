"""Layers of two kinds: global ones see all that stands before a query, local ones a window of it.

They differ in what they are given: pairs, of global layers and of local ones. In the scanned loop over layers the kind
is data, so that there is one body for both, and no copy of weights in groups; in the unrolled loop it is known, and
local layers' caches are rings.

Letters: B batch, T time, K keys, P prefixes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from unidetox_jax.models import cache as kv
from unidetox_jax.models.attention import causal_mask
from unidetox_jax.models.cache import Cache
from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.rotary import rotary_tables


def to_the_right(tokens: jax.Array, attention_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same texts, padded on the left."""
    real = jnp.asarray(attention_mask).astype(bool)
    order = jnp.argsort(real, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order, axis=1), jnp.take_along_axis(real, order, axis=1)


def of_kind(cfg: ModelConfig, layer, pair: tuple[Any, Any]) -> Any:
    """Of a pair, what a layer is given."""
    local = cfg.is_local(layer)
    if isinstance(local, bool):
        return pair[local]
    return jax.tree.map(functools.partial(jnp.where, local), pair[1], pair[0])


def rotaries(cfg: ModelConfig, positions: jax.Array) -> tuple[Any, Any]:
    """The rotary tables, None where the family has none."""

    def tables(rotary):
        return None if rotary is None else rotary_tables(rotary, cfg.head_size, positions)

    first = tables(cfg.rotary)
    return first, first if cfg.local_rotary is None else tables(cfg.local_rotary)


def masks(cfg: ModelConfig, segments: jax.Array | None, positions: jax.Array) -> tuple[Any, Any]:
    """Which keys the queries of whole texts see: bool [B or 1, T, T], None for causal."""
    length = positions.shape[1]
    if length <= cfg.window or not cfg.window:
        mask = None if segments is None else causal_mask(segments, length)
        return mask, mask
    mask = causal_mask(segments, length)
    positions = positions if segments is not None else positions[:1]
    return mask, mask & (positions[:, :, None] - positions[:, None, :] < cfg.window)


def cache_masks(cfg: ModelConfig, cache: Cache, seen: jax.Array, positions: jax.Array) -> tuple[Any, Any]:
    """Which of a cache's keys, and of its prefix's, queries see: (bool [B,T,K], None or bool [P,K] or [P,T,K]).
    seen: bool [B,T,K], all of a row's own that stand before a query; positions: int32 [B,T], the queries'."""
    before = None if cache.prefix is None else cache.prefix.mask
    if not cfg.window:
        return (seen, before), (seen, before)
    own = cache.slot + jnp.arange(positions.shape[1])  # how many of a row's own slots stand before a query
    layer = cfg.local.index(True)

    def near(distance, most):
        return ((distance >= 0) & (distance < cfg.window))[None] & (distance[None] <= most[:, :, None])

    slots = kv.slots(cfg, layer, cache.length)
    distance = kv.distances(cache.slot, positions.shape[1], slots, slots < cache.length)
    mask = near(distance, jnp.minimum(positions, own))
    if before is None:
        return (seen, None), (mask, None)
    prefixes, length = before.shape
    slots = kv.slots(cfg, layer, length)
    distance = own[:, None] + slots - jnp.arange(slots)
    positions = positions.reshape(prefixes, -1, positions.shape[1])[:, 0]
    return (seen, before[:, None]), (mask, near(distance, positions))


def is_ring(cfg: ModelConfig, layer, length: int) -> bool:
    """Whether a layer of a cache of `length` keeps the newest tokens only."""
    return bool(cfg.local) and kv.slots(cfg, layer, length) < length
