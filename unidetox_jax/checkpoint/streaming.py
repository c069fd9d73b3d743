"""Sharded device arrays, filled from host arrays and read back one piece at a time.

An array is allocated once with its sharding. A piece is a range of rows of its first axis (layers, for parameters
stacked over layers); each device copies only its own part of the host array, and a donated update writes it in place.
If the first axis itself is sharded (vocabularies), a piece holds rows of every shard, because an update across shards
would make the compiler gather the whole array on every device.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

T = TypeVar("T")

PIECE_BYTES = 1 << 26
TILE = 256  # side of the squares in which transposed matrices are copied: four times as fast as whole rows


# The memory bounds hold for compiled programs only, so JAX_DISABLE_JIT (for debugging a model) does not apply here.
_compiled = jax.disable_jit(False)


@_compiled
def allocate(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    """Zeros, created directly in their shards."""
    return _zeros(shape, np.dtype(dtype), sharding)()


@_compiled
def write_rows(array: jax.Array, first: int, rows: np.ndarray, release: Callable[[], None]) -> jax.Array:
    """The array with `rows` ([n, …], any float dtype, any strides) from row `first` on; `array` is donated.

    Rows are some layers of a stacked array, or all rows of another (`first` 0). Returns once they are in place.
    `release` is called after each piece, to free the pages of `rows` that were read.
    """
    shards, sharding = _split_first_axis(array.sharding)
    rows_per_shard = len(rows) // shards
    for start, stop in _pieces(array, rows_per_shard, shards):

        def local_part(index, start=start, stop=stop, dtype=array.dtype):
            base = (index[0].start or 0) * rows_per_shard
            return cast_copy(rows[base + start : base + stop][(slice(None), *index[2:])], dtype)[None]

        piece = jax.make_array_from_callback((shards, stop - start, *array.shape[1:]), sharding, local_part)
        array = _update(array.sharding, shards)(array, piece, first + start)
        array.block_until_ready()  # otherwise pieces pile up in host memory
        release()
    return array


@_compiled
def read_rows(array: jax.Array | np.ndarray, first: int, count: int) -> np.ndarray:
    """Rows `first` to `first + count` in host memory, [count, …], on every process; all processes must call it.

    Rows are some layers of a stacked array, or all rows of another. Also takes NumPy arrays and arrays without a mesh.
    """
    if not isinstance(array, jax.Array):
        return array[first : first + count]
    shards, sharding = 1, None
    if isinstance(array.sharding, NamedSharding):
        shards, sharding = _split_first_axis(array.sharding)
    rows = np.empty((shards, count // shards, *array.shape[1:]), array.dtype)
    for start, stop in _pieces(array, count // shards, shards):
        piece = _slice(sharding, shards, stop - start)(array, first + start)
        local = piece.is_fully_addressable
        rows[:, start:stop] = piece if local else multihost_utils.process_allgather(piece, tiled=True)
    return rows.reshape(count, *array.shape[1:])


def cast_copy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous copy in another float dtype; fast for transposed views, which most of conversion is."""
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


def group_by_bytes(items: Sequence[T], sizes: Sequence[int], limit: int) -> list[list[T]]:
    """The items in consecutive groups of at most `limit` bytes; a larger item is a group of its own."""
    groups: list[list[T]] = []
    room = 0
    for item, size in zip(items, sizes, strict=True):
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= size
    return groups


def _pieces(array: jax.Array, rows_per_shard: int, shards: int) -> list[tuple[int, int]]:
    """(start, stop) within every shard, of pieces of about PIECE_BYTES."""
    row_bytes = shards * math.prod(array.shape[1:]) * array.dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    return [(start, min(start + step, rows_per_shard)) for start in range(0, rows_per_shard, step)]


def _split_first_axis(sharding: Any) -> tuple[int, NamedSharding]:
    """(shards of the first axis, sharding of the array reshaped to [shards, rows of each, …])."""
    first, *rest = sharding.spec or (None,)
    axes = first if isinstance(first, tuple) else (first,)
    shards = math.prod(sharding.mesh.shape[axis] for axis in axes if axis)
    return shards, NamedSharding(sharding.mesh, PartitionSpec(first, None, *rest))


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _update(sharding: NamedSharding, shards: int):
    def update(array, piece, start):
        split = array.reshape(shards, -1, *array.shape[1:])
        return jax.lax.dynamic_update_slice_in_dim(split, piece, start, axis=1).reshape(array.shape)

    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _slice(sharding: NamedSharding | None, shards: int, count: int):
    def rows(array, start):
        split = array.reshape(shards, -1, *array.shape[1:])
        return jax.lax.dynamic_slice_in_dim(split, start, count, axis=1)

    return jax.jit(rows, out_shardings=sharding)
