"""A grid of settings: fields of the configuration and their values, every combination of which is a cell.

{"detoxify": {"learning_rate": (1e-4, 3e-4)}, "distill": {"objective": {"alpha": (0.05, 0.1)}}}     in a configuration
--grid detoxify.learning_rate=1e-4,3e-4 --grid distill.objective.alpha=0.05,0.1                on a command line
"""

import ast
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unidetox_jax import extensions
from unidetox_jax.decoding import objectives
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.stages import base
from unidetox_jax.stages.settings import STAGES, Run, parse_run

WHERE, OBJECTIVE = "config.sweep.grid", "objective"
LONGEST = 60  # of a value within a directory's name
HOW = "write --grid FIELD=VALUE,VALUE, such as --grid detoxify.learning_rate=1e-4,3e-4"

Grid = Mapping[str, tuple[Any, ...]]  # field → values; a field is written "detoxify.learning_rate"


def of(run: Run, arguments: Sequence[str] = ()) -> Grid:
    """The configuration's grid, with those of the command line ("FIELD=VALUE,VALUE") in it.

    Raises:
      UserError: no field, a field without values or with one twice, a field that the configuration does not have.
    """
    grid = _flat(run.sweep.grid)
    for text in arguments:
        field, equals, written = text.partition("=")
        if not (field and equals):
            raise UserError(f"--grid {text}: expected FIELD=VALUE,VALUE")
        grid[field.removeprefix("config.")] = tuple(map(_value, _split(written)))
    if not grid:
        raise UserError(f"{WHERE}: empty; {HOW}")
    for field, values in grid.items():
        if not values:
            raise UserError(f"{WHERE}: {field} has no values; {HOW}")
        if len(set(map(repr, values))) < len(values):
            raise UserError(f"{WHERE}: {field} has a value twice in {values}")
        for value in values:
            _with(_plain(run), field.split("."), value, field)
    return grid


def cells(grid: Grid) -> list[dict[str, Any]]:
    """Field → value of every cell, the last field changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def applied(run: Run, settings: Mapping[str, Any]) -> Run:
    """The run with other values of some fields. Raises UserError where a field or its value is not as it must be."""
    config = _plain(run)
    for field, value in sorted(settings.items()):  # an objective before its settings
        config = _with(config, field.split("."), value, field)
    return parse_run(config, run.workdir)


def name(settings: Mapping[str, Any], fields: Sequence[str]) -> str:
    """What a cell is called: `alpha=0.1,learning_rate=5e-05`; fields: all of the grid, to be told apart."""
    return ",".join(f"{_short(field, fields)}={_shown(value)}" for field, value in settings.items())


def _flat(values: Mapping[str, Any], within: str = "") -> dict[str, tuple[Any, ...]]:
    """Field → values of a nested grid."""
    found: dict[str, tuple[Any, ...]] = {}
    for key, value in values.items():
        if hasattr(value, "items"):
            found |= _flat(value, f"{within}{key}.")
        elif isinstance(value, list | tuple):
            found[within + key] = tuple(value)
        else:
            raise UserError(f"{WHERE}.{within}{key}: found {value!r}, expected a list of values written ({value!r},)")
    return found


def _split(text: str) -> list[str]:
    """A text at its commas, but for those within brackets or quotation marks."""
    parts = re.findall(r"""(?:"[^"]*"|'[^']*'|\((?:[^()]|\([^()]*\))*\)|[^,])+""", text)
    return [part.strip() for part in parts]


def _value(text: str) -> Any:
    """A literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _plain(run: Run) -> dict[str, Any]:
    """The configuration as nested dictionaries."""
    return {**dataclasses.asdict(run.shared), **{part: dataclasses.asdict(getattr(run, part)) for part in STAGES}}


def _with(node: Any, path: Sequence[str], value: Any, field: str) -> Any:
    """A part of the configuration with another value at a path in it."""
    if not path:
        if isinstance(node, dict):
            raise UserError(f"{WHERE}: {field} is a group of fields; name one of them: {', '.join(node)}")
        return value
    key, *rest = path
    if isinstance(node, str) and not rest and field.split(".")[-2] == OBJECTIVE:
        return _with_setting(node, key, value, field)
    if not isinstance(node, dict) or key not in node:
        hint = suggest(key, node) if isinstance(node, dict) else ""
        raise UserError(f"{WHERE}: {field}: no such field{hint}")
    return {**node, key: _with(node[key], rest, value, field)}


def _with_setting(text: str, key: str, value: Any, field: str) -> str:
    """An objective's text with another value of one of its settings."""
    function, settings = extensions.parse(text, OBJECTIVE)
    changed = f"{function}({', '.join(f'{k}={v!r}' for k, v in {**settings, key: value}.items())})"
    try:
        objectives.get(changed)
    except UserError as error:
        raise UserError(f"{WHERE}: {field}: {error}") from None
    return changed


def _short(field: str, fields: Sequence[str]) -> str:
    """The last parts of a field, as many as tell it from the others."""
    parts = field.split(".")
    ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    others = [f".{other}" for other in fields if other != field]
    return next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), field)


def _shown(value: Any) -> str:
    """A value as a part of a directory's name; what such a name cannot have is made up for by a hash."""
    text = "-".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    plain = re.sub(r"[^\w.=()-]+", "_", text)[:LONGEST]
    return plain if plain == text else f"{plain}_{base.digest(value)[:6]}"
