"""The next batches are made and sent to the devices by a thread while the step runs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

WAITING = 2  # items made and not yet asked for, at most


def place(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """A batch that every host has, as global arrays: each device receives its own rows and nothing else.

    The rows' number must be a multiple of the sharding's axes (`Batches(row_multiple=…)`).
    """
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__) for name, array in batch.items()
    }


@contextlib.contextmanager
def ahead(make: Callable[[int], Any], start: int, stop: int) -> Iterator[Iterator[Any]]:
    """make(start), …, make(stop - 1), made by one thread while what came before is used.

    An exception of `make` is raised where the item would have come. Leaving the context ends the thread.
    """
    import grain  # seconds of imports, and only training needs it

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=WAITING)
    items = iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options))
    try:
        yield items
    finally:
        items.close()
