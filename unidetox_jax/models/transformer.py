"""Forward, prefill and decoding steps over any family's blocks: pure functions of (params, tokens, cfg).

Each is jitted with a static configuration and can be called alone or inside another jitted function. All run the same
`Block`; they differ in the `attend` that they pass to it.

Axes: B batch, T time, V vocabulary, L layers, N key-value heads, D head size.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unidetox_jax import sharding
from unidetox_jax.models import cache as kv
from unidetox_jax.models import casting, local_attention
from unidetox_jax.models.attention import (
    Prefix,
    alibi_bias,
    attention,
    positions_from_segments,
    soft_cap,
)
from unidetox_jax.models.cache import Cache
from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.decode_attention import BLOCK, decode_attention
from unidetox_jax.models.layers import precision, weights_first
from unidetox_jax.models.parameters import Params, head, one_layer
from unidetox_jax.models.registry import family
from unidetox_jax.models.wide_heads import narrow, widen, widen_query

FEW_ROWS = 64  # up to which a CPU multiplies faster with the head's matrix first


def _dots(primitive: Any, *values: Any, **settings: Any) -> bool:
    """Saves results of matrix products without batch axes, and of cuDNN's attention, which is as expensive."""
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
    """Logits float32 [B,T,V] of tokens int32 [B,T]; arguments as in `hidden_states`."""
    hidden = hidden_states(
        params, tokens, cfg, attention_mask, segment_ids=segment_ids, dropout_key=dropout_key, remat=remat
    )
    return logits(params, hidden, cfg)


@functools.partial(jax.jit, static_argnames=("cfg", "remat"))
def hidden_states(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    attention_mask: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    remat: str = "none",
) -> jax.Array:
    """The head's input, [B,T,width] in the compute dtype.

    Args:
      tokens: int32 [B,T].
      attention_mask: bool or int [B,T], 1 for real tokens; padding may be on either side.
      segment_ids: int32 [B,T], texts packed in a row, numbered from 1; 0 is padding. Attention stays within a text, and
        positions restart in each.
      dropout_key: None switches dropout off.
      remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full".
    """
    cfg.check_length(tokens.shape[1])
    segments, positions = _segments(tokens, attention_mask, segment_ids)
    masks = local_attention.masks(cfg, segments, positions)
    bias = alibi_bias(cfg.num_heads, cfg.head_size, positions) if cfg.alibi else None
    x = _embed(params, tokens, positions, cfg, dropout_key)
    rotaries = local_attention.rotary_pair(cfg, positions)

    def body(block, x, state, index):
        mask, rotary = local_attention.select(cfg, index, masks), local_attention.select(cfg, index, rotaries)

        def attend(query, key, value, dropout):
            out = attention(query, key, value, mask, bias, dropout, precision(cfg.dtype), cap=cfg.attention_cap)
            return out, None

        return _apply_block(cfg, block, x, attend, rotary, index, dropout_key)[0], state

    x, _ = _layers(params["blocks"], x, (), body, cfg, remat)
    return head_input(params, x, cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def prefill(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, attention_mask: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Reads prompts into an empty cache: logits float32 [B,V] at each row's last real token, and the cache."""
    x, cache = prefill_layers(params, tokens, cfg, cache, attention_mask, last=True)
    return logits(params, head_input(params, x, cfg), cfg)[:, 0], cache


def prefill_layers(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, attention_mask: jax.Array | None, last: bool
) -> tuple[jax.Array, Cache]:
    """`prefill` up to the last layer: its output at every token, [B,T,hidden], and the cache.

    last: only at each row's last real token, [B,1,hidden].
    """
    length = tokens.shape[1]
    cfg.check_length(length)
    if length > cache.length:
        raise ValueError(f"a prompt of {length} tokens does not fit a cache of {cache.length}")
    if cfg.window and attention_mask is not None:
        tokens, attention_mask = local_attention.left_padded(tokens, attention_mask)
    segments, positions = _segments(tokens, attention_mask, None)
    masks = local_attention.masks(cfg, segments, positions)
    bias = alibi_bias(cfg.num_heads, cfg.head_size, positions) if cfg.alibi else None
    rotaries = local_attention.rotary_pair(cfg, positions)

    def body(block, x, state, index):
        mask, rotary = local_attention.select(cfg, index, masks), local_attention.select(cfg, index, rotaries)
        ring = local_attention.is_ring(cfg, index, cache.length) and length > cfg.window

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
    """Appends a token int32 [B] to every row: the next token's logits float32 [B,V], and the cache."""
    hidden, cache = extend(params, token[:, None], cfg, cache)
    return logits(params, hidden, cfg)[:, 0], cache


@functools.partial(jax.jit, static_argnames="cfg")
def extend(params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache) -> tuple[jax.Array, Cache]:
    """Appends tokens int32 [B,T] to every row: the head's input [B,T,width], and the cache.

    Right padding is allowed if nothing is appended after it.
    """
    x, _, cache = extend_layers(params, tokens, cfg, cache)
    return head_input(params, x, cfg), cache


def extend_layers(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, all_layers: bool = False
) -> tuple[jax.Array, Any, Cache]:
    """`extend` up to the last layer: its output [B,T,hidden]; None or, with `all_layers`, the embeddings and every
    layer's output [L+1,B,T,hidden]; and the cache."""
    length = tokens.shape[1]
    mask = jax.lax.dynamic_update_slice(
        cache.mask, jnp.ones(tokens.shape, bool), (jnp.zeros_like(cache.slot), cache.slot)
    )
    causal = (
        mask[:, None] & (jnp.arange(cache.length)[None] <= (cache.slot + jnp.arange(length))[:, None])[None]
    )  # [B,T,K]
    positions = cache.positions[:, None] + jnp.arange(length)[None]
    rotaries = local_attention.rotary_pair(cfg, positions)
    bias = prefix_bias = None
    if cfg.alibi:
        first = cache.positions[:, None] - jnp.sum(cache.mask, axis=1, keepdims=True)  # position of slot 0
        bias = alibi_bias(cfg.num_heads, cfg.head_size, first + jnp.cumsum(mask, axis=1) - 1)
        if cache.prefix is not None:
            prefix_bias = alibi_bias(cfg.num_heads, cfg.head_size, jnp.cumsum(cache.prefix.mask, axis=1) - 1)

    masks = local_attention.cache_masks(cfg, cache, causal, positions)
    kernel = cfg.decode_kernel and length == 1 and cache.prefix is None and cache.length % BLOCK == 0

    def body(block, x, state, index):
        (visible, prefix_mask), rotary = (
            local_attention.select(cfg, index, masks),
            local_attention.select(cfg, index, rotaries),
        )
        ring = local_attention.is_ring(cfg, index, cache.length)

        def attend(query, key, value, dropout):
            query, key, value = widen_query(cfg, query), widen(cfg, key), widen(cfg, value)
            pairs = list(zip(state, (key, value), strict=True))
            keys, values = (kv.write(old, index, new, cache.slot, ring) for old, new in pairs)
            if ring and length > 1:
                key, value = (kv.append_to_ring(old, index, new, cache.slot) for old, new in pairs)
            else:
                key, value = kv.read(keys, index), kv.read(values, index)
            prefix = None
            if cache.prefix is not None:
                prefix_key, prefix_value = kv.read(cache.prefix.keys, index), kv.read(cache.prefix.values, index)
                prefix = Prefix(prefix_key, prefix_value, prefix_mask, prefix_bias)
            if kernel:
                return decode_attention(query, key, value, visible[:, 0], cache.slot + 1), (keys, values)
            out = attention(query, key, value, visible, bias, None, precision(cfg.dtype), prefix, cfg.attention_cap)
            return narrow(cfg, out), (keys, values)

        return _apply_block(cfg, block, x, attend, rotary, index, None)

    def recording(block, x, state, index):
        x, caches = body(block, x, state[0], index)
        return x, (caches, state[1].at[index + 1].set(x))

    x = _embed(params, tokens, positions, cfg, None)
    states = None
    if all_layers:
        states = jnp.zeros((cfg.num_layers + 1, *x.shape), x.dtype).at[0].set(x)
        x, ((keys, values), states) = _layers(params["blocks"], x, ((cache.keys, cache.values), states), recording, cfg)
    else:
        x, (keys, values) = _layers(params["blocks"], x, (cache.keys, cache.values), body, cfg)
    positions, slot = cache.positions + length, cache.slot + length
    return x, states, Cache(keys, values, mask, positions, slot, cache.prefix)


def logits(params: Params, hidden: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Logits float32 [B,T,V] of the head's input [B,T,width]; multiplied in the compute dtype, summed in float32."""
    matrix, (rows, length, _) = head(params, cfg).astype(cfg.dtype), hidden.shape
    if length == 1 and rows <= FEW_ROWS and sharding.device_of().platform == "cpu":
        out = weights_first(matrix, hidden, 1, precision(cfg.dtype), jnp.float32)
    else:
        out = jnp.einsum(
            "btd,vd->btv", hidden, matrix, precision=precision(cfg.dtype), preferred_element_type=jnp.float32
        )
    return soft_cap(sharding.constrain_batch(out, None, "model"), cfg.logit_cap)


def _segments(tokens, attention_mask, segment_ids) -> tuple[jax.Array | None, jax.Array]:
    """Segment ids (None: one text per row, unpadded) and each token's position in its text."""
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


def head_input(params: Params, x: jax.Array, cfg: ModelConfig) -> jax.Array:
    """The last layer's output [...,hidden], normalised and projected for the head: [...,width]."""
    if cfg.skip_final_norm:
        return x
    return family(cfg).Final(cfg).apply({"params": params.get("final", {})}, x)


def _apply_block(cfg, block, x, attend, rotary, index, dropout_key):
    rngs = None if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, index)}
    module = family(cfg).Block(cfg)
    x, state = module.apply({"params": block}, x, attend, rotary, index, dropout_key is None, rngs=rngs)
    return sharding.constrain_batch(x, None, None), state


def _layers(blocks, x, state, body, cfg: ModelConfig, remat: str = "none"):
    """Runs body(block, x, state, layer) -> (x, state) over all layers, scanned or unrolled."""
    policy = REMAT[remat]
    if casting.has_deferred(blocks):
        body, policy = _with_casts(body), policy or casting.save_all_but_casts
    if policy is not None:
        body = jax.checkpoint(body, policy=policy)
    if isinstance(blocks, tuple) or cfg.layer_loop == "unroll":
        for index in range(cfg.num_layers):
            block = blocks[index] if isinstance(blocks, tuple) else one_layer(blocks, index)
            x, state = body(block, x, state, index)
        return x, state

    def step(carry, inputs):
        block, index = inputs
        return body(block, *carry, index), None

    (x, state), _ = jax.lax.scan(step, (x, state), (blocks, jnp.arange(cfg.num_layers)))
    return x, state


def _with_casts(body):
    return lambda block, x, state, index: body(casting.resolve(block), x, state, index)
