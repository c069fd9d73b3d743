"""Names in configurations: "name", "name(setting=literal, …)", and "package.module:attribute(…)" for user code.

In messages, `what` is the kind of thing that is named ("objective", "metric").
"""

import ast
import importlib
import os
import sys
import traceback
from collections.abc import Collection, Iterable
from typing import Any

from unidetox_jax.errors import UserError, suggest


def parse(text: str, what: str) -> tuple[str, dict[str, Any]]:
    """ "name(a=1)" → ("name", {"a": 1}); settings are literals, nothing is evaluated. Raises UserError if malformed."""
    name, bracket, rest = text.strip().partition("(")
    name = name.strip()
    if not bracket:
        return name, {}
    problem = f"{what} {text!r}: expected name(setting=literal, …)"
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
    except SyntaxError as error:
        raise UserError(f"{problem}: {error.msg}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise UserError(problem)
    settings = {}
    for keyword in call.keywords:
        try:
            if keyword.arg is None:
                raise ValueError
            settings[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            raise UserError(f"{problem}: {ast.unparse(keyword)} is not a literal") from None
    return name, settings


def parse_named(entries: Iterable[str], where: str, kind: str, taken: Collection[str] = ()) -> dict[str, str]:
    """Entries 'name=value' as name → value. In messages, `where` is their setting and `kind` the value ("PATH").

    Raises:
      UserError: an entry without a name or a value, a name with a slash, or one that is taken.
    """
    values: dict[str, str] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        if not (name and value) or "/" in name:
            raise UserError(f"{where}: found {entry!r}, expected 'name={kind}'")
        if name in taken or name in values:
            raise UserError(f"{where}: the name {name!r} is taken; give {value!r} another")
        values[name] = value
    return values


def load(path: str, what: str, kind: str = "function", known: Iterable[str] = ()) -> Any:
    """The callable at "package.module:attribute"; the module may be in the current directory.

    known: built-in names, of which the module's name may be a misspelling.

    Raises:
      UserError: no such module or attribute, or a module whose import fails.
    """
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UserError(f"{what} {path!r}: expected package.module:{kind}")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that it shadows nothing; it stays for the module's later imports
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = f"no module {error.name!r}, neither installed nor in {here}"
        if known and error.name == module_name.partition(".")[0]:
            missing += suggest(module_name, known)
        raise UserError(f"{what} {path!r}: {missing}") from error
    except Exception as error:  # report the position in the user's file in one line
        frame = error if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1]
        failed = f"importing it failed at {frame.filename}:{frame.lineno}: {type(error).__name__}: {error}"
        raise UserError(f"{what} {path!r}: {failed}") from error
    value = getattr(module, attribute, None)
    if not callable(value):
        known = [name for name, other in vars(module).items() if callable(other) and not name.startswith("_")]
        missing = f"{module_name} has no {kind} {attribute!r}{suggest(attribute, known)}"
        raise UserError(f"{what} {path!r}: {missing}")
    return value
