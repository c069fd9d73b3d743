"""Labelled text from any csv or jsonl: a text field, a label field, and what counts as positive."""

import ast
import csv
import io
import json
from typing import Any

from etils import epath

from unidetox_jax.errors import UserError, suggest


def rows(path: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a `.csv` (with a header) or `.jsonl` file.

    Raises:
      UserError: no such file, another kind of file, a line that is no JSON object, or no row at all.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; expected labelled text, csv or jsonl")
    content = path.read_text()
    if path.suffix == ".csv":
        found = list(csv.DictReader(io.StringIO(content, newline="")))
    elif path.suffix in (".jsonl", ".json"):
        found = []
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                found.append(_object(line, path, number))
    else:
        raise UserError(f"{path}: expected a name that ends in .csv or .jsonl")
    if not found:
        raise UserError(f"{path}: no rows")
    return found


def _object(line: str, path: epath.Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {number} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: line {number} is {type(value).__name__}, expected an object")
    return value


def column(found: list[dict[str, Any]], field: str, path: epath.PathLike) -> list[Any]:
    """One field of every row. Raises UserError where it is missing: the first such row, the fields that there
    are."""
    for number, row in enumerate(found):
        if field not in row or row[field] is None:
            raise UserError(f"{path}: row {number} has no field {field!r}{suggest(field, map(str, row))}")
    return [row[field] for row in found]


def texts(found: list[dict[str, Any]], field: str, path: epath.PathLike) -> list[str]:
    """The text of every row; a Python bytes literal (`b'…'`, as ToxiGen's train file has it) is decoded."""
    return [_decoded(str(text)) for text in column(found, field, path)]


def _decoded(text: str) -> str:
    if text[:2] not in ("b'", 'b"') or text[-1:] != text[1]:
        return text
    try:
        return ast.literal_eval(text).decode("utf-8", "replace")
    except (SyntaxError, ValueError):
        return text


def positives(
    found: list[dict[str, Any]],
    field: str,
    path: epath.PathLike,
    above: float | None,
    values: tuple[str, ...],
) -> list[bool]:
    """Whether each row is toxic: its label is one of `values`, or, where there are none, a number >
    `above`."""
    labels = column(found, field, path)
    if values:
        known = {str(label) for label in labels}
        for value in values:
            if value not in known:
                raise UserError(f"{path}: no row has {field} = {value!r}{suggest(value, known)}")
        return [str(label) in values for label in labels]
    for number, label in enumerate(labels):
        try:
            float(label)
        except (TypeError, ValueError):
            raise UserError(f"{path}: row {number} has {field} = {label!r}, expected a number") from None
    return [float(label) > above for label in labels]
