"""Attention of one new token on a GPU: a kernel that reads only the cache's used slots.

XLA's program reads all slots, keys and values in two kernels, at a third of the memory bandwidth. With this kernel a
cache has its full length from the start, and decoding is one loop instead of one per segment.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh

from unidetox_jax import sharding
from unidetox_jax.models.config import ModelConfig

BLOCK = 32  # slots per read, of which a cache has a multiple. An H200 reads 3.4 TB/s with 32, 3.0 with 64, 2.4 with 128
_ROWS = 16  # query heads per key-value head after padding: the minimum for Triton's matrix product
_MASKED = -1e30  # finite, as in `attention`


def applies(cfg: ModelConfig, mesh: Mesh | None) -> bool:
    """Whether decoding uses the kernel: on one GPU, in half precision, with head sizes of 16, 32, 64, 128 or 256 and
    without ALiBi, soft caps and windows."""
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
      mask: bool [B,K], the slots that a row attends to, at least one.
      live: int32, how many slots are in use; K is a multiple of `BLOCK`.
      interpret: run on any device, for tests.
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
    """One row and key-value head: an online softmax over blocks of slots (Milakov & Gimelshein 2018)."""
    real = (jnp.arange(_ROWS) < groups)[:, None]
    queries = triton.load(query.at[...], mask=real, other=0.0)

    def block(index, carry):
        maximum, total, weighted = carry
        slots = pl.ds(index * BLOCK, BLOCK)
        scores = triton.dot(queries, key[slots, :].T)
        scores = jnp.where(mask[slots][None] > 0, scores, _MASKED)
        new_maximum = jnp.maximum(maximum, scores.max(-1))
        weights, rescale = jnp.exp(scores - new_maximum[:, None]), jnp.exp(maximum - new_maximum)
        added = triton.dot(weights.astype(value.dtype), value[slots, :])
        return new_maximum, total * rescale + weights.sum(-1), weighted * rescale[:, None] + added

    size = queries.shape[1]
    start = (jnp.full(_ROWS, _MASKED), jnp.zeros(_ROWS), jnp.zeros((_ROWS, size)))
    _, total, weighted = jax.lax.fori_loop(0, pl.cdiv(live[()], BLOCK), block, start)
    triton.store(out.at[...], (weighted / total[:, None]).astype(out.dtype), mask=real)
