"""The cells of a grid, and where everything of each lies.

What some field of the grid changes, and whatever is made of it, lies in WORKDIR/cells/NAME, NAME being those fields'
values; all else lies in WORKDIR, is made once, and is what `unidetox run` would make there. What a task is made of is
what its settings name as `{workdir}/…`. A task that reads something else as well finds other inputs than it recorded,
and is refused.
"""

import dataclasses
import importlib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from unidetox_jax.errors import UserError
from unidetox_jax.stages import STAGES, base, grid
from unidetox_jax.stages.settings import Run, within

MADE = tuple(name for name in STAGES if name not in ("analyze", "report"))  # what is made for a cell
EVALUATION = "evaluation"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A combination of settings: its run, which knows where everything lies, and its tasks by their directories within
    the working directory, in the order of the work."""

    name: str
    settings: Mapping[str, Any]
    run: Run
    tasks: Mapping[str, base.Task]
    fields: Mapping[str, frozenset[str]]  # directory → the grid's fields that change its task
    fields_of_all: tuple[str, ...]

    def own(self, room: str) -> dict[str, Any]:
        """The values of the fields that change what is in a directory."""
        return {field: value for field, value in self.settings.items() if field in self.fields[room]}

    def variant(self, room: str) -> str:
        """They as a name."""
        return grid.name(self.own(room), self.fields_of_all)

    def needed(self, rooms: Collection[str]) -> list[base.Task]:
        """The tasks of some directories, and those of which they are made."""
        wanted, reads = set(rooms), _reads(self.tasks)
        for room in reversed(list(self.tasks)):
            wanted |= reads[room] if room in wanted else set()
        return [task for room, task in self.tasks.items() if room in wanted]


def place(run: Run, asked: grid.Grid, evaluations: str = EVALUATION) -> list[Cell]:
    """The cells of a grid over a run. evaluations: the directory that they are in.

    Raises:
      UserError: as the stages' `tasks`; a field that changes nothing of what is made.
    """
    settings = grid.cells(asked)
    own_values = [{key: value for key, value in settings[0].items() if key != field} for field in asked]
    runs = [grid.applied(run, one) for one in settings + own_values]  # the latter are no cells, but beside them
    planned = [{inside(task.directory, run): task for task in _tasks(one)} for one in runs]
    changed = _changed(settings + own_values, planned, tuple(asked))
    for field, values in asked.items():
        if len(values) > 1 and not any(field in fields for fields in changed.values()):
            raise UserError(f"{grid.WHERE}: {field} changes nothing that the sweep makes")
    return [
        _cell(own, one, tasks, changed, tuple(asked), evaluations)
        for own, one, tasks in zip(settings, runs, planned, strict=False)
    ]


def _cell(
    settings: Mapping[str, Any],
    run: Run,
    planned: Mapping[str, base.Task],
    changed: Mapping[str, frozenset[str]],
    fields_of_all: tuple[str, ...],
    evaluations: str,
) -> Cell:
    cell = Cell(grid.name(settings, fields_of_all), settings, run, planned, changed, fields_of_all)
    rooms = {}
    for room in planned:
        part = cell.variant(room)
        root = run.workdir / "cells" / part if part else run.workdir
        rooms[room] = root / re.sub(f"^{EVALUATION}/", f"{evaluations}/", room)
    there = dataclasses.replace(run, rooms=rooms)
    return dataclasses.replace(cell, run=there, tasks=dict(zip(planned, _tasks(there), strict=True)))


def _tasks(run: Run) -> list[base.Task]:
    return [task for stage in MADE for task in importlib.import_module(STAGES[stage][0]).tasks(run)]


def once(tasks: Iterable[base.Task]) -> list[base.Task]:
    """Of the tasks that share a directory the first: what it needs was made before it."""
    found: dict[epath.Path, base.Task] = {}
    for task in tasks:
        found.setdefault(task.directory, task)
    return list(found.values())


def inside(directory: epath.Path, run: Run) -> str:
    return str(directory.relative_to(run.workdir))


def _changed(
    settings: Sequence[Mapping[str, Any]], planned: Sequence[Mapping[str, base.Task]], fields: Sequence[str]
) -> dict[str, frozenset[str]]:
    """Directory → the fields that its task depends on: by its own settings, or through what it reads."""
    changed = {room: set[str]() for tasks in planned for room in tasks}
    for field, (one, other) in itertools.product(fields, itertools.combinations(range(len(settings)), 2)):
        if all((settings[one].get(key) == settings[other].get(key)) == (key != field) for key in fields):
            for room in changed:
                sides = [tasks[room].settings if room in tasks else None for tasks in (planned[one], planned[other])]
                if sides[0] != sides[1]:
                    changed[room].add(field)
    for tasks in planned:
        for room, read in _reads(tasks).items():  # in the order of the work: what is read is known by now
            changed[room] |= {field for other in read for field in changed[other]}
    return {room: frozenset(found) for room, found in changed.items()}


def _reads(tasks: Mapping[str, base.Task]) -> dict[str, set[str]]:
    """Directory → those of which its task is made."""
    named = within(tasks)
    return {
        room: {read for text in (*_texts(task.settings), *task.reads) for read in named.findall(text)}
        for room, task in tasks.items()
    }


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
