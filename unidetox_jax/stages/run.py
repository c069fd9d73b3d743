"""`unidetox run`: all stages of a configuration in order, resumable as a whole.

First prints what is done, what is to do and about how long that takes on this machine; at the end the results table.
"""

import argparse
import importlib
import time
from collections.abc import Iterable

from absl import logging

from unidetox_jax import devices, distributed, models
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.stages import STAGES
from unidetox_jax.stages.settings import Run
from unidetox_jax.stages.task import Task, run_tasks, state

MATMUL_SHARE = 0.25  # of the peak matmul rate: small models and short texts reach less, large ones more
OVERHEAD = 10.0  # seconds to compile, read and write, per task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--stages", default="", metavar="A,B", help=f"only these (of {', '.join(STAGES)})")


def run_command(options: argparse.Namespace, run: Run) -> int:
    """Runs the selected stages; returns 0, or raises what a stage raises."""
    tasks = all_tasks(run, select_stages(options.stages))
    if not tasks:
        raise UserError(f"--stages={options.stages}: the configuration has no tasks for them")
    if distributed.is_main_process():
        print(outline(run, tasks), flush=True)
    if options.dry_run:
        return 0
    started = time.monotonic()
    run_tasks(tasks, options.force)
    if distributed.is_main_process():
        minutes = (time.monotonic() - started) / 60
        logging.info("run: %d tasks complete, %.1f minutes since this start", len(tasks), minutes)
        print_summary(run)
    return 0


def all_tasks(run: Run, stages: Iterable[str] = STAGES) -> list[Task]:
    """The tasks of some stages, in order."""
    return [task for name in stages for task in importlib.import_module(STAGES[name][0]).tasks(run)]


def select_stages(text: str) -> list[str]:
    """The stages of `--stages=a,b` in their order; all of them for an empty text.

    Raises:
      UserError: an unknown stage.
    """
    selected = [name.strip() for name in text.split(",") if name.strip()]
    for name in selected:
        if name not in STAGES:
            raise UserError(f"--stages: no stage {name!r}{suggest(name, STAGES)}")
    return [name for name in STAGES if not selected or name in selected]


def outline(run: Run, tasks: list[Task]) -> str:
    """A line per task: its state, and about how long it takes."""
    states = [state(task) for task in tasks]
    seconds = [0.0 if state == "done" else estimate(task) for task, state in zip(tasks, states, strict=True)]
    lines, width = [f"{run.shared.name} in {run.workdir}:"], max(len(task.name) for task in tasks)
    for task, task_state, time_left in zip(tasks, states, seconds, strict=True):
        about = "" if task_state == "done" else f"about {readable(time_left)}"
        lines.append(f"  {task.name:<{width}}  {task_state:<6} {about}".rstrip())
    done = states.count("done")
    lines.append(f"  {done} of {len(tasks)} done; the rest may take {readable(sum(seconds))} on this machine")
    return "\n".join(lines)


def estimate(task: Task) -> float:
    """Seconds that a task takes here from its beginning: a rough guess."""
    operations = task.operations() if task.operations else 0.0
    return OVERHEAD + operations / (MATMUL_SHARE * devices.matmul_rate(models.default_dtype()))


def readable(seconds: float) -> str:
    """Seconds as "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_summary(run: Run) -> None:
    """Prints the table of results, if any, and the report's path."""
    from unidetox_jax.stages import report

    if (run.workdir / "evaluation").exists():
        print(report.summary_table(run))
    page = run.workdir / "report" / "index.html"
    if page.exists():
        print(f"\nreport: {page}")
