"""`unidetox bench`: tokens a second, shares of the machine's peak rates, compile time, memory.

Prints a table for each benchmark, then one JSON line for each measurement, so that `| grep '^{'` selects the data.
"""

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from unidetox_jax import distributed
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.progress import format_table
from unidetox_jax.stages.settings import Run

# name → module with `measure(run) -> list[dict]` and optionally `COLUMNS` of the table
BENCHMARKS = {
    "decode": "unidetox_jax.benchmarks.decode",
    "train": "unidetox_jax.benchmarks.train",
    "evaluate": "unidetox_jax.benchmarks.evaluate",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments: everything is set in `config.bench`."""


def run_command(options: argparse.Namespace, run: Run) -> int:
    """Runs and prints the benchmarks in `config.bench.what`; returns 0.

    Raises:
      UserError: an unknown benchmark, or sizes below 1.
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
        if distributed.is_main_process():
            print(f"{name}: {run.bench.model}\n{table(rows, getattr(module, 'COLUMNS', None))}\n")
            for row in rows:
                print(json.dumps(row), flush=True)
    return 0


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """The rows' columns, aligned; by default all of them. Missing values are dashes."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    return format_table([columns, *([_cell(row.get(name)) for name in columns] for row in rows)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
