"""The key-value cache, an explicit pytree argument and result.

All rows write to the same slot; each row's mask says which slots hold its real tokens, so prompts padded on either side
need no shifting. A layer's keys and values are [B, N, length, D], which attention reads without a transposition. For
the scanned layer loop they are stacked on axis 0 and ride in the carry, where one-token writes happen in place; for the
unrolled loop they are a tuple of layers, which needs no slicing.

Local layers keep only their window, as a ring buffer: slot s lies at s modulo its length. (In a stack all layers have
the same length.) Which of its slots are real follows from a row's position: models with such layers read prompts padded
on the left, so rows have no gaps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unidetox_jax.models import wide_heads
from unidetox_jax.models.config import ModelConfig
from unidetox_jax.sharding import constrain

Layers = Any  # an array [L, B, N, length, D], or a tuple of L arrays [B, N, length or window, D]


class Cache(NamedTuple):
    """keys, values: `Layers`; mask: bool [B, length], the slots with a real token; positions: int32 [B], the next
    token's position; slot: int32, the next slot to write; prefix: what precedes the rows' own slots, or None."""

    keys: Layers
    values: Layers
    mask: jax.Array
    positions: jax.Array
    slot: jax.Array
    prefix: "SharedPrefix | None" = None

    @property
    def length(self) -> int:
        """A row's slots, used and free, without the prefix."""
        return self.mask.shape[1]


class SharedPrefix(NamedTuple):
    """Keys, values (`Layers` of P rows) and mask bool [P, slots], each row of which precedes B/P rows of a cache."""

    keys: Layers
    values: Layers
    mask: jax.Array


def init_cache(cfg: ModelConfig, batch: int, length: int, dtype: str | None = None) -> Cache:
    """An empty cache for `batch` rows of at most `length` tokens; dtype None: the compute dtype."""
    heads, size = wide_heads.shape(cfg)

    def empty(slots: int, *layers: int) -> jax.Array:
        return _place(jnp.zeros((*layers, batch, heads, slots, size), dtype or cfg.dtype))

    def zeros() -> Layers:
        if cfg.layer_loop == "unroll":
            return tuple(empty(num_slots(cfg, layer, length)) for layer in range(cfg.num_layers))
        return empty(num_slots(cfg, 0, length), cfg.num_layers)

    return Cache(
        keys=zeros(),
        values=zeros(),
        mask=jnp.zeros((batch, length), bool),
        positions=jnp.zeros((batch,), jnp.int32),
        slot=jnp.zeros((), jnp.int32),
    )


def cache_axes(branched: bool = False) -> Cache:
    """The cache's axes for `jax.vmap` over models that read the same tokens, each with its own keys and values.

    branched: the cache has a prefix.
    """
    prefix = SharedPrefix(0, 0, None) if branched else None  # type: ignore[arg-type]  # axes in place of arrays
    return Cache(0, 0, None, None, None, prefix)  # type: ignore[arg-type]


def share_cache_masks(cache: Cache) -> Cache:
    """Stacked caches of models that read the same tokens, with the axes of `cache_axes`: one mask for all models."""
    prefix = cache.prefix and cache.prefix._replace(mask=cache.prefix.mask[0])
    return cache._replace(mask=cache.mask[0], positions=cache.positions[0], slot=cache.slot[0], prefix=prefix)


def cache_of(cache: Cache, model: int) -> Cache:
    """One model's cache out of those that `share_cache_masks` stacked."""

    def take(stacked):
        keys, values = jax.tree.map(lambda x: x[model], (stacked.keys, stacked.values))
        return stacked._replace(keys=keys, values=values)

    return take(cache._replace(prefix=cache.prefix and take(cache.prefix)))


def num_slots(cfg: ModelConfig, layer: int, length: int) -> int:
    """How many slots a layer has in a cache of `length`."""
    lengths_may_differ = cfg.layer_loop == "unroll" or len(set(cfg.local)) == 1
    return min(length, cfg.window) if lengths_may_differ and cfg.is_local(layer) else length


def _map_layers(function, layers: Layers) -> Layers:
    """function(layer, keys or values) of every layer, or of the whole stack as layer 0."""
    return tuple(function(i, x) for i, x in enumerate(layers)) if isinstance(layers, tuple) else function(0, layers)


def grow_cache(cache: Cache, cfg: ModelConfig, length: int) -> Cache:
    """The same cache with `length` slots, so that a decoding loop can begin with few and read only those."""
    added = length - cache.length
    if added == 0:
        return cache

    def grow(layer: int, x: jax.Array) -> jax.Array:
        added = num_slots(cfg, layer, length) - x.shape[-2]
        return _place(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, added), (0, 0)])) if added else x

    return cache._replace(
        keys=_map_layers(grow, cache.keys),
        values=_map_layers(grow, cache.values),
        mask=jnp.pad(cache.mask, ((0, 0), (0, added))),
    )


def branch_cache(cache: Cache, cfg: ModelConfig, times: int, length: int) -> Cache:
    """A cache for `times` consecutive continuations of every row, with `length` slots each.

    What the cache holds becomes their shared prefix, which a step reads once for all of them.

    Raises:
      ValueError: the cache has a prefix already.
    """
    if cache.prefix is not None:
        raise ValueError("a cache with a prefix cannot branch again")

    def empty(layer: int, x: jax.Array) -> jax.Array:
        *layers, batch, heads, _, size = x.shape
        return _place(jnp.zeros((*layers, batch * times, heads, num_slots(cfg, layer, length), size), x.dtype))

    prefix = SharedPrefix(cache.keys, cache.values, cache.mask)
    if cfg.window:  # newest last, so that distances follow from the slot alone
        keys, values = (jax.tree.map(functools.partial(_in_order, slot=cache.slot), x) for x in prefix[:2])
        prefix = SharedPrefix(keys, values, jnp.roll(cache.mask, -cache.slot, axis=1))
    return Cache(
        keys=_map_layers(empty, cache.keys),
        values=_map_layers(empty, cache.values),
        mask=jnp.zeros((cache.mask.shape[0] * times, length), bool),
        positions=jnp.repeat(cache.positions, times),
        slot=jnp.zeros((), jnp.int32),
        prefix=prefix,
    )


def _in_order(x: jax.Array, slot: int | jax.Array) -> jax.Array:
    """A layer's slots from the oldest to the newest, the one before `slot`."""
    return jnp.roll(x, -slot, axis=-2)


def append_to_ring(layers: Layers, layer: int | jax.Array, new: jax.Array, slot: int | jax.Array) -> jax.Array:
    """The content of a ring buffer in order, followed by new [B, N, T, D]."""
    old = _in_order(read(layers, layer), slot)
    return jnp.concatenate([old, new.astype(old.dtype)], axis=2)


def distances(slot: jax.Array, count: int, slots: int, ring: bool) -> jax.Array:
    """Distances in tokens from each of `count` queries, at `slot` and after, back to each slot: int32 [count, slots].

    For several queries over a ring buffer: to each entry of `append_to_ring`, [count, slots + count]. Later tokens have
    negative distances; empty slots have distances beyond the row's first token.
    """
    query = jnp.arange(count)[:, None]
    if ring and count > 1:
        return slots + query - jnp.arange(slots + count)[None]
    return ((slot + count - 1 - jnp.arange(slots)) % slots - (count - 1))[None] + query


def write(layers: Layers, layer: int | jax.Array, new: jax.Array, slot: int | jax.Array, ring: bool = False) -> Layers:
    """Writes new [B, N, T, D] to one layer's slots from `slot` on, in place where the compiler can.

    ring: wrap around after the last slot, keeping the newest tokens.
    """
    capacity, count = (layers[layer] if isinstance(layers, tuple) else layers).shape[-2], new.shape[2]
    if ring and count == 1:
        slot = slot % capacity
    elif ring:
        new = append_to_ring(layers, layer, new, slot)[:, :, -capacity:]
        new, slot = jnp.roll(new, slot + count, axis=2), 0
    zero, slot = jnp.zeros((), jnp.int32), jnp.asarray(slot, jnp.int32)
    if isinstance(layers, tuple):
        new = new.astype(layers[layer].dtype)
        updated = _update(layers[layer], new, (zero, zero, slot, zero))
        return (*layers[:layer], updated, *layers[layer + 1 :])
    index = jnp.asarray(layer, jnp.int32)
    return _update(layers, new[None].astype(layers.dtype), (index, zero, zero, slot, zero))


@jax.custom_batching.custom_vmap
def _update(old: jax.Array, new: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(old, new, start)


@_update.def_vmap
def _update_all(size, batched, old, new, start):
    """One slice for all models under vmap, where JAX's rule would make a scatter."""
    old, new = (
        x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_batched in zip((old, new), batched[:2], strict=True)
    )
    return jax.lax.dynamic_update_slice(old, new, (jnp.zeros_like(start[0]), *start)), True


def read(layers: Layers, layer: int | jax.Array) -> jax.Array:
    """One layer's keys or values, [B, N, length, D]."""
    if isinstance(layers, tuple):
        return layers[layer]
    return jax.lax.dynamic_index_in_dim(layers, layer, keepdims=False)


def _place(x: jax.Array) -> jax.Array:
    axes = (("data", "fsdp"), "model", None, None)
    return constrain(x, *(None,) * (x.ndim - 4), *axes)
