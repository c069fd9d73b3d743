"""Attention and ALiBi: pure functions on arrays.

Letters: B batch, Q queries, K keys, H query heads, N key-value heads, G = H/N query heads a key-value head, D head
size, P prefixes. Softmax is in float32 whatever the inputs are. A query whose keys are all masked cannot occur:
padding attends to padding of its own row, real tokens never do.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from unidetox_jax import sharding

MASKED = -1e30  # finite: a row of -inf would be NaN after softmax
MOST_VECTORS = 8  # query heads of one token and key-value head that CPUs take one by one


class Prefix(NamedTuple):
    """Keys and values that B/P rows in succession have before their own: [P,N,K,D]; mask: bool [P,K], the real ones,
    or [P,Q,K] where queries see others; bias: float [P,H,K] or None."""

    key: jax.Array
    value: jax.Array
    mask: jax.Array
    bias: jax.Array | None = None


def positions_from_segments(segment_ids: jax.Array) -> jax.Array:
    """Position of each token in its own text, [B, T] int32; segments are runs of equal ids, 0 is padding."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segment_ids != previous, index, 0), axis=1)
    return index - start


def causal_mask(segment_ids: jax.Array | None, length: int) -> jax.Array:
    """Which keys a query sees, bool [B or 1, Q, K]: those before it and itself, in its own segment."""
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

    mask: bool [B or 1, Q, K], None for causal; bias: float [B, H, K] (ALiBi); dropout: (key, rate) on probabilities,
    where there is no prefix; prefix: what all queries see before these keys, read once for all the rows that share it;
    cap: scores become cap · tanh(scores / cap).
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
        out = _with_prefix(query, scores, value, prefix, precision, cap)
    else:
        probabilities = jax.nn.softmax(scores, axis=-1)
        if dropout is not None:
            rng, rate = dropout
            keep = jax.random.bernoulli(rng, 1.0 - rate, probabilities.shape)
            probabilities = jnp.where(keep, probabilities / (1.0 - rate), 0.0)
        out = _product("bngqk,bnkd->bngqd", probabilities.astype(value.dtype), value, precision)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def _scores(query, key, mask, bias, precision, cap) -> jax.Array:
    """Queries [B,N,G,Q,D] by keys [B,N,K,D]: float32 [B,N,G,Q,K]; mask and bias as in `attention`."""
    scores = _product("bngqd,bnkd->bngqk", query, key, precision, jnp.float32)
    if bias is not None:
        scores += bias.reshape(*query.shape[:3], 1, -1)
    return jnp.where(mask[:, None, None], soft_capped(scores, cap), MASKED)


def soft_capped(x: jax.Array, cap: float | None) -> jax.Array:
    """x within ±cap, smoothly; None: as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _product(equation: str, queries, keys, precision, dtype=None) -> jax.Array:
    """einsum of [B,N,G,Q,·] and [B,N,K,D]. On CPU the product with one vector is a loop of the compiler's; with a few
    it is a library call for each row and head, up to seven times as slow."""
    product = functools.partial(jnp.einsum, equation, precision=precision, preferred_element_type=dtype)
    groups, length = queries.shape[2:4]
    if length == 1 and 1 < groups <= MOST_VECTORS and sharding.device_of().platform == "cpu":
        return jnp.concatenate([product(queries[:, :, g : g + 1], keys) for g in range(groups)], axis=2)
    return product(queries, keys)


def _with_prefix(query, scores, value, prefix: Prefix, precision, cap) -> jax.Array:
    """Attention over a prefix and a row's own keys, of which the scores [B,N,G,Q,K] are given: [B,N,G,Q,D].

    A prefix meets the queries of all its rows in one matrix product (Juravsky et al. 2024, Hydragen); one softmax goes
    over both.
    """
    prefixes, (batch, kv_heads, groups, *_) = len(prefix.key), query.shape
    samples = batch // prefixes

    def gather(x):  # [B,N,G,…] → [P,N,B/P·G,…]
        x = x.reshape(prefixes, samples, kv_heads, groups, *x.shape[3:])
        return jnp.moveaxis(x, 1, 2).reshape(prefixes, kv_heads, samples * groups, *x.shape[4:])

    def scatter(x):  # and back
        x = x.reshape(prefixes, kv_heads, samples, groups, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(batch, kv_heads, groups, *x.shape[4:])

    def weigh(weights, value):
        return _product("bngqk,bnkd->bngqd", weights.astype(value.dtype), value, precision, jnp.float32)

    bias = prefix.bias
    if bias is not None:
        bias = jnp.tile(bias.reshape(prefixes, kv_heads, groups, -1), (1, 1, samples, 1))
    each = (slice(None), None) if prefix.mask.ndim == 2 else ...
    shared = _scores(gather(query), prefix.key, prefix.mask[each], bias, precision, cap)
    highest = jnp.maximum(scores.max(-1, keepdims=True), scatter(shared.max(-1, keepdims=True)))
    own, before = jnp.exp(scores - highest), jnp.exp(shared - gather(highest))
    total = own.sum(-1, keepdims=True) + scatter(before.sum(-1, keepdims=True))
    return ((weigh(own, value) + scatter(weigh(before, prefix.value))) / total).astype(value.dtype)


def cudnn_applies(dtype: jax.typing.DTypeLike, head_size: int) -> bool:
    """Whether cuDNN's fused attention takes these: half precision, a head size that is a multiple of 8 up to 128."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_size % 8 == 0 and head_size <= 128


def _use_cudnn(query: jax.Array) -> bool:
    """Where it applies, on Ampere or later."""
    device = sharding.device_of()
    if device.platform != "gpu" or not cudnn_applies(query.dtype, query.shape[-1]):
        return False
    applies = _is_ampere_or_later(device.device_kind)
    _log_once("cuDNN fused attention" if applies else "XLA attention (cuDNN's needs compute capability 8.0)")
    return applies


@functools.cache
def _is_ampere_or_later(kind: str) -> bool:
    """A kind that is not here is compiled for (`devices.SPECS`), and all of those are."""
    return all(float(device.compute_capability) >= 8.0 for device in jax.devices() if device.device_kind == kind)


@functools.cache
def _log_once(choice: str) -> None:
    logging.info("attention: %s", choice)


def _cudnn_attention(query, key, value, mask):
    """cuDNN wants queries, keys and values cut in one way over the mesh, and with a mask an even length."""
    batch, length, heads, _ = query.shape
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape.get("model", 1)
    axis = "model" if heads % ways == 0 else None  # else all heads are on every device
    if axis and key.shape[1] % ways:  # as many copies of key-value heads as make them split with the queries'
        copies = ways // math.gcd(key.shape[1], ways)
        key, value = (jnp.repeat(x, copies, axis=1) for x in (key, value))
    odd = mask is not None and length % 2
    if mask is not None:
        # What fills up is seen by nobody, and sees the keys that there are
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
    """ALiBi (Press et al. 2022) as Falcon has it: float32 [B, H, K], scaled by 1/sqrt(head size) with the scores.

    Falcon computes slopes, positions and their product in bfloat16, and was trained so: it is part of the model.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-(2.0 ** -(math.log2(power) - 3)) * (i + 1)) for i in range(power)]
    base = 2.0 ** (-(2.0 ** -(math.log2(2 * power) - 3)))
    slopes += [base ** (2 * i + 1) for i in range(num_heads - power)]
    rounded = jnp.asarray(slopes, jnp.float32).astype(jnp.bfloat16)
    bias = rounded[None, :, None] * key_positions[:, None, :].astype(jnp.bfloat16)
    return bias.astype(jnp.float32) / math.sqrt(head_size)
