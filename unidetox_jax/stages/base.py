"""The contract between stages: a directory, and in it `stage.json`, written last.

A stage whose `stage.json` holds the same settings and the same inputs is complete and is skipped. One that differs
is explained, never overwritten. While a stage works, `stage.partial.json` says with which settings it began, so that
an interrupted stage is continued with the same ones only.
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
from unidetox_jax.errors import UserError
from unidetox_jax.progress import format_table
from unidetox_jax.recipe import Recipe
from unidetox_jax.stages.parsing import RENAMED
from unidetox_jax.training import preemption

COMPLETE = "stage.json"
PARTIAL = "stage.partial.json"
VERSIONS = ("unidetox-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Task:
    """One piece of work with a directory of its own: a stage is a list of them.

    name: for messages ("detoxify opt-6.7b"). settings: what the result depends on, JSON-able, with `{workdir}` as it
    was written, so that moving a working directory changes nothing. inputs: name → `fingerprint(...)` of what is
    read, taken when the task's turn comes. body: does the work, resumes what it finds begun, returns its figures.
    operations: floating-point operations, roughly, to tell how long it will take.
    scratch: what in the directory only an interrupted task reads; it goes when the task is complete. disk: roughly the
    bytes that it fills at most while it works, and those that stay. derived: made of other stages' files in seconds,
    so it is made anew where they have changed, without being asked. reads: of what it reads in the working directory,
    that which no `{workdir}/…` of its settings names.
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


def run_tasks(tasks: Sequence[Task], force: bool = False, dry_run: bool = False) -> list[dict[str, Any]]:
    """Runs the tasks in order, skipping what is complete; returns their records.

    dry_run: says what would be done, and does nothing.
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
            records.append(run_task(task, force))
    return records


def state(task: Task) -> str:
    """What is there of a task: done, begun, or to do."""
    if (task.directory / COMPLETE).exists():
        return "done"
    return "begun" if (task.directory / PARTIAL).exists() else "to do"


def run_task(task: Task, force: bool = False) -> dict[str, Any]:
    """Runs a task unless its directory holds the finished result; returns its record.

    force: throw away a result (or a beginning) with other settings.

    Raises:
      UserError: the directory holds a result of other settings or inputs; the line lists what differs.
    """
    name, directory = task.name, task.directory
    wanted = _plain({"stage": name, "settings": dict(task.settings), "inputs": dict(task.inputs())})
    first = distributed.is_main_process()
    wanted = json.loads(distributed.broadcast(json.dumps(wanted)))  # all decide alike, whatever a file system shows

    # what is there already
    record = storage.read_json(directory / COMPLETE) or storage.read_json(directory / PARTIAL)
    record = json.loads(distributed.broadcast(json.dumps(record)))
    if record is not None:
        record["settings"] = _as_of_now(record["settings"], wanted["settings"])
        differences = _differences(wanted, {key: record.get(key) for key in wanted})
        if differences and not (force or task.derived):
            raise UserError(
                f"{directory}: made with other settings ({'; '.join(differences)}): use another --workdir, "
                "or --force to make it anew"
            )
        if not differences and "finished" in record and not force:
            logging.info("%s: complete already (%s)", name, directory)
            _clean(task)  # it may have been killed just before it did
            return record
        if (force or differences) and first:
            directory.rmtree(missing_ok=True)

    # the work
    if first:
        storage.write_json(directory / PARTIAL, wanted)
    distributed.barrier(f"{name} begun")
    started = time.monotonic()
    gc.freeze()  # a million objects of the libraries, which every round of garbage collection would visit
    try:
        figures = task.body(directory)
    except UserError:
        # Nothing was made: the next try, with other settings, must not be refused because of this one.
        if first and [path.name for path in directory.iterdir()] == [PARTIAL]:
            directory.rmtree()
        raise

    # its record
    record = {
        **wanted,
        "figures": _plain(dict(figures)),
        "seconds": round(time.monotonic() - started, 3),  # of the last sitting, where there were several
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": devices.summary(),
        "versions": versions(),
    }
    if first:
        storage.write_json(directory / COMPLETE, record)
        (directory / PARTIAL).unlink(missing_ok=True)
    _clean(task)
    distributed.barrier(f"{name} complete")  # the next stage reads what this one wrote
    return record


def _clean(task: Task) -> None:
    """Removes what a complete task needs no longer."""
    if task.scratch and distributed.is_main_process():
        (task.directory / task.scratch).rmtree(missing_ok=True)


def cached(
    path: epath.Path,
    make: Callable[[], Value],
    read: Callable[[epath.Path], Value],
    write: Callable[[epath.Path, Value], None],
    together: bool = True,
) -> Value:
    """A part of a result, which an interrupted stage need not make again: what lies at `path`, or what `make` gives,
    which then lies there. Every process comes here and makes it together with the others, and process 0 writes; with
    `together` false process 0 comes alone."""
    there = "there" if path.exists() else ""
    if distributed.broadcast(there) if together else there:
        return read(path)
    value = make()
    if distributed.is_main_process():
        write(path, value)
    return value


def is_complete(directory: epath.PathLike) -> bool:
    """Whether a finished stage lies in `directory`."""
    return (epath.Path(directory) / COMPLETE).exists()


def fingerprint(source: epath.PathLike) -> str:
    """What a stage's input is, in a few characters: for a finished stage the hash of its settings and inputs, for a
    file the hash of its bytes, for any other directory the names and sizes of its files with the content of its small
    ones; for MODEL+ADAPTER a hash of both; a hub id or a name stays as it is."""
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
    files = sorted(file for file in path.iterdir() if not file.is_dir())
    parts = []
    for file in files:
        size = file.stat().length
        content = hashlib.sha256(file.read_bytes()).hexdigest() if size < 1 << 24 else ""
        parts.append((file.name, size, content))
    return digest(parts)


def digest(value: Any) -> str:
    """A short hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples become lists, paths strings."""
    return json.loads(json.dumps(value, default=str))


def _as_of_now(settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A record's settings under today's names; one of a recipe that its version did not have is the default."""
    defaults = _plain(dataclasses.asdict(Recipe()))
    known = {key: value for key, value in defaults.items() if key in wanted}
    return {**known, **{RENAMED.get(key, key): value for key, value in settings.items()}}


def _differences(wanted: Any, found: Any, where: str = "") -> list[str]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = sorted(set(wanted) | set(found))
        return [
            line
            for key in keys
            for line in _differences(wanted.get(key), found.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if wanted == found else [f"{where}: there {found!r}, now {wanted!r}"]
