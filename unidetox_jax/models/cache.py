"""The key-value cache: an explicit pytree, given and returned.

All rows write to the same slot; which slots hold a real token is a row's own mask, so left-padded and right-padded
prompts need no shifting. Keys and values are [B, N, length, D] a layer: attention reads them without a transposition.
Stacked on axis 0 for the scanned layer loop, where they ride in the carry and take one-token writes in place; a tuple
of layers for the unrolled loop, where nothing needs to be sliced.

A local layer keeps its window only, as a ring: slot s lies at s modulo its length. (In a stack all layers are as long
as the longest.) Which of its slots are real follows from a row's position, because the rows of models that have such
layers stand right, without gaps.
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
    token's position; slot: int32, the next slot to write; prefix: what P-ths of the rows have in common, or None."""

    keys: Layers
    values: Layers
    mask: jax.Array
    positions: jax.Array
    slot: jax.Array
    prefix: "Branched | None" = None

    @property
    def length(self) -> int:
        """Slots of a row's own, used and free."""
        return self.mask.shape[1]


class Branched(NamedTuple):
    """A context's keys, values (`Layers` of P rows) and mask bool [P, its slots]: each row's goes before B/P rows."""

    keys: Layers
    values: Layers
    mask: jax.Array


def init_cache(cfg: ModelConfig, batch: int, length: int, dtype: str | None = None) -> Cache:
    """An empty cache for `batch` rows of at most `length` tokens; dtype None: the compute dtype."""

    def empty(slots: int, *layers: int) -> jax.Array:
        heads, size = wide_heads.shape(cfg)
        return _place(jnp.zeros((*layers, batch, heads, slots, size), dtype or cfg.dtype))

    def zeros() -> Layers:
        if cfg.layer_loop == "unroll":
            return tuple(empty(slots(cfg, layer, length)) for layer in range(cfg.num_layers))
        return empty(slots(cfg, 0, length), cfg.num_layers)

    return Cache(
        keys=zeros(),
        values=zeros(),
        mask=jnp.zeros((batch, length), bool),
        positions=jnp.zeros((batch,), jnp.int32),
        slot=jnp.zeros((), jnp.int32),
    )


def cache_axes(branched: bool = False) -> Cache:
    """For `jax.vmap` over models that read the same tokens, each with keys and values of its own: the axes of a cache.

    branched: it has a prefix.
    """
    prefix = Branched(0, 0, None) if branched else None  # type: ignore[arg-type]  # axes in place of arrays
    return Cache(0, 0, None, None, None, prefix)  # type: ignore[arg-type]


def share_cache_masks(cache: Cache) -> Cache:
    """The caches of models that read the same tokens, stacked, as `cache_axes` has them."""
    prefix = cache.prefix and cache.prefix._replace(mask=cache.prefix.mask[0])
    return cache._replace(mask=cache.mask[0], positions=cache.positions[0], slot=cache.slot[0], prefix=prefix)


def cache_of(cache: Cache, model: int) -> Cache:
    """One model's cache of those that `share_cache_masks` has stacked."""

    def take(part):
        keys, values = jax.tree.map(lambda x: x[model], (part.keys, part.values))
        return part._replace(keys=keys, values=values)

    return take(cache._replace(prefix=cache.prefix and take(cache.prefix)))


def slots(cfg: ModelConfig, layer: int, length: int) -> int:
    """How many slots a layer has in a cache of `length`."""
    own = cfg.layer_loop == "unroll" or len(set(cfg.local)) == 1
    return min(length, cfg.window) if own and cfg.is_local(layer) else length


def _each(change, layers: Layers) -> Layers:
    """change(layer, its keys or values) of all."""
    return tuple(change(i, x) for i, x in enumerate(layers)) if isinstance(layers, tuple) else change(0, layers)


def grow_cache(cache: Cache, cfg: ModelConfig, length: int) -> Cache:
    """The same cache with `length` slots: what lets a decoding loop read live slots only."""
    more = length - cache.length
    if more == 0:
        return cache

    def grow(layer: int, x: jax.Array) -> jax.Array:
        more = slots(cfg, layer, length) - x.shape[-2]
        return _place(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])) if more else x

    return cache._replace(
        keys=_each(grow, cache.keys),
        values=_each(grow, cache.values),
        mask=jnp.pad(cache.mask, ((0, 0), (0, more))),
    )


def branch_cache(cache: Cache, cfg: ModelConfig, times: int, length: int) -> Cache:
    """`times` continuations of every row, one after another, with `length` slots of their own: what was read so far
    stays as it is, their common prefix, and is read once for all of them in every step.

    Raises:
      ValueError: the rows are branches already.
    """
    if cache.prefix is not None:
        raise ValueError("a cache with a prefix cannot branch again")

    def empty(layer: int, x: jax.Array) -> jax.Array:
        *layers, batch, heads, _, size = x.shape
        return _place(jnp.zeros((*layers, batch * times, heads, slots(cfg, layer, length), size), x.dtype))

    before = Branched(cache.keys, cache.values, cache.mask)
    if cfg.window:  # in order, the newest last: what is how far away needs no more than that
        keys, values = (jax.tree.map(functools.partial(_in_order, slot=cache.slot), part) for part in before[:2])
        before = Branched(keys, values, jnp.roll(cache.mask, -cache.slot, axis=1))
    return Cache(
        keys=_each(empty, cache.keys),
        values=_each(empty, cache.values),
        mask=jnp.zeros((cache.mask.shape[0] * times, length), bool),
        positions=jnp.repeat(cache.positions, times),
        slot=jnp.zeros((), jnp.int32),
        prefix=before,
    )


def _in_order(x: jax.Array, slot: int | jax.Array) -> jax.Array:
    """The slots of a layer from the oldest to the newest, which is the last before `slot`."""
    return jnp.roll(x, -slot, axis=-2)


def joined(layers: Layers, layer: int | jax.Array, new: jax.Array, slot: int | jax.Array) -> jax.Array:
    """What a ring holds, in order, and new [B, N, T, D] after it."""
    held = _in_order(read(layers, layer), slot)
    return jnp.concatenate([held, new.astype(held.dtype)], axis=2)


def distances(slot: jax.Array, count: int, slots: int, ring: bool) -> jax.Array:
    """How many tokens before each of `count` queries, at `slot` and after, stands what lies in a slot: int32
    [count, slots]; of a ring and several queries, in what `joined` gives: [count, slots + count]. Before the first
    token where a slot is empty, and below 0 for what comes after the query."""
    query = jnp.arange(count)[:, None]
    if ring and count > 1:
        return slots + query - jnp.arange(slots + count)
    return (slot + count - 1 - jnp.arange(slots)) % slots - (count - 1) + query


def write(layers: Layers, layer: int | jax.Array, new: jax.Array, slot: int | jax.Array, ring: bool = False) -> Layers:
    """Writes new [B, N, T, D] to slots slot… of one layer, in place where the compiler may. ring: beyond its last slot
    it goes on at the first, and keeps the newest."""
    capacity, count = (layers[layer] if isinstance(layers, tuple) else layers).shape[-2], new.shape[2]
    if ring and count == 1:
        slot = slot % capacity
    elif ring:
        new = joined(layers, layer, new, slot)[:, :, -capacity:]
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
    """Models side by side write one slice; JAX's own rule makes a scatter of it."""
    old, new = (
        x if has else jnp.broadcast_to(x, (size, *x.shape)) for x, has in zip((old, new), batched[:2], strict=True)
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
