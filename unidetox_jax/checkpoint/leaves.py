"""Leaves on devices, filled from host arrays and read back, a piece at a time.

A leaf is allocated once with its sharding. A piece is some rows of its first axis (of a stacked leaf: a layer), made
where it is wanted (every device copies its own part of the host array) and written by a donated update. Where the
first axis itself is sharded (vocabularies), rows of all its shards travel side by side, because an update across
shards would make the compiler gather the whole leaf on every device.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

PIECE_BYTES = 1 << 26
TILE = 256  # side of the squares in which transposed matrices are copied: four times as fast as whole rows


# What these programs do to memory, they do compiled only: JAX_DISABLE_JIT is for those who look into a model.
_compiled = jax.disable_jit(False)


@_compiled
def allocate(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    """Zeros, made in place."""
    return _zeros(shape, np.dtype(dtype), sharding)()


@_compiled
def fill(leaf: jax.Array, first: int, rows: np.ndarray, forget: Callable[[], None]) -> jax.Array:
    """The leaf with `rows` ([n, …], any float dtype, any strides) from row `first` on; `leaf` itself is donated.

    Either some layers of a stacked leaf, or all rows of another (`first` 0). Returns when they are in place.
    `forget` is called after each piece, to free what was read of `rows`.
    """
    ways, sharding = _first_axis(leaf.sharding)
    count = len(rows) // ways  # in each shard of the first axis
    for start, stop in _pieces(leaf, count, ways):

        def part(index, start=start, stop=stop, dtype=leaf.dtype):
            base = (index[0].start or 0) * count
            return copied(rows[base + start : base + stop][(slice(None), *index[2:])], dtype)[None]

        piece = jax.make_array_from_callback((ways, stop - start, *leaf.shape[1:]), sharding, part)
        leaf = _update(leaf.sharding, ways)(leaf, piece, first + start)
        leaf.block_until_ready()  # else pieces pile up in host memory
        forget()
    return leaf


@_compiled
def fetch(leaf: jax.Array | np.ndarray, first: int, count: int) -> np.ndarray:
    """Rows `first` to `first + count` of a leaf in host memory, [count, …]; on every process, where there are many.

    Either some layers of a stacked leaf, or all rows of another. All processes must call it. Leaves that were made
    elsewhere (NumPy's, or without a mesh) will do.
    """
    if not isinstance(leaf, jax.Array):
        return leaf[first : first + count]
    ways, sharding = 1, None
    if isinstance(leaf.sharding, NamedSharding):
        ways, sharding = _first_axis(leaf.sharding)
    rows = np.empty((ways, count // ways, *leaf.shape[1:]), leaf.dtype)
    for start, stop in _pieces(leaf, count // ways, ways):
        piece = _slice(sharding, ways, stop - start)(leaf, first + start)
        whole = piece.is_fully_addressable
        rows[:, start:stop] = piece if whole else multihost_utils.process_allgather(piece, tiled=True)
    return rows.reshape(count, *leaf.shape[1:])


def copied(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous copy in another float dtype; fast for transposed views, which conversion is made of."""
    out = np.empty(view.shape, dtype)
    if view.ndim < 2 or view.flags.c_contiguous:
        out[...] = view
        return out
    columns = range(0, view.shape[-1], TILE)
    for row in range(0, view.shape[-2], TILE):
        for column in columns:
            tile = (..., slice(row, row + TILE), slice(column, column + TILE))
            out[tile] = view[tile]
    return out


def _pieces(leaf: jax.Array, count: int, ways: int) -> list[tuple[int, int]]:
    """(start, stop) of pieces of about PIECE_BYTES over `count` rows of every shard."""
    row_bytes = ways * math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _first_axis(sharding: Any) -> tuple[int, NamedSharding]:
    """(shards of the first axis, sharding of a leaf reshaped to [shards, rows of each, …])."""
    first, *rest = sharding.spec or (None,)
    axes = first if isinstance(first, tuple) else (first,)
    ways = math.prod(sharding.mesh.shape[axis] for axis in axes if axis)
    return ways, NamedSharding(sharding.mesh, PartitionSpec(first, None, *rest))


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _update(sharding: NamedSharding, ways: int):
    def update(leaf, piece, start):
        split = leaf.reshape(ways, -1, *leaf.shape[1:])
        return jax.lax.dynamic_update_slice_in_dim(split, piece, start, axis=1).reshape(leaf.shape)

    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _slice(sharding: NamedSharding | None, ways: int, count: int):
    def rows(leaf, start):
        split = leaf.reshape(ways, -1, *leaf.shape[1:])
        return jax.lax.dynamic_slice_in_dim(split, start, count, axis=1)

    return jax.jit(rows, out_shardings=sharding)
