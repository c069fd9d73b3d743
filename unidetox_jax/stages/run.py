"""`unidetox run`: every stage of a configuration in order, resumable as a whole.

It says first what it will do, what is done already, and about how long the rest will take on this machine; at the
end it prints the table. The stages' own records decide what is done, so killing it at any moment loses nothing.
"""

import argparse
import importlib
import time
from collections.abc import Iterable

from absl import logging

from unidetox_jax import devices, distributed, models
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.stages import STAGES, base
from unidetox_jax.stages.settings import Run

MATMUL_SHARE = 0.25  # of a matrix product's speed: small models and short texts reach less, large ones more
OVERHEAD = 10.0  # seconds of compiling, reading and writing a task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--stages", default="", metavar="A,B", help=f"only these (of {', '.join(STAGES)})")


def run_command(options: argparse.Namespace, run: Run) -> int:
    """Runs the chosen stages; returns 0, or raises what a stage raises."""
    tasks = planned(run, choose(options.stages, tuple(STAGES)))
    if not tasks:
        raise UserError(f"--stages={options.stages}: the configuration asks nothing of them")
    if distributed.is_main_process():
        print(outline(run, tasks), flush=True)
    if options.dry_run:
        return 0
    started = time.monotonic()
    base.run_tasks(tasks, options.force)
    if distributed.is_main_process():
        minutes = (time.monotonic() - started) / 60
        logging.info("run: %d tasks complete, %.1f minutes in this sitting", len(tasks), minutes)
        summary(run)
    return 0


def planned(run: Run, chosen: Iterable[str] = STAGES) -> list[base.Task]:
    """The tasks of the chosen stages, in the order of the work."""
    return [task for name in chosen for task in importlib.import_module(STAGES[name][0]).tasks(run)]


def choose(text: str, known: tuple[str, ...]) -> list[str]:
    """The stages of `--stages=a,b` in their order; all of them for an empty text.

    Raises:
      UserError: an unknown stage.
    """
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise UserError(f"--stages: no stage {name!r}{suggest(name, known)}")
    return [name for name in known if not wanted or name in wanted]


def outline(run: Run, tasks: list[base.Task]) -> str:
    """What will be done, what is done, how long it may take: a line a task."""
    states = [base.state(task) for task in tasks]
    seconds = [0.0 if state == "done" else estimate(task) for task, state in zip(tasks, states, strict=True)]
    lines, width = [f"{run.shared.name} in {run.workdir}:"], max(len(task.name) for task in tasks)
    for task, state, time_left in zip(tasks, states, seconds, strict=True):
        about = "" if state == "done" else f"about {readable(time_left)}"
        lines.append(f"  {task.name:<{width}}  {state:<6} {about}".rstrip())
    done = states.count("done")
    lines.append(f"  {done} of {len(tasks)} done; the rest may take {readable(sum(seconds))} on this machine")
    return "\n".join(lines)


def estimate(task: base.Task) -> float:
    """About how many seconds a task takes here from its beginning: a guess for a person who decides whether to wait."""
    operations = task.operations() if task.operations else 0.0
    return OVERHEAD + operations / (MATMUL_SHARE * devices.matmul_rate(models.default_dtype()))


def readable(seconds: float) -> str:
    """Seconds as "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def summary(run: Run) -> None:
    """The table of figures, where there are any, and where the page lies."""
    from unidetox_jax.stages import report

    if (run.workdir / "evaluation").exists():
        print(report.summary_table(run))
    page = run.workdir / "report" / "index.html"
    if page.exists():
        print(f"\nreport: {page}")
