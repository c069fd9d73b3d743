"""Sections of a configuration as frozen dataclasses, with names and types checked."""

import collections.abc
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from absl import logging

from unidetox_jax.errors import UserError, suggest

# Accepted for one more version: old names of settings, and removed settings with their replacement
RENAMED = {"official": "reproduce_release"}
REMOVED = {"save_every": "save_minutes"}


def parse(section: Mapping[str, Any], settings: type, where: str = "config"):
    """A section of a configuration as its frozen dataclass `settings`.

    Raises:
      UserError: an unknown field (with the nearest known one), or a value of another type than the default's.
    """
    fields = {field.name for field in dataclasses.fields(settings)}
    types = typing.get_type_hints(settings)
    section, values = dict(section), {}
    for old, new in RENAMED.items():
        if new in fields and (value := section.pop(old, None)) is not None:
            section[renamed(old, f"{where}.")] = value
    for old, new in REMOVED.items():
        if new in fields and section.pop(old, None) is not None:
            logging.warning("%s.%s: ignored, as it was removed; see %s.%s", where, old, where, new)
    for name, value in section.items():
        if name not in fields:
            raise UserError(f"{where}.{name}: no such field{suggest(name, fields)}")
        values[name] = _checked(value, types[name], f"{where}.{name}")
    try:
        return settings(**values)
    except UserError as error:  # its message begins with the field's name
        raise UserError(f"{where}.{error}") from None


def renamed(name: str, where: str) -> str:
    """The current name of a setting; warns if that is another."""
    if name in RENAMED:
        logging.warning("%s%s is now called %s; the next version drops the old name", where, name, RENAMED[name])
    return RENAMED.get(name, name)


def _checked(value: Any, expected: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is tuple:
        if isinstance(value, str):
            raise UserError(f"{where}: found the text {value!r}, expected a list written ('a','b')")
        if any(isinstance(item, str) and "," in item.partition("(")[0] for item in value):
            raise UserError(f"{where}: a comma inside an element of {tuple(value)!r}; write ('a','b')")
        return tuple(_checked(item, arguments[0], where) for item in value)
    if origin is collections.abc.Mapping:
        return {name: _checked(part, arguments[1], f"{where}.{name}") for name, part in value.items()}
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(expected, type) and dataclasses.is_dataclass(expected):
        return parse(value, expected, where)
    if expected in (int, float, str, bool) and type(value) is not expected:
        raise UserError(f"{where}: found {value!r}, expected {expected.__name__}")
    return value
