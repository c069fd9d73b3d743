"""The next batches are made and sent to the devices by a thread while the step runs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

WAITING = 2  # items made and not yet asked for, at most


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
