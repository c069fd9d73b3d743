"""Parts of a stage's result that are kept as soon as they are whole, so that an interrupted stage need not make them
again.

The surprising thing: every process comes to every part, finds out together with the others whether it is there, and
computes it together with them; process 0 alone writes.
"""

import io
import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from etils import epath

from unidetox_jax import distributed
from unidetox_jax.errors import UserError
from unidetox_jax.stages import base, parts

Value = TypeVar("Value")


def kept(
    path: epath.Path,
    make: Callable[[], Value],
    read: Callable[[epath.Path], Value],
    write: Callable[[epath.Path, Value], None],
    together: bool = True,
) -> Value:
    """What lies at `path`, or what `make` gives, which then lies there. together: every process asks, and hears what
    process 0 sees; otherwise process 0 alone does."""
    there = "there" if path.exists() else ""
    if distributed.as_first_says(there) if together else there:
        return read(path)
    value = make()
    if parts.first_process():
        write(path, value)
    return value


def read_lines(path: epath.Path) -> list[Any]:
    """The values of a file with one JSON value a line."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def write_lines(path: epath.Path, values: Iterable[Any]) -> None:
    """Writes one JSON value a line, whole or not at all."""
    base.write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_array(path: epath.Path) -> np.ndarray:
    """An array of `write_array`."""
    with path.open("rb") as file:
        return np.load(file, allow_pickle=False)


def write_array(path: epath.Path, array: np.ndarray) -> None:
    """Writes an array, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    _write_bytes(path, buffer.getvalue())


def write_arrays(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    _write_bytes(path, buffer.getvalue())


def _write_bytes(path: epath.Path, content: bytes) -> None:
    temporary = path.parent / f".{path.name}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
