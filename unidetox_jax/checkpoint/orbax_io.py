"""Saves and restores trees of arrays with Orbax, and manages a training run's series of checkpoints.

A tree is always restored into an explicit target (shapes, dtypes, shardings): it can be read on any mesh, and each
process reads only its own part. Two of Orbax's defaults are changed: it would copy the whole tree to host memory before
writing, and compress the weights (half the speed, to save 8 % of the size). Orbax leaves what it has read in reference
cycles, hence the garbage collection after each group of leaves.
"""

import contextlib
import gc
import logging as standard_logging
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from unidetox_jax import storage
from unidetox_jax.checkpoint.streaming import group_by_bytes
from unidetox_jax.errors import UserError
from unidetox_jax.sharding import path_string

CHUNK_BYTES = 1 << 26  # of one read or write; small enough for meshes that shard a leaf differently
CONCURRENT_BYTES = 1 << 28  # of leaves moved at the same time; a larger leaf is moved alone

Leaf = tuple[tuple[int, ...], str]  # shape, dtype's name


def _silence_orbax(previous=sys.unraisablehook) -> None:
    """Filters Orbax's log and tracebacks of errors that have already been reported in one line.

    Orbax logs a dozen lines per save. After a restore has failed on a damaged file, TensorStore delivers outstanding
    reads, at any later time, to an event loop that is closed; when the disk is full, every write fails, and asyncio
    reports all but the first when it frees them.
    """

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    absl_log, asyncio_log = standard_logging.getLogger("absl"), standard_logging.getLogger("asyncio")
    absl_log.addFilter(lambda record: "orbax" not in record.pathname.replace("orbax_io", ""))
    asyncio_log.addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    sys.unraisablehook = hook


_silence_orbax()


def save_tree(directory: epath.PathLike, tree: Any) -> None:
    """Writes a tree of `jax.Array` to `directory`, which must not exist; returns once it is on disk.

    Every process calls it. Host memory holds about one leaf's local part at a time.

    Raises:
      UserError: it cannot be written.
    """
    directory = storage.absolute(directory)
    with _user_errors(f"{directory}: cannot be written"), _checkpointer(tree) as checkpointer:
        checkpointer.save(directory, args=_save_args(tree))


def restore_tree(directory: epath.PathLike, target: Any) -> Any:
    """Reads what `save_tree` wrote into the shapes, dtypes and shardings of `target` (ShapeDtypeStructs).

    Raises:
      UserError: no such directory, damaged files, or leaves or shapes that differ from the target's (the first one).
    """
    directory = storage.absolute(directory)
    with _user_errors(f"{directory}: cannot be read"), _checkpointer(target) as checkpointer:
        difference = _first_difference(_saved_leaves(checkpointer.metadata(directory)), target)
        if difference:
            raise UserError(f"{directory}: {difference}")
        return _restore_in_groups(checkpointer, directory, target)


def _restore_in_groups(checkpointer: ocp.Checkpointer, directory: epath.Path, target: Any) -> Any:
    """The restored tree, largest leaves first, when little else is in memory."""
    leaves, structure = jax.tree.flatten(target)
    restored: list[Any] = [None] * len(leaves)
    order = sorted(range(len(leaves)), key=lambda i: -_nbytes(leaves[i]))
    for group in group_by_bytes(order, [_nbytes(leaves[i]) for i in order], CONCURRENT_BYTES):
        subset = jax.tree.unflatten(structure, [x if i in group else ocp.PLACEHOLDER for i, x in enumerate(leaves)])
        values = jax.tree.leaves(checkpointer.restore(directory, args=_restore_args(subset)))
        for i in group:
            restored[i] = values[i].block_until_ready()
        del values
        gc.collect()
    return jax.tree.unflatten(structure, restored)


def saved_dtypes(directory: epath.PathLike) -> dict[str, str]:
    """Leaf path (`blocks/attention/query/kernel`) → dtype name of what `save_tree` wrote.

    Raises:
      UserError: no such directory, or damaged files.
    """
    directory = storage.absolute(directory)
    with _user_errors(f"{directory}: cannot be read"), _checkpointer(()) as checkpointer:
        return {name: dtype for name, (_, dtype) in _saved_leaves(checkpointer.metadata(directory)).items()}


def _checkpointer(tree: Any) -> contextlib.AbstractContextManager[ocp.Checkpointer]:
    """Context: an Orbax checkpointer for one tree, closed at the end."""
    return contextlib.closing(ocp.Checkpointer(_handler(tree, limit_host_copies=True)))


@contextlib.contextmanager
def _user_errors(message: str) -> Iterator[None]:
    """Context in which every error becomes a UserError of this message and the error's reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax, TensorStore and JSON parsers raise anything
        raise UserError(f"{message} ({_reason(error)})") from error


class Checkpointer:
    """The newest `keep` checkpoints of a training run, in `directory/STEP`.

    All processes call every method. Saving is asynchronous: the arrays may be donated once `save` has returned, and
    errors of writing are raised by the next `save`, `wait` or `close`.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        self.directory = storage.absolute(directory)
        self._keep = keep
        self._manager = None
        self._damaged: list[int] = []

    def save(self, step: int, tree: Any, wait: bool = False) -> None:
        """Saves a tree of arrays as `step`; an existing step is left unchanged.

        Args:
          step: number of finished optimizer steps.
          tree: any pytree of `jax.Array`.
          wait: return only once it is on disk (before the process ends, say).

        Raises:
          UserError: this checkpoint, or the one before it, could not be written.
        """
        manager = self._open(tree)
        with self._write_errors():
            for damaged in self._damaged:  # otherwise they count among the newest, and block their own step
                manager.delete(damaged)
            self._damaged = []
            if step not in manager.all_steps():
                manager.save(step, args=_save_args(tree), force=True)
        if wait:
            self.wait()

    def latest_step(self) -> int | None:
        """The newest finished checkpoint's step; None if there is none."""
        self.wait()
        steps = self._steps()
        return steps[-1] if steps else None

    def restore_latest(self, target: Any) -> tuple[int, Any] | None:
        """(step, tree) of the newest readable checkpoint, sharded like `target`; None if there is none.

        A damaged one is logged, skipped for the one before it, and removed at the next `save`.

        Args:
          target: tree of ShapeDtypeStruct with shardings, on any mesh.

        Raises:
          UserError: every checkpoint is damaged, or has other leaves, shapes or dtypes than `target`.
        """
        steps = self._steps()
        if not steps:
            return None
        manager = self._open(target)
        failures = []
        for step in reversed(steps):
            tree, reason = self._try_restore(manager, step, target)
            if tree is not None:
                return step, tree
            failures.append(f"step {step}: {reason}")
            self._damaged.append(step)
            logging.warning("%s: checkpoint of step %d is damaged (%s)", self.directory, step, reason)
        raise UserError(f"{self.directory}: no checkpoint can be read ({'; '.join(failures)})")

    def wait(self) -> None:
        """Returns once everything is on disk.

        Raises:
          UserError: it could not be written.
        """
        if self._manager is not None:
            with self._write_errors():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and stops the writing threads; may be called twice.

        Raises:
          UserError: a pending checkpoint could not be written.
        """
        manager, self._manager = self._manager, None
        if manager is not None:
            with self._write_errors():
                manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()

    def _write_errors(self) -> contextlib.AbstractContextManager[None]:
        return _user_errors(f"{self.directory}: checkpoint cannot be written")

    def _open(self, tree: Any) -> ocp.CheckpointManager:
        """The manager, created at first use, since its memory limit depends on the tree."""
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
            handler = _handler(tree, limit_host_copies=False)
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)
        return self._manager

    def _steps(self) -> list[int]:
        return sorted(ocp.utils.checkpoint_steps(self.directory)) if self.directory.exists() else []

    def _try_restore(self, manager: ocp.CheckpointManager, step: int, target: Any) -> tuple[Any, str]:
        """(tree, "") or (None, reason), the same on every process. Raises UserError if the target is another tree."""
        tree, reason, difference = None, "", None
        try:
            difference = _first_difference(_saved_leaves(manager.item_metadata(step)), target, dtypes=True)
            if difference is None:
                tree = manager.restore(step, args=_restore_args(target))
        except Exception as error:  # a damaged file raises anything in Orbax, TensorStore or a JSON parser
            reason = _reason(error)
        if difference is not None:
            raise UserError(f"{self.directory}: checkpoint of step {step}: {difference}")
        if jax.process_count() > 1 and not multihost_utils.process_allgather(np.array(not reason)).all():
            return None, reason or "damaged for another process"
        return tree, reason


def _first_difference(saved: dict[str, Leaf], target: Any, dtypes: bool = False) -> str | None:
    """The first difference between the saved leaves and the target's, in words; None if they agree."""
    expected = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
    for name, leaf in expected.items():
        if name not in saved:
            return f"leaf {name} is missing"
        shape, dtype = saved[name]
        if tuple(shape) != tuple(leaf.shape):
            return f"leaf {name} has shape {tuple(shape)}, expected {tuple(leaf.shape)}"
        if dtypes and dtype != str(leaf.dtype):
            return f"leaf {name} has dtype {dtype}, expected {leaf.dtype}"
    unexpected = sorted(set(saved) - set(expected))
    return f"leaf {unexpected[0]} is not one of the model's" if unexpected else None


def _handler(tree: Any, limit_host_copies: bool) -> ocp.PyTreeCheckpointHandler:
    """A handler that moves one large leaf at a time; with `limit_host_copies`, also from device to host memory."""
    largest = max((_nbytes(leaf) for leaf in jax.tree.leaves(tree)), default=0)
    limit = max(CONCURRENT_BYTES, largest + 1)  # Orbax refuses a leaf above the limit
    return ocp.PyTreeCheckpointHandler(
        handler_impl=ocp.BasePyTreeCheckpointHandler(
            save_concurrent_bytes=limit,
            restore_concurrent_bytes=limit,
            save_device_host_concurrent_bytes=limit if limit_host_copies else None,
            use_compression=False,
        )
    )


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _save_args(tree: Any) -> ocp.args.PyTreeSave:
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    return ocp.args.PyTreeSave(tree, save_args=chunked)


def _restore_args(target: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))


def _saved_leaves(metadata: Any) -> dict[str, Leaf]:
    """Path → (shape, dtype name), from a checkpoint's metadata as any version of Orbax returns it."""
    for attribute in ("item_metadata", "tree"):
        metadata = getattr(metadata, attribute, metadata)
    leaves = jax.tree_util.tree_leaves_with_path(metadata, is_leaf=lambda node: hasattr(node, "dtype"))
    if not leaves:
        raise ValueError("no _METADATA in it")
    return {path_string(path): (tuple(leaf.shape), str(np.dtype(leaf.dtype))) for path, leaf in leaves}


def _reason(error: BaseException) -> str:
    """The root cause of an error, shortened to fit a line; TensorStore puts the cause at the end."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split(" [tensorstore_spec=")[0].split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:100]} … {text[-140:]}"
