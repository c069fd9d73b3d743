"""A decoding objective with its settings, as one frozen value that a jitted function can take as an argument.

It is at once hashable and a pytree: settings declared as floats are its leaves, hence
traced, so that a sweep over alpha compiles once; the function and all other settings (bools, texts, ints,
which may be shapes) belong to its structure.
"""

import dataclasses
import inspect
import math
import numbers
import typing
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from unidetox_jax import extensions
from unidetox_jax.decoding import context as context_
from unidetox_jax.decoding.context import Context, Prompt
from unidetox_jax.errors import UserError, suggest


@dataclasses.dataclass(frozen=True)
class Range:
    """The interval of a numeric setting: `alpha: Annotated[float, Range("(0, 1]")] = 0.1`."""

    text: str

    def __contains__(self, value: float) -> bool:
        low, high = (float(end) for end in self.text[1:-1].split(","))
        above = value >= low if self.text[0] == "[" else value > low
        return above and (value <= high if self.text[-1] == "]" else value < high)


class Arrays:
    """The file of a setting that names one, NumPy's .npz: `subspace: Annotated[str, Arrays("w", "b")]`."""

    def __init__(self, *names: str):
        self.names = names

    def load(self, path: str, where: str) -> list[np.ndarray]:
        """Its arrays of those names, float32. Raises UserError: no such file, no .npz, one that lacks an array."""
        expected = f"an .npz file that holds {' and '.join(self.names)}"
        try:
            with epath.Path(path).open("rb") as file, np.load(file) as arrays:
                return [np.asarray(arrays[name], np.float32) for name in self.names]
        except FileNotFoundError:
            raise UserError(f"{where}: no file {path!r}, expected {expected}") from None
        except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{where}: {path!r}: {error}; expected {expected}") from None


STATIC = {"static": True}
CONTEXT = "context"  # the parameter that is no setting


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
    """`objective(*logits)` → scores, float32 [B,V]; equal to another when name and settings are equal.

    Attributes:
      name: a name of `objectives`, or "package.module:function".
      arguments: the models' names in the function's order, for instance ("base", "toxic"); "*biased"
      stands for one or more.
      num_models: how many logits it needs, or how many at least where it takes any number (`takes_more`).
      settings: every setting with its value, those with their defaults too.
      needs_context: whether the function declares `context`. It is then called with a `Context`, and the result is
      (scores, its next state), None where it has none.
    """

    name: str = dataclasses.field(metadata=STATIC)
    function: Callable[..., jax.Array] = dataclasses.field(metadata=STATIC, repr=False)
    arguments: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    constants: tuple[tuple[str, Any], ...] = dataclasses.field(metadata=STATIC)
    number_names: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    number_values: tuple[Any, ...]
    needs_context: bool = dataclasses.field(default=False, metadata=STATIC)

    @property
    def settings(self) -> dict[str, Any]:
        return {**dict(self.constants), **dict(zip(self.number_names, self.number_values, strict=True))}

    @property
    def files(self) -> dict[str, str]:
        """Setting → file that it names, of which the result depends as well."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        named = {name for name, hint in hints.items() if any(isinstance(x, Arrays) for x in typing.get_args(hint)[1:])}
        return {name: value for name, value in self.settings.items() if name in named}

    @property
    def num_models(self) -> int:
        return len(self.arguments)

    @property
    def takes_more(self) -> bool:
        return bool(self.arguments) and self.arguments[-1].startswith("*")

    def check_models(self, count: int) -> None:
        """Raises UserError unless `count` models are as many as the function takes."""
        if count < self.num_models or (count > self.num_models and not self.takes_more):
            expected = f"{self.num_models}{' or more' if self.takes_more else ''} ({', '.join(self.arguments)})"
            raise UserError(f"objective {self.name}: found {count} models, expected {expected}")

    def initial_state(self, prompt: Prompt) -> Any:
        """The state before the first step, a pytree of arrays; None where the function has none."""
        make = getattr(self.function, context_.STATE, None)
        return None if make is None else jax.tree.map(jnp.asarray, make(prompt))

    def __call__(self, *logits: jax.Array, context: Context | None = None) -> Any:
        self.check_models(len(logits))
        floats = [jnp.asarray(z).astype(jnp.float32) for z in logits]
        if not self.needs_context:
            return self._checked_scores(self.function(*floats, **self.settings), floats[0])
        if context is None:
            raise UserError(
                f"objective {self.name}: sees the text so far (its argument `context`), which only generation gives"
            )
        result, state = self.function(*floats, **self.settings, context=context), None
        if hasattr(self.function, context_.STATE):
            if not isinstance(result, tuple) or len(result) != 2:
                raise UserError(f"objective {self.name}: has a state, expected (scores, state) from it")
            result, state = result
            found, expected = _described(state), _described(context.state)
            if found != expected:
                raise UserError(
                    f"objective {self.name}: returns the state {found}, expected one like the first, {expected}"
                )
        return self._checked_scores(result, floats[0]), state

    def _checked_scores(self, scores: jax.Array, logits: jax.Array) -> jax.Array:
        if isinstance(scores, tuple):
            raise UserError(
                f"objective {self.name}: returns a tuple; a state beside the scores is declared by @with_state"
            )
        if jnp.shape(scores) != jnp.shape(logits):
            found, expected = jnp.shape(scores), jnp.shape(logits)
            raise UserError(f"objective {self.name}: returns shape {found}, expected the logits' {expected}")
        return scores.astype(jnp.float32)

    def __str__(self) -> str:
        """What `objectives.get` turns into the same value again."""
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(self.settings.items()))
        return f"{self.name}({settings})" if settings else self.name


def _described(state: Any) -> str:
    """A pytree's structure, dtypes and shapes."""
    return str(jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", state)).replace("'", "")


def resolve(text: str, settings: Mapping[str, Any], known: Mapping[str, Callable]) -> Objective:
    """The objective that "name", "name(setting=literal)" or "package.module:function(…)" means."""
    name, written = extensions.parse(text, "objective")
    for twice in written.keys() & settings.keys():
        raise UserError(f"objective {name}: setting {twice} is given twice, in the text and beside it")
    function = extensions.load(name, "objective", known=known) if ":" in name else known.get(name)
    if function is None:
        tail = f"{suggest(name, known)}; your own is written package.module:function"
        raise UserError(f"objective: unknown name {name!r}{tail}")
    return _build(name, function, {**written, **settings})


def _build(name: str, function: Callable[..., jax.Array], given: Mapping[str, Any]) -> Objective:
    try:
        parameters = inspect.signature(function).parameters.values()
        hints = typing.get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise UserError(f"objective {name}: its signature cannot be read: {error}") from error
    arguments, constants, names, values = [], [], [], []
    declared = {}
    needs_context = False
    for parameter in parameters:
        if parameter.name == CONTEXT:
            needs_context = True
        elif parameter.kind is parameter.VAR_POSITIONAL:
            arguments.append(f"*{parameter.name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            raise UserError(f"objective {name}: **{parameter.name} is not allowed; name every setting")
        elif (
            parameter.kind is not parameter.KEYWORD_ONLY
            and parameter.default is parameter.empty
            and (parameter.name not in given)
        ):
            arguments.append(parameter.name)
        else:
            declared[parameter.name] = parameter.default
    for unknown in given.keys() - declared.keys():
        raise UserError(f"objective {name}: no setting {unknown!r}{suggest(unknown, declared)}")
    for setting, default in sorted(declared.items()):
        value = given.get(setting, default)
        if value is inspect.Parameter.empty:
            raise UserError(f"objective {name}: setting {setting} has no default; write {name}({setting}=…)")
        value, traced = _checked(f"objective {name}: {setting}", value, default, hints.get(setting))
        if traced:
            names.append(setting)
            values.append(value)
        else:
            constants.append((setting, value))
    if hasattr(function, context_.STATE) and not needs_context:
        raise UserError(f"objective {name}: has a state, but no argument `{CONTEXT}` to find it in")
    if not arguments:
        raise UserError(f"objective {name}: takes no logits; a parameter without a default stands for a model")
    return Objective(name, function, tuple(arguments), tuple(constants), tuple(names), tuple(values), needs_context)


_KINDS = {bool: "True or False", str: "a text", tuple: "a tuple"}


def _checked(where: str, value: Any, default: Any, hint: Any) -> tuple[Any, bool]:
    """The setting's value as it is kept, and whether it is traced: declared as a float, or one where nothing
    is declared."""
    extras = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
    kind = typing.get_args(hint)[0] if extras else hint
    if kind is None:
        kind = type(value) if default in (inspect.Parameter.empty, None) else type(default)
        kind = float if kind is int and isinstance(value, float) else kind
    if isinstance(value, jax.core.Tracer):
        return value, True
    if isinstance(value, jax.Array) and value.ndim == 0:
        value = value.item()
    interval = next((extra for extra in extras if isinstance(extra, Range)), None)
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        expected = f"a {'whole ' if kind is int else ''}number{f' in {interval.text}' if interval else ''}"
        if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value):
            raise UserError(f"{where}: found {value!r}, expected {expected}")
        if interval and float(value) not in interval:
            raise UserError(f"{where}: found {value!r}, expected {expected}")
        return kind(value), kind is float
    value = _frozen(value)
    if kind in _KINDS and not isinstance(value, kind):
        raise UserError(f"{where}: found {value!r}, expected {_KINDS[kind]}")
    for arrays in (extra for extra in extras if isinstance(extra, Arrays)):
        arrays.load(value, where)
    try:
        hash(value)
    except TypeError:
        expected = "a number, text, bool, None or a tuple of these"
        raise UserError(f"{where}: found {value!r}, expected {expected}") from None
    return value, False


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
