"""The next batches are made and sent to the devices by a thread while the step runs."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np


def place(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """A batch that every host has, as global arrays: each device receives its own rows and nothing else.

    The rows' number must be a multiple of the sharding's axes (`Batches(row_multiple=…)`).
    """
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__) for name, array in batch.items()
    }


class Prefetch:
    """Iterates over (step, make(step)) for steps start … stop-1, made ahead by one thread.

    Use it as a context manager: leaving it ends the thread. An exception of `make` is raised where the item would
    have come.

    Args:
      make: step -> item, called in order, on the thread.
      start, stop: the steps.
      depth: items that wait, at most.
    """

    def __init__(self, make: Callable[[int], Any], start: int, stop: int, depth: int = 2):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, start, stop), name="prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        while not self._closed.is_set():
            step, item, error = self._queue.get()
            if step is None:
                self._closed.set()
                if error is not None:
                    raise error
                return
            yield step, item

    def close(self) -> None:
        """Ends the thread and drops what it made; doing it twice does no harm."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.02)

    def _work(self, make: Callable[[int], Any], start: int, stop: int) -> None:
        try:
            for step in range(start, stop):
                if self._closed.is_set():
                    return
                self._put((step, make(step), None))
            self._put((None, None, None))
        except BaseException as error:  # it belongs to the loop that waits for the item
            self._put((None, None, error))

    def _put(self, entry: tuple) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue
