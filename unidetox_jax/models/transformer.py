"""Forward, prefill and one decoding step over any family's blocks: pure functions of (params, tokens, cfg).

Each is jitted with the configuration static: called alone it compiles once per shape, inside another jitted function it
is part of that. The same `Block` runs in all three; they differ in the `attend` that they hand to it.

Letters: B batch, T time, V vocabulary, L layers, N key-value heads, D head size.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unidetox_jax import sharding
from unidetox_jax.models import cache as kv
from unidetox_jax.models import casting, kinds
from unidetox_jax.models.attention import (
    Prefix,
    alibi_bias,
    attention,
    positions_from_segments,
    soft_capped,
)
from unidetox_jax.models.cache import Cache
from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.decode_attention import BLOCK, decode_attention
from unidetox_jax.models.layers import precision
from unidetox_jax.models.parameters import Params, head, one_layer
from unidetox_jax.models.registry import family
from unidetox_jax.models.wide_heads import narrow, widen, widen_query


def _dots(primitive: Any, *values: Any, **settings: Any) -> bool:
    """What matrix products give without a batch, and cuDNN's attention: to run that again costs as much."""
    is_attention = primitive.name.startswith("dot_product_attention_fwd")
    return is_attention or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *values, **settings)


REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _dots,
}


@functools.partial(jax.jit, static_argnames=("cfg", "remat"))
def forward(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    attention_mask: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    remat: str = "none",
) -> jax.Array:
    """Logits float32 [B,T,V] of tokens int32 [B,T]; the arguments are those of `hidden_states`."""
    hidden = hidden_states(
        params, tokens, cfg, attention_mask, segment_ids=segment_ids, dropout_key=dropout_key, remat=remat
    )
    return logits(params, hidden, cfg)


@functools.partial(jax.jit, static_argnames=("cfg", "remat", "layer"))
def hidden_states(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    attention_mask: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    remat: str = "none",
    layer: int | None = None,
) -> jax.Array:
    """What meets the head, [B,T,width] in the compute dtype.

    Args:
      tokens: int32 [B,T].
      attention_mask: bool or int [B,T], 1 for real tokens; padding may stand left or right.
      segment_ids: int32 [B,T], several texts in a row, numbered from 1; 0 is padding. Attention stays inside a text
        and positions start anew in each.
      dropout_key: None switches dropout off.
      remat: what the backward pass computes again: "none", "dots" (all but matrix products), "full".
      layer: stop after this many layers, before the final norm.
    """
    cfg.check_length(tokens.shape[1])
    segments, positions = _segments(tokens, attention_mask, segment_ids)
    masks = kinds.masks(cfg, segments, positions)
    bias = alibi_bias(cfg.num_heads, cfg.head_size, positions) if cfg.alibi else None
    x = _embed(params, tokens, positions, cfg, dropout_key)
    rotaries = kinds.rotaries(cfg, positions)

    def body(block, x, state, index):
        mask, rotary = kinds.of_kind(cfg, index, masks), kinds.of_kind(cfg, index, rotaries)

        def attend(query, key, value, dropout):
            out = attention(query, key, value, mask, bias, dropout, precision(cfg.dtype), cap=cfg.attention_cap)
            return out, None

        return _apply_block(cfg, block, x, attend, rotary, index, dropout_key)[0], state

    x, _ = _layers(params["blocks"], x, (), body, cfg, layer, remat)
    return final(params, x, cfg) if layer is None else x


@functools.partial(jax.jit, static_argnames="cfg")
def prefill(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, attention_mask: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Reads prompts into an empty cache: logits float32 [B,V] at each row's last real token, and the cache."""
    x, cache = read_prompt(params, tokens, cfg, cache, attention_mask, last=True)
    return logits(params, final(params, x, cfg), cfg)[:, 0], cache


def read_prompt(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, attention_mask: jax.Array | None, last: bool
) -> tuple[jax.Array, Cache]:
    """Prompts into an empty cache: the last layer's states of every token, [B,T,hidden], or with `last` those of each
    row's last real one, [B,1,hidden]; and the cache."""
    length = tokens.shape[1]
    cfg.check_length(length)
    if length > cache.length:
        raise ValueError(f"a prompt of {length} tokens does not fit a cache of {cache.length}")
    if cfg.window and attention_mask is not None:
        tokens, attention_mask = kinds.to_the_right(tokens, attention_mask)
    segments, positions = _segments(tokens, attention_mask, None)
    masks = kinds.masks(cfg, segments, positions)
    bias = alibi_bias(cfg.num_heads, cfg.head_size, positions) if cfg.alibi else None
    rotaries = kinds.rotaries(cfg, positions)

    def body(block, x, state, index):
        mask, rotary = kinds.of_kind(cfg, index, masks), kinds.of_kind(cfg, index, rotaries)
        ring = kinds.is_ring(cfg, index, cache.length) and length > cfg.window

        def attend(query, key, value, dropout):
            pairs = zip(state, (widen(cfg, key), widen(cfg, value)), strict=True)
            keys, values = (kv.write(old, index, new, 0, ring) for old, new in pairs)
            out = attention(query, key, value, mask, bias, None, precision(cfg.dtype), cap=cfg.attention_cap)
            return out, (keys, values)

        return _apply_block(cfg, block, x, attend, rotary, index, None)

    x = _embed(params, tokens, positions, cfg, None)
    x, (keys, values) = _layers(params["blocks"], x, (cache.keys, cache.values), body, cfg)
    real = jnp.ones(tokens.shape, bool) if segments is None else segments > 0
    if last:
        end = length - 1 - jnp.argmax(jnp.flip(real, axis=1), axis=1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)
    cache = Cache(
        keys=keys,
        values=values,
        mask=jax.lax.dynamic_update_slice(cache.mask, real, (0, 0)),
        positions=real.sum(axis=1, dtype=jnp.int32),
        slot=jnp.asarray(length, jnp.int32),
    )
    return x, cache


@functools.partial(jax.jit, static_argnames="cfg")
def decode_step(params: Params, token: jax.Array, cfg: ModelConfig, cache: Cache) -> tuple[jax.Array, Cache]:
    """One token int32 [B] more in every row: the next token's logits float32 [B,V], and the cache."""
    hidden, cache = extend(params, token[:, None], cfg, cache)
    return logits(params, hidden, cfg)[:, 0], cache


@functools.partial(jax.jit, static_argnames="cfg")
def extend(params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache) -> tuple[jax.Array, Cache]:
    """Tokens int32 [B,T] more in every row: what meets the head, [B,T,width], and the cache. Padding may stand right,
    where causality hides it, if nothing is read after it."""
    x, _, cache = read(params, tokens, cfg, cache)
    return final(params, x, cfg), cache


def read(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, keep: bool = False
) -> tuple[jax.Array, Any, Cache]:
    """`extend` before the final norm: the last layer's states [B,T,hidden], with `keep` the embeddings and every
    layer's states [L+1,B,T,hidden], and the cache."""
    length = tokens.shape[1]
    mask = jax.lax.dynamic_update_slice(
        cache.mask, jnp.ones(tokens.shape, bool), (jnp.zeros_like(cache.slot), cache.slot)
    )
    seen = (
        mask[:, None] & (jnp.arange(cache.length)[None] <= (cache.slot + jnp.arange(length))[:, None])[None]
    )  # [B,T,K]
    positions = cache.positions[:, None] + jnp.arange(length)[None]
    rotaries = kinds.rotaries(cfg, positions)
    bias = before = None
    if cfg.alibi:
        first = cache.positions[:, None] - jnp.sum(cache.mask, axis=1, keepdims=True)  # position of slot 0
        bias = alibi_bias(cfg.num_heads, cfg.head_size, first + jnp.cumsum(mask, axis=1) - 1)
        if cache.prefix is not None:
            before = alibi_bias(cfg.num_heads, cfg.head_size, jnp.cumsum(cache.prefix.mask, axis=1) - 1)

    masks = kinds.cache_masks(cfg, cache, seen, positions)
    kernel = cfg.decode_kernel and length == 1 and cache.prefix is None and cache.length % BLOCK == 0

    def body(block, x, state, index):
        (seen, prefix_mask), rotary = kinds.of_kind(cfg, index, masks), kinds.of_kind(cfg, index, rotaries)
        ring = kinds.is_ring(cfg, index, cache.length)

        def attend(query, key, value, dropout):
            query, key, value = widen_query(cfg, query), widen(cfg, key), widen(cfg, value)
            pairs = list(zip(state, (key, value), strict=True))
            keys, values = (kv.write(old, index, new, cache.slot, ring) for old, new in pairs)
            if ring and length > 1:
                key, value = (kv.joined(old, index, new, cache.slot) for old, new in pairs)
            else:
                key, value = kv.read(keys, index), kv.read(values, index)
            prefix = None
            if cache.prefix is not None:
                stored = [kv.read(part, index) for part in cache.prefix[:2]]
                prefix = Prefix(stored[0], stored[1], prefix_mask, before)
            if kernel:
                return decode_attention(query, key, value, seen[:, 0], cache.slot + 1), (keys, values)
            out = attention(query, key, value, seen, bias, None, precision(cfg.dtype), prefix, cfg.attention_cap)
            return narrow(cfg, out), (keys, values)

        return _apply_block(cfg, block, x, attend, rotary, index, None)

    def keeping(block, x, state, index):
        x, caches = body(block, x, state[0], index)
        return x, (caches, state[1].at[index + 1].set(x))

    x = _embed(params, tokens, positions, cfg, None)
    states = None
    if keep:
        states = jnp.zeros((cfg.num_layers + 1, *x.shape), x.dtype).at[0].set(x)
        x, ((keys, values), states) = _layers(params["blocks"], x, ((cache.keys, cache.values), states), keeping, cfg)
    else:
        x, (keys, values) = _layers(params["blocks"], x, (cache.keys, cache.values), body, cfg)
    positions, slot = cache.positions + length, cache.slot + length
    return x, states, Cache(keys, values, mask, positions, slot, cache.prefix)


def logits(params: Params, hidden: jax.Array, cfg: ModelConfig) -> jax.Array:
    """hidden [B,T,width] times the head: float32 [B,T,V], multiplied in the compute dtype, summed in float32."""
    matrix, product = (params["head"], "btd,dv->btv") if "head" in params else (head(params, cfg), "btd,vd->btv")
    matrix = matrix.astype(cfg.dtype)
    out = jnp.einsum(product, hidden, matrix, precision=precision(cfg.dtype), preferred_element_type=jnp.float32)
    return soft_capped(sharding.constrain_batch(out, None, "model"), cfg.logit_cap)


def _segments(tokens, attention_mask, segment_ids) -> tuple[jax.Array | None, jax.Array]:
    """Segments (None: one text a row, unpadded) and each token's position in its text."""
    if segment_ids is not None:
        return segment_ids, positions_from_segments(segment_ids)
    if attention_mask is None:
        return None, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    real = jnp.asarray(attention_mask).astype(bool).astype(jnp.int32)
    return real, jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)


def _embed(params, tokens, positions, cfg, dropout_key) -> jax.Array:
    rngs = None if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, cfg.num_layers)}
    module = family(cfg).Embed(cfg)
    x = module.apply({"params": params["embed"]}, tokens, positions, dropout_key is None, rngs=rngs)
    return sharding.constrain_batch(x, None, None)


def final(params: Params, x: jax.Array, cfg: ModelConfig) -> jax.Array:
    """The last layer's states [...,hidden] as they meet the head, [...,width]: normalised and projected."""
    if cfg.skip_final_norm:
        return x
    return family(cfg).Final(cfg).apply({"params": params.get("final", {})}, x)


def _apply_block(cfg, block, x, attend, rotary, index, dropout_key):
    rngs = None if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, index)}
    module = family(cfg).Block(cfg)
    x, state = module.apply({"params": block}, x, attend, rotary, index, dropout_key is None, rngs=rngs)
    return sharding.constrain_batch(x, None, None), state


def _layers(blocks, x, state, body, cfg: ModelConfig, stop: int | None = None, remat: str = "none"):
    """Runs body(block, x, state, layer) -> (x, state) over the first `stop` layers, scanned or unrolled."""
    stop = cfg.num_layers if stop is None else stop
    policy = REMAT[remat]
    if casting.holds_late(blocks):
        body, policy = _reading(body), policy or casting.saveable
    if policy is not None:
        body = jax.checkpoint(body, policy=policy)
    if isinstance(blocks, tuple) or cfg.layer_loop == "unroll":
        for index in range(stop):
            block = blocks[index] if isinstance(blocks, tuple) else one_layer(blocks, index)
            x, state = body(block, x, state, index)
        return x, state

    def step(carry, inputs):
        block, index = inputs
        return body(block, *carry, index), None

    if stop < cfg.num_layers:
        blocks = jax.tree.map(lambda leaf: leaf[:stop], blocks)
    (x, state), _ = jax.lax.scan(step, (x, state), (blocks, jnp.arange(stop)))
    return x, state


def _reading(body):
    return lambda block, x, state, index: body(casting.read(block), x, state, index)
