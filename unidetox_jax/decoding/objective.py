"""A decoding objective with its settings, as a frozen value that can be an argument of a jitted function.

It is hashable and a pytree. Settings declared as floats are its leaves and so traced: a sweep over alpha compiles once.
The function and all other settings (bools, strings, and ints, which may be shapes) belong to the pytree's structure.
"""

import dataclasses
import inspect
import math
import numbers
import typing
import zipfile
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from unidetox_jax import extensions, storage
from unidetox_jax.decoding.context import INITIAL_STATE, STATIC, Context, Prompt
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
    """A setting that names an .npz file of NumPy arrays: `subspace: Annotated[str, Arrays("w", "b")]`."""

    def __init__(self, *names: str):
        self.names = names

    def load(self, path: str, where: str) -> list[np.ndarray]:
        """The arrays as float32. Raises UserError: no such file, not an .npz file, or an array is missing."""
        expected = f"an .npz file that holds {' and '.join(self.names)}"
        try:
            arrays = storage.read_arrays(path, self.names)
            return [np.asarray(array, np.float32) for array in arrays.values()]
        except FileNotFoundError:
            raise UserError(f"{where}: no file {path!r}, expected {expected}") from None
        except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{where}: {path!r}: {error}; expected {expected}") from None


Fraction = Annotated[float, Range("(0, 1]")]
NonNegative = Annotated[float, Range("[0, inf)")]
CONTEXT = "context"  # the parameter that is neither a model's logits nor a setting


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
    """`objective(*logits)` → scores, float32 [B,V]. Objectives are equal if their names and settings are.

    Attributes:
      name: a name in `objectives`, or "package.module:function".
      arguments: the models' names in the function's order, such as ("base", "toxic"); "*biased" stands for one or more.
      num_models: how many models' logits it takes, or at least takes if `takes_more`.
      settings: all settings with their values, including defaults.
      needs_context: whether the function declares `context`. It is then called with a `Context` and returns (scores,
        next state), where the state is None for stateless functions.
    """

    name: str = dataclasses.field(metadata=STATIC)
    function: Callable[..., jax.Array] = dataclasses.field(metadata=STATIC, repr=False)
    arguments: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    static_settings: tuple[tuple[str, Any], ...] = dataclasses.field(metadata=STATIC)
    traced_names: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    traced_values: tuple[Any, ...]
    needs_context: bool = dataclasses.field(default=False, metadata=STATIC)

    @property
    def settings(self) -> dict[str, Any]:
        return {**dict(self.static_settings), **dict(zip(self.traced_names, self.traced_values, strict=True))}

    @property
    def files(self) -> dict[str, str]:
        """Settings that name files, on whose content the result depends: setting → path."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        names = {name for name, hint in hints.items() if any(isinstance(x, Arrays) for x in typing.get_args(hint)[1:])}
        return {name: value for name, value in self.settings.items() if name in names}

    @property
    def num_models(self) -> int:
        return len(self.arguments)

    @property
    def takes_more(self) -> bool:
        return bool(self.arguments) and self.arguments[-1].startswith("*")

    def check_models(self, count: int) -> None:
        """Raises UserError unless the function takes `count` models."""
        if count < self.num_models or (count > self.num_models and not self.takes_more):
            expected = f"{self.num_models}{' or more' if self.takes_more else ''} ({', '.join(self.arguments)})"
            raise UserError(f"objective {self.name}: found {count} models, expected {expected}")

    def initial_state(self, prompt: Prompt) -> Any:
        """The state before the first step, a pytree of arrays; None for stateless functions."""
        initial = getattr(self.function, INITIAL_STATE, None)
        return None if initial is None else jax.tree.map(jnp.asarray, initial(prompt))

    def __call__(self, *logits: jax.Array, context: Context | None = None) -> Any:
        self.check_models(len(logits))
        floats = [jnp.asarray(z).astype(jnp.float32) for z in logits]
        if not self.needs_context:
            return self._check_scores(self.function(*floats, **self.settings), floats[0])
        if context is None:
            raise UserError(
                f"objective {self.name}: needs the text so far (its argument `context`), which only generation provides"
            )
        result, state = self.function(*floats, **self.settings, context=context), None
        if hasattr(self.function, INITIAL_STATE):
            if not isinstance(result, tuple) or len(result) != 2:
                raise UserError(f"objective {self.name}: declares a state, so it must return (scores, state)")
            result, state = result
            found, expected = _describe(state), _describe(context.state)
            if found != expected:
                raise UserError(
                    f"objective {self.name}: returns the state {found}, expected one like the initial, {expected}"
                )
        return self._check_scores(result, floats[0]), state

    def _check_scores(self, scores: jax.Array, logits: jax.Array) -> jax.Array:
        if isinstance(scores, tuple):
            raise UserError(f"objective {self.name}: returns a tuple; declare its state with @with_state")
        if jnp.shape(scores) != jnp.shape(logits):
            found, expected = jnp.shape(scores), jnp.shape(logits)
            raise UserError(f"objective {self.name}: returns shape {found}, expected the logits' {expected}")
        return scores.astype(jnp.float32)

    def __str__(self) -> str:
        """The text from which `objectives.get` makes an equal value."""
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(self.settings.items()))
        return f"{self.name}({settings})" if settings else self.name


def _describe(state: Any) -> str:
    """A pytree's structure, dtypes and shapes."""
    return str(jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", state)).replace("'", "")


def resolve(text: str, settings: Mapping[str, Any], known: Mapping[str, Callable]) -> Objective:
    """The objective given by "name", "name(setting=literal)" or "package.module:function(…)"."""
    name, parsed = extensions.parse(text, "objective")
    for duplicate in parsed.keys() & settings.keys():
        raise UserError(f"objective {name}: setting {duplicate} is given twice, in the text and as an argument")
    function = extensions.load(name, "objective", known=known) if ":" in name else known.get(name)
    if function is None:
        hint = f"{suggest(name, known)}; your own is written package.module:function"
        raise UserError(f"objective: unknown name {name!r}{hint}")
    return _build(name, function, {**parsed, **settings})


def _build(name: str, function: Callable[..., jax.Array], settings: Mapping[str, Any]) -> Objective:
    try:
        parameters = inspect.signature(function).parameters.values()
        hints = typing.get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise UserError(f"objective {name}: its signature cannot be read: {error}") from error
    arguments, defaults, needs_context = [], {}, False
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
            and parameter.name not in settings
        ):
            arguments.append(parameter.name)
        else:
            defaults[parameter.name] = parameter.default
    for unknown in settings.keys() - defaults.keys():
        raise UserError(f"objective {name}: no setting {unknown!r}{suggest(unknown, defaults)}")
    static: dict[str, Any] = {}
    traced: dict[str, Any] = {}
    for setting, default in sorted(defaults.items()):
        value = settings.get(setting, default)
        if value is inspect.Parameter.empty:
            raise UserError(f"objective {name}: setting {setting} has no default; write {name}({setting}=…)")
        value, is_traced = _validate(f"objective {name}: {setting}", value, default, hints.get(setting))
        (traced if is_traced else static)[setting] = value
    if hasattr(function, INITIAL_STATE) and not needs_context:
        raise UserError(f"objective {name}: declares a state, but no argument `{CONTEXT}` to receive it")
    if not arguments:
        raise UserError(f"objective {name}: takes no logits; a parameter without a default stands for a model")
    values = tuple(traced.values())
    return Objective(name, function, tuple(arguments), tuple(static.items()), tuple(traced), values, needs_context)


_EXPECTED = {bool: "True or False", str: "a text", tuple: "a tuple"}


def _validate(where: str, value: Any, default: Any, hint: Any) -> tuple[Any, bool]:
    """The setting's value in hashable form, and whether it is traced: it is if declared, or else given, as a float."""
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
        number = numbers.Integral if kind is int else numbers.Real
        expected = f"a {'whole ' if kind is int else ''}number{f' in {interval.text}' if interval else ''}"
        if isinstance(value, bool) or not isinstance(value, number) or not math.isfinite(value):
            raise UserError(f"{where}: found {value!r}, expected {expected}")
        if interval and float(value) not in interval:
            raise UserError(f"{where}: found {value!r}, expected {expected}")
        return kind(value), kind is float
    value = _as_tuple(value)
    if kind in _EXPECTED and not isinstance(value, kind):
        raise UserError(f"{where}: found {value!r}, expected {_EXPECTED[kind]}")
    for arrays in (extra for extra in extras if isinstance(extra, Arrays)):
        arrays.load(value, where)
    try:
        hash(value)
    except TypeError:
        expected = "a number, text, bool, None or a tuple of these"
        raise UserError(f"{where}: found {value!r}, expected {expected}") from None
    return value, False


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value
