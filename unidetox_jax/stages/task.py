"""A task: one piece of a stage's work in a directory of its own, with its record `stage.json` written last.

A task whose `stage.json` holds the same settings and inputs is complete and is skipped. One that differs is reported,
never overwritten. While a task runs, `stage.partial.json` holds the settings it began with: an interrupted task
continues with the same settings only. If its training diverged, the file also has "diverged": the message.
"""

import dataclasses
import datetime
import gc
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from absl import logging
from etils import epath

from unidetox_jax import checkpoint, devices, distributed, storage
from unidetox_jax.errors import Diverged, UserError
from unidetox_jax.progress import format_table
from unidetox_jax.recipe import Recipe
from unidetox_jax.stages.parsing import RENAMED
from unidetox_jax.training import preemption

COMPLETE = "stage.json"
PARTIAL = "stage.partial.json"
PACKAGES = ("unidetox-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Task:
    """One piece of work with its own directory; a stage is a list of them.

    Attributes:
      name: for messages ("detoxify opt-6.7b").
      settings: what the result depends on, JSON-able; paths keep their `{workdir}`, so the directory can be moved.
      inputs: () → {name: `fingerprint` of what is read}, called just before the task runs.
      body: directory → figures for the record; does the work and resumes an interrupted one.
      operations: () → floating-point operations, roughly, for a time estimate.
      scratch: name in the directory that only an interrupted task reads; removed on completion.
      disk: () → bytes on disk, roughly: (peak while running, after completion).
      derived: made from other stages' files in seconds, so it is redone without --force when they change.
      reads: `{workdir}/…` inputs that its settings do not name.
    """

    name: str
    directory: epath.Path
    settings: Mapping[str, Any]
    inputs: Callable[[], Mapping[str, str]]
    body: Callable[[epath.Path], Mapping[str, Any]]
    operations: Callable[[], float] | None = None
    scratch: str = ""
    disk: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)
    derived: bool = False
    reads: Sequence[str] = ()


def run_tasks(
    tasks: Sequence[Task], force: bool = False, dry_run: bool = False, retry_diverged: bool = True
) -> list[dict[str, Any]]:
    """Runs the tasks in order, skipping complete ones; returns their records. Raises as `run_task`.

    dry_run: only prints what would be done.
    """
    if dry_run:
        if distributed.is_main_process():
            print(format_table([[task.name, state(task), str(task.directory)] for task in tasks], left=3))
        return []
    records = []
    with preemption.exit_on_sigterm():
        for task in tasks:
            if devices.memory_maps_run_out():
                jax.clear_caches()
            records.append(run_task(task, force, retry_diverged))
    return records


def state(task: Task) -> str:
    """A task's progress: done, begun, or to do."""
    if is_complete(task.directory):
        return "done"
    return "begun" if (task.directory / PARTIAL).exists() else "to do"


def run_task(task: Task, force: bool = False, retry_diverged: bool = True) -> dict[str, Any]:
    """Runs a task unless its directory holds the complete result; returns its record.

    force: discard a complete or partial result with other settings.
    retry_diverged: if false, a training that diverges is recorded, and not repeated with these settings and inputs
      without `force`.

    Raises:
      Diverged: the training diverged, now or, if not repeated, earlier.
      UserError: the directory holds a result of other settings or inputs; the message lists the differences.
    """
    name, directory, first = task.name, task.directory, distributed.is_main_process()
    expected = _as_json({"stage": name, "settings": dict(task.settings), "inputs": dict(task.inputs())})
    expected = json.loads(
        distributed.broadcast(json.dumps(expected))
    )  # file systems may show processes different states
    complete = _complete_record(task, expected, force, retry_diverged)
    if complete is not None:
        return complete
    if first:
        storage.write_json(directory / PARTIAL, expected)
    distributed.barrier(f"{name} begun")
    started = time.monotonic()
    gc.freeze()  # the libraries' million objects, which every garbage collection would visit
    try:
        figures = task.body(directory)
    except UserError as error:
        diverged = isinstance(error, Diverged)
        nothing_made = first and [path.name for path in directory.iterdir()] == [PARTIAL]
        if nothing_made and (retry_diverged or not diverged):
            directory.rmtree()  # a corrected retry must not be refused for its other settings
        elif first and diverged:
            storage.write_json(directory / PARTIAL, {**expected, "diverged": str(error)})
        raise
    record = {
        **expected,
        "figures": _as_json(dict(figures)),
        "seconds": round(time.monotonic() - started, 3),  # since the last resumption
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": devices.summary(),
        "versions": versions(),
    }
    if first:
        storage.write_json(directory / COMPLETE, record)
        (directory / PARTIAL).unlink(missing_ok=True)
    _remove_scratch(task)
    distributed.barrier(f"{name} complete")  # the next stage reads these files
    return record


def _complete_record(
    task: Task, expected: Mapping[str, Any], force: bool, retry_diverged: bool
) -> dict[str, Any] | None:
    """The record of a complete task; None if it has to run, once what stands in its way is removed."""
    directory = task.directory
    record = storage.read_json(directory / COMPLETE) or storage.read_json(directory / PARTIAL)
    record = json.loads(distributed.broadcast(json.dumps(record)))
    if record is None:
        return None
    record["settings"] = _migrate(record["settings"], expected["settings"])
    differences = _differences(expected, {key: record.get(key) for key in expected})
    if differences and not (force or task.derived):
        raise UserError(
            f"{directory}: made with other settings ({'; '.join(differences)}): use another --workdir, "
            "or --force to redo it"
        )
    if not differences and "finished" in record and not force:
        logging.info("%s: already complete (%s)", task.name, directory)
        _remove_scratch(task)  # the process may have been killed just before
        return record
    if not (differences or force or retry_diverged) and "diverged" in record:
        raise Diverged(record["diverged"])
    if (force or differences) and distributed.is_main_process():
        directory.rmtree(missing_ok=True)
    return None


def _remove_scratch(task: Task) -> None:
    if task.scratch and distributed.is_main_process():
        (task.directory / task.scratch).rmtree(missing_ok=True)


def cached(
    path: epath.Path,
    make: Callable[[], Value],
    read: Callable[[epath.Path], Value],
    write: Callable[[epath.Path, Value], None],
    together: bool = True,
) -> Value:
    """The value stored at `path`, or else `make()`, stored there by process 0, so an interrupted stage keeps it.

    together: every process calls this and all make the value; if false, only process 0 calls it.
    """
    stored = "stored" if path.exists() else ""
    if distributed.broadcast(stored) if together else stored:
        return read(path)
    value = make()
    if distributed.is_main_process():
        write(path, value)
    return value


def is_complete(directory: epath.PathLike) -> bool:
    """Whether `directory` holds a complete task."""
    return (epath.Path(directory) / COMPLETE).exists()


def fingerprint(source: epath.PathLike) -> str:
    """A short identifier of a stage's input.

    A complete task: hash of its settings and inputs. A file: hash of its bytes. Another directory: hash of its files'
    names and sizes, and of the content of those below 16 MiB. MODEL+ADAPTER: hash of both. A hub id or name: itself.
    """
    model, adapter = checkpoint.split_adapter(source)
    if adapter:
        return digest([fingerprint(model), fingerprint(adapter)])
    path = epath.Path(source)
    if not str(source) or not path.exists():
        return str(source)
    record = storage.read_json(path / COMPLETE) if path.is_dir() else None
    if record is not None:
        return digest({key: record[key] for key in ("stage", "settings", "inputs")})
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    entries = []
    for file in sorted(file for file in path.iterdir() if not file.is_dir()):
        size = file.stat().length
        content = hashlib.sha256(file.read_bytes()).hexdigest() if size < 1 << 24 else ""
        entries.append((file.name, size, content))
    return digest(entries)


def digest(value: Any) -> str:
    """A short hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(_as_json(value), sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _as_json(value: Any) -> Any:
    """The value as read back from JSON: tuples become lists, paths strings."""
    return json.loads(json.dumps(value, default=str))


def _migrate(settings: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """An old record's settings under their new names; recipe fields it does not have get their defaults."""
    defaults = _as_json(dataclasses.asdict(Recipe()))
    known = {key: value for key, value in defaults.items() if key in expected}
    return {**known, **{RENAMED.get(key, key): value for key, value in settings.items()}}


def _differences(expected: Any, recorded: Any, field: str = "") -> list[str]:
    if isinstance(expected, dict) and isinstance(recorded, dict):
        keys = sorted(set(expected) | set(recorded))
        return [
            line
            for key in keys
            for line in _differences(expected.get(key), recorded.get(key), f"{field}.{key}" if field else key)
        ]
    return [] if expected == recorded else [f"{field}: was {recorded!r}, now {expected!r}"]
