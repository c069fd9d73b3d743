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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from unidetox_jax.errors import UserError
from unidetox_jax.stages import STAGES, base, grid
from unidetox_jax.stages.settings import Run, within

MADE = tuple(name for name in STAGES if name not in ("analyze", "report"))  # what is made for a cell
EVALUATION = "evaluation"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A combination of settings: its run, which knows where everything lies, and the fields that change each task."""

    name: str
    settings: Mapping[str, Any]
    run: Run
    fields: Mapping[str, frozenset[str]]  # directory within the working directory → fields
    fields_of_all: tuple[str, ...]

    def tasks(self) -> Iterator[tuple[str, base.Task]]:
        """Each with its directory within the working directory, in the order of the work."""
        return zip(self.fields, _tasks(self.run), strict=True)

    def variant(self, room: str) -> str:
        """What is its own in a directory: the values of the fields that change it."""
        return _name(self.settings, self.fields[room], self.fields_of_all)


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
    cells = []
    for own, one, tasks in zip(settings, runs, planned, strict=False):
        fields = {room: changed[room] for room in tasks}
        rooms = {}
        for room in tasks:
            part = _name(own, fields[room], tuple(asked))
            root = run.workdir / "cells" / part if part else run.workdir
            rooms[room] = root / re.sub(f"^{EVALUATION}/", f"{evaluations}/", room)
        there = dataclasses.replace(one, rooms=rooms)
        cells.append(Cell(grid.name(own, tuple(asked)), own, there, fields, tuple(asked)))
    return cells


def _name(settings: Mapping[str, Any], fields: frozenset[str], of_all: Sequence[str]) -> str:
    return grid.name({field: value for field, value in settings.items() if field in fields}, of_all)


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
    for tasks in planned:  # in the order of the work, so that what is read was done before
        named = within(tasks)
        for room, task in tasks.items():
            for text in (*_texts(task.settings), *task.reads):
                for read in named.findall(text):
                    changed[room] |= changed[read]
    return {room: frozenset(found) for room, found in changed.items()}


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
