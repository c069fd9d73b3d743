"""`unidetox bench`: tokens a second, shares of what this machine can do at best, compile time, memory.

Prints a table a benchmark, and then one JSON line a measurement, so that `| grep '^{'` is a data set.
"""

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from unidetox_jax import distributed
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.progress import aligned
from unidetox_jax.stages.settings import Run

# what → the module with `measure(run) -> list[dict]` and, where it has one, `COLUMNS` for the table
BENCHMARKS = {
    "decode": "unidetox_jax.benchmarks.decode",
    "train": "unidetox_jax.benchmarks.train",
    "evaluate": "unidetox_jax.benchmarks.evaluate",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing beside the configuration: `config.bench` says it all."""


def run_command(options: argparse.Namespace, run: Run) -> int:
    """Runs what `config.bench.what` names and prints it; returns 0.

    Raises:
      UserError: an unknown benchmark, or sizes that nothing can be measured with.
    """
    for name in run.bench.what:
        if name not in BENCHMARKS:
            raise UserError(f"config.bench.what: no benchmark {name!r}{suggest(name, BENCHMARKS)}")
    for field in ("new_tokens", "repeats", "steps"):
        if getattr(run.bench, field) < 1:
            raise UserError(f"config.bench.{field}: found {getattr(run.bench, field)}, expected at least 1")
    for name in run.bench.what:
        module = importlib.import_module(BENCHMARKS[name])
        rows = module.measure(run)
        if distributed.first_process():
            print(f"{name}: {run.bench.model}\n{table(rows, getattr(module, 'COLUMNS', None))}\n")
            for row in rows:
                print(json.dumps(row), flush=True)
    return 0


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """The rows' columns, aligned; by default all of them. What a row does not have is a dash."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    return aligned([columns, *([_cell(row.get(name)) for name in columns] for row in rows)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
