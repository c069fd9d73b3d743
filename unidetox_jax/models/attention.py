"""Attention and ALiBi as pure functions.

Axes: B batch, Q queries, K keys, H query heads, N key-value heads, G = H/N query heads per key-value head, D head size,
P prefixes. Softmax is always in float32. No query has all its keys masked: padding attends to padding of its own row,
which real tokens never do.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from unidetox_jax import sharding

MASKED = -1e30  # finite: a row of -inf would be NaN after softmax
MAX_UNROLLED_GROUPS = 8  # query heads per key-value head that CPUs multiply one by one in a decoding step


class Prefix(NamedTuple):
    """Keys and values [P,N,K,D], each shared by B/P consecutive rows, which precede the rows' own.

    mask: bool [P,K], the real tokens, or [P,Q,K] if it depends on the query; bias: float [P,H,K] or None.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array
    bias: jax.Array | None = None


def positions_from_segments(segment_ids: jax.Array) -> jax.Array:
    """Each token's position within its text, int32 [B,T]; texts are runs of equal ids, 0 is padding."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segment_ids != previous, index, 0), axis=1)
    return index - start


def causal_mask(segment_ids: jax.Array | None, length: int) -> jax.Array:
    """Which keys a query attends to, bool [B or 1, Q, K]: itself and those before it in its segment."""
    causal = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids is None:
        return causal
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None = None,
    dropout: tuple[jax.Array, float] | None = None,
    precision: jax.lax.PrecisionLike = None,
    prefix: Prefix | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Scaled queries [B,Q,H,D] over keys and values [B,N,K,D] -> [B,Q,H,D].

    Args:
      mask: bool [B or 1, Q, K]; None for causal.
      bias: float [B,H,K], ALiBi's.
      dropout: (PRNG key, rate) on probabilities; ignored with a prefix.
      prefix: keys that all queries attend to before these; read once for the rows that share them.
      cap: soft cap: scores become cap · tanh(scores / cap).
    """
    batch, length, heads, size = query.shape
    groups = heads // key.shape[1]
    if dropout is None and bias is None and cap is None and length == key.shape[2] and _use_cudnn(query):
        return _cudnn_attention(query, key, value, mask)
    if mask is None:
        mask = causal_mask(None, length)
    query = query.reshape(batch, length, key.shape[1], groups, size).transpose(0, 2, 3, 1, 4)
    scores = _scores(query, key, mask, bias, precision, cap)
    if prefix is not None:
        out = _attention_with_prefix(query, scores, value, prefix, precision, cap)
    else:
        probabilities = jax.nn.softmax(scores, axis=-1)
        if dropout is not None:
            rng, rate = dropout
            keep = jax.random.bernoulli(rng, 1.0 - rate, probabilities.shape)
            probabilities = jnp.where(keep, probabilities / (1.0 - rate), 0.0)
        out = _product("bngqk,bnkd->bngqd", probabilities.astype(value.dtype), value, precision)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def _scores(query, key, mask, bias, precision, cap) -> jax.Array:
    """Scores float32 [B,N,G,Q,K] of queries [B,N,G,Q,D] and keys [B,N,K,D]; mask and bias as in `attention`."""
    scores = _product("bngqd,bnkd->bngqk", query, key, precision, jnp.float32)
    if bias is not None:
        scores += bias.reshape(*query.shape[:3], 1, -1)
    return jnp.where(mask[:, None, None], soft_cap(scores, cap), MASKED)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(x / cap); x itself if cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _product(equation: str, queries, keys, precision, dtype=None) -> jax.Array:
    """einsum of [B,N,G,Q,·] and [B,N,K,D].

    On CPUs, XLA compiles a product with one vector to a loop, but one with a few vectors to a library call per row and
    head, which is up to seven times as slow.
    """
    product = functools.partial(jnp.einsum, equation, precision=precision, preferred_element_type=dtype)
    groups, length = queries.shape[2:4]
    if length == 1 and 1 < groups <= MAX_UNROLLED_GROUPS and sharding.device_of().platform == "cpu":
        return jnp.concatenate([product(queries[:, :, g : g + 1], keys) for g in range(groups)], axis=2)
    return product(queries, keys)


def _attention_with_prefix(query, scores, value, prefix: Prefix, precision, cap) -> jax.Array:
    """Attention [B,N,G,Q,D] over a prefix and the row's own keys, whose scores are [B,N,G,Q,K].

    One matrix product multiplies a prefix with the queries of all its rows (Juravsky et al. 2024, Hydragen); one
    softmax covers both sets of keys.
    """
    prefixes, (batch, kv_heads, groups, *_) = len(prefix.key), query.shape
    samples = batch // prefixes

    def gather(x):  # [B,N,G,…] → [P,N,B/P·G,…]
        x = x.reshape(prefixes, samples, kv_heads, groups, *x.shape[3:])
        return jnp.moveaxis(x, 1, 2).reshape(prefixes, kv_heads, samples * groups, *x.shape[4:])

    def scatter(x):  # the inverse
        x = x.reshape(prefixes, kv_heads, samples, groups, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(batch, kv_heads, groups, *x.shape[4:])

    def weighted_sum(weights, value):
        return _product("bngqk,bnkd->bngqd", weights.astype(value.dtype), value, precision, jnp.float32)

    bias = prefix.bias
    if bias is not None:
        bias = jnp.tile(bias.reshape(prefixes, kv_heads, groups, -1), (1, 1, samples, 1))
    queries = gather(query)
    mask = prefix.mask[:, None] if prefix.mask.ndim == 2 else prefix.mask
    prefix_scores = _scores(queries, prefix.key, mask, bias, precision, cap)
    maximum = jnp.maximum(scores.max(-1, keepdims=True), scatter(prefix_scores.max(-1, keepdims=True)))
    weights, prefix_weights = jnp.exp(scores - maximum), jnp.exp(prefix_scores - gather(maximum))
    total = weights.sum(-1, keepdims=True) + scatter(prefix_weights.sum(-1, keepdims=True))
    out = weighted_sum(weights, value) + scatter(weighted_sum(prefix_weights, prefix.value))
    return (out / total).astype(value.dtype)


def cudnn_applies(dtype: jax.typing.DTypeLike, head_size: int) -> bool:
    """Whether cuDNN's fused attention supports them: half precision, head sizes up to 128 in multiples of 8."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_size % 8 == 0 and head_size <= 128


def _use_cudnn(query: jax.Array) -> bool:
    device = sharding.device_of()
    if device.platform != "gpu" or not cudnn_applies(query.dtype, query.shape[-1]):
        return False
    applies = _is_ampere_or_later(device.device_kind)
    _log_once("cuDNN fused attention" if applies else "XLA attention (cuDNN's needs compute capability 8.0)")
    return applies


@functools.cache
def _is_ampere_or_later(kind: str) -> bool:
    """Also true for kinds that are not here: programs are planned only for those in `devices.SPECS`, which all are."""
    return all(float(device.compute_capability) >= 8.0 for device in jax.devices() if device.device_kind == kind)


@functools.cache
def _log_once(choice: str) -> None:
    logging.info("attention: %s", choice)


def _cudnn_attention(query, key, value, mask):
    """cuDNN requires queries, keys and values with the same sharding and, with a mask, an even length."""
    batch, length, heads, _ = query.shape
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape.get("model", 1)
    axis = "model" if heads % shards == 0 else None  # else all heads are on every device
    if axis and key.shape[1] % shards:  # copy key-value heads until they split as the queries do
        copies = shards // math.gcd(key.shape[1], shards)
        key, value = (jnp.repeat(x, copies, axis=1) for x in (key, value))
    odd = mask is not None and length % 2
    if mask is not None:
        # No query attends to the padding, which itself attends to the real keys
        mask = jnp.pad(jnp.pad(mask, ((0, 0), (0, odd), (0, 0)), constant_values=True), ((0, 0), (0, 0), (0, odd)))
        mask = sharding.constrain_batch(jnp.broadcast_to(mask, (batch, *mask.shape[1:])), None, None)[:, None]
    query, key, value = (
        sharding.constrain_batch(jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))), None, axis, None)
        for x in (query, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3))
    )
    out = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=mask is None, scale=1.0, implementation="cudnn"
    )
    return out[:, :length]


def alibi_bias(num_heads: int, head_size: int, key_positions: jax.Array) -> jax.Array:
    """ALiBi (Press et al. 2022) as in Falcon: float32 [B,H,K], scaled by 1/sqrt(head size) like the scores.

    Falcon was trained with slopes, positions and their product in bfloat16.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-(2.0 ** -(math.log2(power) - 3)) * (i + 1)) for i in range(power)]
    base = 2.0 ** (-(2.0 ** -(math.log2(2 * power) - 3)))
    slopes += [base ** (2 * i + 1) for i in range(num_heads - power)]
    rounded = jnp.asarray(slopes, jnp.float32).astype(jnp.bfloat16)
    bias = rounded[None, :, None] * key_positions[:, None, :].astype(jnp.bfloat16)
    return bias.astype(jnp.float32) / math.sqrt(head_size)
