"""A grid of settings: fields of the configuration with their values, every combination of which is a cell.

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
from unidetox_jax.stages.settings import SECTIONS, Run, parse_run
from unidetox_jax.stages.task import digest

SECTION, OBJECTIVE = "config.sweep.grid", "objective"
MAX_VALUE_LENGTH = 60  # characters of a value in a directory's name
USAGE = "write --grid FIELD=VALUE,VALUE, such as --grid detoxify.learning_rate=1e-4,3e-4"

Grid = Mapping[str, tuple[Any, ...]]  # field ("detoxify.learning_rate") → values


def parse(run: Run, arguments: Sequence[str] = ()) -> Grid:
    """The configuration's grid, updated by those of the command line ("FIELD=VALUE,VALUE").

    Raises:
      UserError: an empty grid, an unknown field, no values or a duplicate.
    """
    grid = _flatten(run.sweep.grid)
    for text in arguments:
        field, equals, values_text = text.partition("=")
        if not (field and equals):
            raise UserError(f"--grid {text}: expected FIELD=VALUE,VALUE")
        grid[field.removeprefix("config.")] = tuple(map(_literal, _split(values_text)))
    if not grid:
        raise UserError(f"{SECTION}: empty; {USAGE}")
    for field, values in grid.items():
        if not values:
            raise UserError(f"{SECTION}: {field} has no values; {USAGE}")
        if len(set(map(repr, values))) < len(values):
            raise UserError(f"{SECTION}: {field} has a value twice in {values}")
        for value in values:
            _replace(_as_dict(run), field.split("."), value, field)
    return grid


def combinations(grid: Grid) -> list[dict[str, Any]]:
    """{field: value} of every cell, the last field changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def apply(run: Run, settings: Mapping[str, Any]) -> Run:
    """The run with some fields replaced. Raises UserError for an unknown field or a wrong value."""
    config = _as_dict(run)
    for field, value in sorted(settings.items()):  # an objective before its settings
        config = _replace(config, field.split("."), value, field)
    return parse_run(config, run.workdir)


def name(settings: Mapping[str, Any], fields: Sequence[str]) -> str:
    """A cell's name: `alpha=0.1,learning_rate=5e-05`. fields: all of the grid, which short names must tell apart."""
    return ",".join(f"{_short(field, fields)}={_file_name(value)}" for field, value in settings.items())


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, ...]]:
    """{field: values} of a nested grid."""
    flat: dict[str, tuple[Any, ...]] = {}
    for key, value in values.items():
        if hasattr(value, "items"):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat[prefix + key] = tuple(value)
        else:
            raise UserError(f"{SECTION}.{prefix}{key}: found {value!r}, expected a list of values written ({value!r},)")
    return flat


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets and quotation marks."""
    values = re.findall(r"""(?:"[^"]*"|'[^']*'|\((?:[^()]|\([^()]*\))*\)|[^,])+""", text)
    return [value.strip() for value in values]


def _literal(text: str) -> Any:
    """The value of a Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _as_dict(run: Run) -> dict[str, Any]:
    """The configuration as nested dictionaries."""
    sections = {section: dataclasses.asdict(getattr(run, section)) for section in SECTIONS}
    return {**dataclasses.asdict(run.shared), **sections}


def _replace(node: Any, path: Sequence[str], value: Any, field: str) -> Any:
    """A part of the configuration with another value at a path in it. field: the whole path, for messages."""
    if not path:
        if isinstance(node, dict):
            raise UserError(f"{SECTION}: {field} is a group of fields; name one of them: {', '.join(node)}")
        return value
    key, *rest = path
    if isinstance(node, str) and not rest and field.split(".")[-2] == OBJECTIVE:
        return _replace_in_objective(node, key, value, field)
    if not isinstance(node, dict) or key not in node:
        hint = suggest(key, node) if isinstance(node, dict) else ""
        raise UserError(f"{SECTION}: {field}: no such field{hint}")
    return {**node, key: _replace(node[key], rest, value, field)}


def _replace_in_objective(text: str, key: str, value: Any, field: str) -> str:
    """An objective's text with another value of one of its settings."""
    function, settings = extensions.parse(text, OBJECTIVE)
    changed = f"{function}({', '.join(f'{k}={v!r}' for k, v in {**settings, key: value}.items())})"
    try:
        objectives.get(changed)
    except UserError as error:
        raise UserError(f"{SECTION}: {field}: {error}") from None
    return changed


def _short(field: str, fields: Sequence[str]) -> str:
    """The fewest last components of a field that tell it from the others."""
    components = field.split(".")
    suffixes = [".".join(components[-count:]) for count in range(1, len(components) + 1)]
    others = [f".{other}" for other in fields if other != field]
    return next((suffix for suffix in suffixes if not any(other.endswith(f".{suffix}") for other in others)), field)


def _file_name(value: Any) -> str:
    """A value as part of a directory's name; replaced or cut characters are made up for by a hash."""
    text = "-".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    plain = re.sub(r"[^\w.=()-]+", "_", text)[:MAX_VALUE_LENGTH]
    return plain if plain == text else f"{plain}_{digest(value)[:6]}"
