"""The cells of a grid of settings, and where the results of each lie.

Tasks that the grid changes, and tasks that read their results, lie in WORKDIR/cells/NAME, where NAME lists the values
of the changing fields only. All others lie in WORKDIR, run once, and equal those of `unidetox run`. A task depends on
the `{workdir}/…` paths in its settings and in `Task.reads`; one with other inputs finds them changed and is refused.
"""

import dataclasses
import itertools
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from unidetox_jax import storage
from unidetox_jax.errors import Diverged, UserError
from unidetox_jax.evaluation.variant_selection import split_form
from unidetox_jax.stages import STAGES, evaluation_files, grid
from unidetox_jax.stages.run import all_tasks
from unidetox_jax.stages.settings import Run, model_name, workdir_pattern
from unidetox_jax.stages.task import Task, run_tasks

CELL_STAGES = tuple(name for name in STAGES if name not in ("analyze", "report"))
EVALUATION = "evaluation"

LeftOut = dict[epath.Path, str]  # as of `run_unless_diverged`


@dataclasses.dataclass(frozen=True)
class Cell:
    """A combination of settings.

    Attributes:
      run: its configuration, with the directories relocated that the grid changes.
      tasks: {directory within the working directory: task}, in the order of the stages.
      changed_by: {directory: fields of the grid that change its result}.
    """

    name: str
    settings: Mapping[str, Any]
    run: Run
    tasks: Mapping[str, Task]
    changed_by: Mapping[str, frozenset[str]]
    grid_fields: tuple[str, ...]

    def settings_of(self, directory: str) -> dict[str, Any]:
        """The settings that change a directory's result."""
        return {field: value for field, value in self.settings.items() if field in self.changed_by[directory]}

    def variant(self, directory: str) -> str:
        """A name of `settings_of`."""
        return grid.name(self.settings_of(directory), self.grid_fields)

    def with_dependencies(self, directories: Collection[str]) -> list[Task]:
        """The tasks of some directories and those that they depend on."""
        required, reads = set(directories), _reads(self.tasks)
        for directory in reversed(list(self.tasks)):
            required |= reads[directory] if directory in required else set()
        return [task for directory, task in self.tasks.items() if directory in required]


def make_cells(run: Run, values: grid.Grid, evaluations: str = EVALUATION) -> list[Cell]:
    """The cells of a grid. evaluations: the directory for their evaluations.

    Raises:
      UserError: as the stages' `tasks`; a field that changes no task.
    """
    settings, fields = grid.combinations(values), tuple(values)
    # Runs that each leave one field as configured show what a field with a single value changes
    without_field = [{key: value for key, value in settings[0].items() if key != field} for field in fields]
    runs = [grid.apply(run, overrides) for overrides in settings + without_field]
    planned = [{relative(task.directory, run): task for task in all_tasks(one, CELL_STAGES)} for one in runs]
    changed_by = _changed_by(settings + without_field, planned, fields)
    for field in fields:
        if len(values[field]) > 1 and not any(field in changing for changing in changed_by.values()):
            raise UserError(f"{grid.SECTION}: {field} changes nothing in this sweep")
    return [
        _relocated(Cell(grid.name(overrides, fields), overrides, cell_run, tasks, changed_by, fields), evaluations)
        for overrides, cell_run, tasks in zip(settings, runs, planned, strict=False)
    ]


def _relocated(cell: Cell, evaluations: str) -> Cell:
    """The cell with its directories where they belong."""
    workdir, relocated = cell.run.workdir, {}
    for directory in cell.tasks:
        variant = cell.variant(directory)
        root = workdir / "cells" / variant if variant else workdir
        relocated[directory] = root / re.sub(f"^{EVALUATION}/", f"{evaluations}/", directory)
    run = dataclasses.replace(cell.run, relocated=relocated)
    return dataclasses.replace(cell, run=run, tasks=dict(zip(cell.tasks, all_tasks(run, CELL_STAGES), strict=True)))


def unique(tasks: Iterable[Task]) -> list[Task]:
    """The first of the tasks that share a directory, so that each task still follows those that it depends on."""
    by_directory: dict[epath.Path, Task] = {}
    for task in tasks:
        by_directory.setdefault(task.directory, task)
    return list(by_directory.values())


def run_unless_diverged(
    cells: Iterable[Cell], tasks: Iterable[Task], force: Container[epath.Path], left_out: LeftOut
) -> None:
    """Runs tasks of the cells, except trainings that diverge, now or earlier, and what depends on them.

    force: directories of tasks to run again. left_out: gets the directories without a result: the message of the
    training that diverged there, or "" if it depends on one.
    """
    reads = {
        cell.tasks[directory].directory: {cell.tasks[read].directory for read in read_directories}
        for cell in cells
        for directory, read_directories in _reads(cell.tasks).items()
    }
    for task in tasks:
        if reads[task.directory] & left_out.keys():
            left_out[task.directory] = ""
            continue
        try:
            run_tasks([task], task.directory in force, retry_diverged=False)
        except Diverged as error:
            left_out[task.directory] = str(error)
            logging.warning("%s: left out, and all that depends on it: %s", task.directory, error)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A target's evaluation in a form other than original, in the first cell that has it."""

    cell: Cell
    target: str
    form: str

    @property
    def directory(self) -> str:
        return f"{EVALUATION}/{self.target}.{self.form}"

    @property
    def original_directory(self) -> str:
        return f"{EVALUATION}/{self.target}"

    @property
    def method(self) -> str:
        return split_form(self.form)[0]

    @property
    def name(self) -> str:
        """The form's settings and the cell's."""
        return ",".join(filter(None, (split_form(self.form)[1], self.cell.variant(self.directory))))

    def tasks(self) -> list[Task]:
        """Its evaluation, that of the published model, and their dependencies."""
        return self.cell.with_dependencies([self.original_directory, self.directory])

    def finished(self, left_out: LeftOut) -> bool:
        """Whether its evaluation and that of the published model have a result."""
        return not any(task.directory in left_out for task in self.tasks())

    def metrics(self, directory: str) -> Mapping[str, Any]:
        return storage.read_json(self.cell.tasks[directory].directory / evaluation_files.METRICS)


def variants(cells: Sequence[Cell]) -> Iterator[Variant]:
    """Each evaluation once, except those of published models."""
    seen = set()
    for cell in cells:
        names = sorted(map(model_name, cell.run.shared.targets), key=len, reverse=True)
        for directory, task in cell.tasks.items():
            target = next((name for name in names if directory.startswith(f"{EVALUATION}/{name}.")), None)
            if target is None or directory.removeprefix(f"{EVALUATION}/") in names or task.directory in seen:
                continue
            seen.add(task.directory)
            yield Variant(cell, target, directory.removeprefix(f"{EVALUATION}/{target}."))


def relative(directory: epath.Path, run: Run) -> str:
    """A directory's path within the working directory."""
    return str(directory.relative_to(run.workdir))


def _changed_by(
    settings: Sequence[Mapping[str, Any]], planned: Sequence[Mapping[str, Task]], fields: Sequence[str]
) -> dict[str, frozenset[str]]:
    """{directory: fields that its task depends on, by its own settings or through what it reads}."""
    changed = {directory: set[str]() for tasks in planned for directory in tasks}
    for field, (one, other) in itertools.product(fields, itertools.combinations(range(len(settings)), 2)):
        differ_only_here = all((settings[one].get(key) == settings[other].get(key)) == (key != field) for key in fields)
        for directory in changed if differ_only_here else ():
            left, right = (
                tasks[directory].settings if directory in tasks else None for tasks in (planned[one], planned[other])
            )
            if left != right:
                changed[directory].add(field)
    for tasks in planned:
        for directory, dependencies in _reads(tasks).items():  # in stage order: dependencies come first
            changed[directory] |= {field for dependency in dependencies for field in changed[dependency]}
    return {directory: frozenset(changing) for directory, changing in changed.items()}


def _reads(tasks: Mapping[str, Task]) -> dict[str, set[str]]:
    """{directory: directories that its task reads}."""
    pattern = workdir_pattern(tasks)
    return {
        directory: {read for text in (*_strings(task.settings), *task.reads) for read in pattern.findall(text)}
        for directory, task in tasks.items()
    }


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)
