"""Attention of one new token on a GPU, in one kernel that reads the live slots of a cache and no others.

XLA's own program for it reads all slots, keys and values in two kernels, at a third of the memory's bandwidth. With
this one a cache has its full length from the beginning, and decoding is one loop in place of one for each segment.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh

from unidetox_jax import sharding
from unidetox_jax.models.config import ModelConfig

BLOCK = 32  # slots read at a time; a cache has a multiple. On an H200 it reads 3.4 TB/s, 3.0 by 64 and 2.4 by 128
_ROWS = 16  # query heads of a key-value head, filled up: the least that a matrix product takes
_LOWEST = -1e30  # finite, as in `attention`


def applies(cfg: ModelConfig, mesh: Mesh | None) -> bool:
    """Whether steps take it: on one GPU, in half precision, with heads of 16, 32, 64, 128 or 256, and without biases,
    soft caps and windows."""
    return (
        sharding.device_of(mesh).platform == "gpu"
        and (mesh is None or mesh.size == 1)
        and jnp.dtype(cfg.dtype).itemsize == 2
        and cfg.head_size in (16, 32, 64, 128, 256)
        and cfg.num_heads // cfg.num_kv_heads <= _ROWS
        and not (cfg.alibi or cfg.attention_cap or cfg.window)
    )


def decode_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, live: jax.Array, interpret: bool = False
) -> jax.Array:
    """Scaled queries [B,1,H,D] over keys and values [B,N,K,D] → [B,1,H,D], softmax in float32.

    Args:
      mask: bool [B,K], the slots that a row sees, at least one.
      live: int32, how many slots there are to read; K is a multiple of `BLOCK`.
      interpret: run it anywhere, for tests.
    """
    batch, _, heads, size = query.shape
    kv_heads, slots = key.shape[1:3]
    groups = heads // kv_heads
    query = query.reshape(batch, kv_heads, groups, size)
    of_head = lambda row, head: (row, head, 0, 0)  # noqa: E731
    out = pl.pallas_call(
        functools.partial(_kernel, groups=groups),
        grid=(batch, kv_heads),
        in_specs=[
            pl.BlockSpec((), lambda row, head: ()),
            pl.BlockSpec((None, slots), lambda row, head: (row, 0)),
            pl.BlockSpec((None, None, _ROWS, size), of_head),
            pl.BlockSpec((None, None, slots, size), of_head),
            pl.BlockSpec((None, None, slots, size), of_head),
        ],
        out_specs=pl.BlockSpec((None, None, _ROWS, size), of_head),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=triton.CompilerParams(num_warps=2, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )(live, mask.astype(jnp.int8), query, key, value)
    return out.reshape(batch, 1, heads, size)


def _kernel(live, mask, query, key, value, out, *, groups: int):
    """One row and key-value head; an online softmax over blocks of slots (Milakov & Gimelshein 2018)."""
    real = (jnp.arange(_ROWS) < groups)[:, None]
    queries = triton.load(query.at[...], mask=real, other=0.0)

    def block(index, carry):
        highest, total, weighed = carry
        at = pl.ds(index * BLOCK, BLOCK)
        scores = triton.dot(queries, key[at, :].T)
        scores = jnp.where(mask[at][None] > 0, scores, _LOWEST)
        higher = jnp.maximum(highest, scores.max(-1))
        weights, before = jnp.exp(scores - higher[:, None]), jnp.exp(highest - higher)
        more = triton.dot(weights.astype(value.dtype), value[at, :])
        return higher, total * before + weights.sum(-1), weighed * before[:, None] + more

    size = queries.shape[1]
    start = (jnp.full(_ROWS, _LOWEST), jnp.zeros(_ROWS), jnp.zeros((_ROWS, size)))
    _, total, weighed = jax.lax.fori_loop(0, pl.cdiv(live[()], BLOCK), block, start)
    triton.store(out.at[...], (weighed / total[:, None]).astype(out.dtype), mask=real)
