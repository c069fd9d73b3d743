"""Orbax, all of it that is used here: trees of arrays on disk, and a training run's series of them.

A tree is always restored into an explicit target (shapes, dtypes, shardings), so that what was written on one mesh is
read on any other, and each process reads only its own part. Two of Orbax's defaults are changed: it would copy a whole
tree to host memory before it writes, and compress weights (half the speed, to save 8 % of the size). What it has read
stays in reference cycles, so memory is collected after each large leaf.
"""

import gc
import logging as standard_logging
import math
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from unidetox_jax import storage
from unidetox_jax.errors import UserError

CHUNK_BYTES = 1 << 26  # what one read or write holds; small enough for meshes that cut a leaf in other places
AT_ONCE_BYTES = 1 << 28  # what is moved side by side; a larger leaf goes alone

Leaf = tuple[tuple[int, ...], str]  # shape, dtype's name


class _Chatter(standard_logging.Filter):
    """Orbax narrates every save in a dozen lines, with tracebacks for what is reported here in one."""

    def filter(self, record: standard_logging.LogRecord) -> bool:
        return "orbax" not in record.pathname.replace("orbax_io", "")


def _quieten(previous=sys.unraisablehook) -> None:
    """Installs the filter, and keeps Python from printing tracebacks of what came too late.

    When a damaged file ends a restore, TensorStore delivers what it was still reading to an event loop that
    is closed, from its own thread and at any later time; when the disk is full, every write fails, and asyncio tells
    of all but the first whenever it frees them. The error itself has been reported by then.
    """

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    standard_logging.getLogger("absl").addFilter(_Chatter())
    asyncio_log = standard_logging.getLogger("asyncio")
    asyncio_log.addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    sys.unraisablehook = hook


_quieten()


def save_tree(directory: epath.PathLike, tree: Any) -> None:
    """Writes a tree of `jax.Array` to `directory`, which must not exist; returns when all of it is on disk.

    Every process calls it. At most the largest leaf's local part is copied to host memory at a time.

    Raises:
      UserError: it could not be written.
    """
    directory = storage.absolute(directory)
    checkpointer = ocp.Checkpointer(_handler(tree, gentle=True))
    try:
        checkpointer.save(directory, args=_save_args(tree))
    except Exception as error:
        raise UserError(f"{directory}: cannot be written ({_reason(error)})") from error
    finally:
        checkpointer.close()


def restore_tree(directory: epath.PathLike, target: Any) -> Any:
    """Reads what `save_tree` wrote into the shapes, dtypes and shardings of `target` (ShapeDtypeStructs).

    Raises:
      UserError: no such directory, damaged files, or leaves or shapes unlike the target's (the first).
    """
    directory = storage.absolute(directory)
    checkpointer = ocp.Checkpointer(_handler(target, gentle=True))
    try:
        difference = _first_difference(_saved_leaves(checkpointer.metadata(directory)), target)
        restored = None if difference else _restore_in_parts(checkpointer, directory, target)
    except Exception as error:
        raise UserError(f"{directory}: cannot be read ({_reason(error)})") from error
    finally:
        checkpointer.close()
    if difference:
        raise UserError(f"{directory}: {difference}")
    return restored


def _restore_in_parts(checkpointer: ocp.Checkpointer, directory: epath.Path, target: Any) -> Any:
    """The restored tree, the largest leaves first, while little else is held; at most AT_ONCE_BYTES, or one leaf."""
    leaves, structure = jax.tree.flatten(target)
    restored: list[Any] = [None] * len(leaves)
    for part in _parts([_nbytes(leaf) for leaf in leaves]):
        wanted = jax.tree.unflatten(structure, [x if i in part else ocp.PLACEHOLDER for i, x in enumerate(leaves)])
        found = jax.tree.leaves(checkpointer.restore(directory, args=_restore_args(wanted)))
        for i in part:
            restored[i] = found[i].block_until_ready()
        del found
        gc.collect()
    return jax.tree.unflatten(structure, restored)


def _parts(sizes: list[int]) -> list[list[int]]:
    """Positions in groups of at most AT_ONCE_BYTES, the largest first; what is larger stands alone."""
    parts: list[list[int]] = []
    room = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if not parts or sizes[i] > room:
            parts.append([])
            room = AT_ONCE_BYTES
        parts[-1].append(i)
        room -= sizes[i]
    return parts


def saved_dtypes(directory: epath.PathLike) -> dict[str, str]:
    """Leaf path (`blocks/attention/query/kernel`) → dtype's name of what `save_tree` wrote.

    Raises:
      UserError: no such directory, or damaged files.
    """
    directory = storage.absolute(directory)
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        return {name: dtype for name, (_, dtype) in _saved_leaves(checkpointer.metadata(directory)).items()}
    except Exception as error:
        raise UserError(f"{directory}: cannot be read ({_reason(error)})") from error
    finally:
        checkpointer.close()


class Checkpointer:
    """The series of checkpoints of one training run: `directory/STEP`, the newest `keep` of them.

    All processes call every method. Saving is asynchronous: the arrays may be donated once `save` returned;
    an error of the writing shows at the next `save`, `wait` or `close`.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        self.directory = storage.absolute(directory)
        self._keep = keep
        self._manager = None
        self._damaged: list[int] = []

    def save(self, step: int, tree: Any, wait: bool = False) -> None:
        """Saves a tree of arrays as `step`; a step that is there already is left as it is.

        Args:
          step: number of finished optimizer steps.
          tree: any pytree of `jax.Array`.
          wait: return only when it is on disk (before the process ends, say).

        Raises:
          UserError: this checkpoint, or the one before it, could not be written.
        """
        manager = self._open(tree)
        try:
            for damaged in self._damaged:  # else they would count among the newest, and block their own step
                manager.delete(damaged)
            self._damaged = []
            if step not in manager.all_steps():
                manager.save(step, args=_save_args(tree), force=True)
        except Exception as error:
            raise UserError(f"{self.directory}: checkpoint cannot be written ({_reason(error)})") from error
        if wait:
            self.wait()

    def latest_step(self) -> int | None:
        """The newest finished checkpoint's step; None when there is none."""
        self.wait()
        steps = self._steps()
        return steps[-1] if steps else None

    def restore_latest(self, target: Any) -> tuple[int, Any] | None:
        """(step, tree) of the newest readable checkpoint, as `target` wants it; None when there is none.

        A damaged one is reported in a line and the one before it is used; it is removed at the next `save`.

        Args:
          target: tree of ShapeDtypeStruct with shardings; any mesh, whatever the checkpoint was written on.

        Raises:
          UserError: every checkpoint is damaged, or they hold other leaves, shapes or dtypes than `target`.
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
        """Returns when everything is on disk.

        Raises:
          UserError: it could not be written.
        """
        if self._manager is not None:
            self._report_failure(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits, and frees the writing threads; may be called twice.

        Raises:
          UserError: what was still being written could not be.
        """
        manager, self._manager = self._manager, None
        if manager is not None:
            self._report_failure(manager.close)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()

    def _report_failure(self, action) -> None:
        try:
            action()
        except Exception as error:
            raise UserError(f"{self.directory}: checkpoint cannot be written ({_reason(error)})") from error

    def _open(self, tree: Any) -> ocp.CheckpointManager:
        """The manager; made at first use, since the memory that it may use follows from the tree."""
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
            handler = _handler(tree, gentle=False)
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)
        return self._manager

    def _steps(self) -> list[int]:
        return sorted(ocp.utils.checkpoint_steps(self.directory)) if self.directory.exists() else []

    def _try_restore(self, manager: ocp.CheckpointManager, step: int, target: Any) -> tuple[Any, str]:
        """(tree, "") or (None, why not), the same on every process; UserError: the target is another tree."""
        tree, reason, difference = None, "", None
        try:
            difference = _first_difference(_saved_leaves(manager.item_metadata(step)), target, dtypes=True)
            if difference is None:
                tree = manager.restore(step, args=_restore_args(target))
        except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or a JSON parser say
            reason = _reason(error)
        if difference is not None:
            raise UserError(f"{self.directory}: checkpoint of step {step}: {difference}")
        if jax.process_count() > 1 and not multihost_utils.process_allgather(np.array(not reason)).all():
            return None, reason or "damaged for another process"
        return tree, reason


def _first_difference(saved: dict[str, Leaf], target: Any, dtypes: bool = False) -> str | None:
    """In words, what first tells the saved leaves from the target's; None when nothing does."""
    wanted = {_path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
    for name, leaf in wanted.items():
        if name not in saved:
            return f"leaf {name} is missing"
        shape, dtype = saved[name]
        if tuple(shape) != tuple(leaf.shape):
            return f"leaf {name} has shape {tuple(shape)}, expected {tuple(leaf.shape)}"
        if dtypes and dtype != str(leaf.dtype):
            return f"leaf {name} has dtype {dtype}, expected {leaf.dtype}"
    surplus = sorted(set(saved) - set(wanted))
    return f"leaf {surplus[0]} is not one of the model's" if surplus else None


def _handler(tree: Any, gentle: bool) -> ocp.PyTreeCheckpointHandler:
    """A handler that moves one large leaf at a time; a `gentle` one holds back copies to host memory too."""
    largest = max((_nbytes(leaf) for leaf in jax.tree.leaves(tree)), default=0)
    limit = max(AT_ONCE_BYTES, largest + 1)  # Orbax refuses a leaf that does not fit under it
    return ocp.PyTreeCheckpointHandler(
        handler_impl=ocp.BasePyTreeCheckpointHandler(
            save_concurrent_bytes=limit,
            restore_concurrent_bytes=limit,
            save_device_host_concurrent_bytes=limit if gentle else None,
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
    """Path → (shape, dtype name) from any form in which Orbax's versions give a checkpoint's metadata."""
    for attribute in ("item_metadata", "tree"):
        metadata = getattr(metadata, attribute, metadata)
    leaves = jax.tree_util.tree_leaves_with_path(metadata, is_leaf=lambda node: hasattr(node, "dtype"))
    if not leaves:
        raise ValueError("no _METADATA in it")
    return {_path_name(path): (tuple(leaf.shape), str(np.dtype(leaf.dtype))) for path, leaf in leaves}


def _path_name(path: tuple) -> str:
    """`opt/0/mu/kernel`, the same whether a level is a dict, a list or a named tuple."""
    fields = ("key", "name", "idx")
    return "/".join(str(next(getattr(entry, f) for f in fields if hasattr(entry, f))) for entry in path)


def _reason(error: BaseException) -> str:
    """What caused an error, short enough for a line; TensorStore says at the end what was wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split(" [tensorstore_spec=")[0].split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:100]} … {text[-140:]}"
