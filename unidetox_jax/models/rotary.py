"""Rotary position embedding (Su et al. 2021): its settings, cos and sin tables, and the rotation.

Letters: B batch, T time, H heads, D head size.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unidetox_jax.errors import UserError

# rope_type → the options beside the base that a config must have, and those that it may have.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor"), ()),
}
# Options that modify these types further and are not implemented.
OFF = {"yarn": ("mscale", "mscale_all_dim"), "longrope": ("factor", "attention_factor")}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The base and the scaling to longer contexts; fields are called as in transformers' modeling_rope_utils.py.

    kind: "default", "linear", "llama3", "yarn" (Peng et al. 2023), or "dynamic" and "longrope" (Ding et al. 2024),
    which are exact up to `original_max_position_embeddings` and refused beyond.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    partial_rotary_factor: float = 1.0  # fraction of a head's dimensions, from the first, that is rotated
    attention_factor: float = 1.0  # cos and sin are multiplied by it
    beta_fast: float = 32.0  # yarn keeps frequencies of at least so many rotations over the original length, …
    beta_slow: float = 1.0  # … and divides those of at most so many by `factor`
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # longrope's divisor of each frequency, up to the original length
    long_factor: tuple[float, ...] = ()  # and beyond

    @classmethod
    def from_hf(cls, hf: Any, where: str, layer_type: str = "", partial: bool = False) -> "Rotary":
        """From `rope_parameters` of a transformers 5 config.

        Args:
          where: names the config in messages. layer_type: whose parameters, if layers differ.
          partial: whether the family supports partial_rotary_factor.

        Raises:
          UserError: an unknown type of scaling, or one whose options are missing or not implemented.
        """
        parameters = dict((hf.rope_parameters[layer_type] if layer_type else hf.rope_parameters) or {})
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind not in KINDS:
            raise UserError(f"{where}: rope_type {kind!r} is not implemented (known: {', '.join(KINDS)})")
        required, optional = KINDS[kind]
        missing = [name for name in required if parameters.get(name) is None]
        if missing:
            raise UserError(f"{where}: rope_type {kind!r} needs {', '.join(missing)}")
        for name in OFF.get(kind, ()):
            if parameters.get(name) is not None:
                raise UserError(f"{where}: {name} = {parameters[name]!r} of rope_type {kind!r} is not implemented")
        rotated = float(parameters.get("partial_rotary_factor") or 1)
        if rotated != 1 and not partial:
            raise UserError(f"{where}: partial_rotary_factor {rotated!r} is not implemented (known: 1)")
        length = hf.max_position_embeddings
        original = getattr(hf, "original_max_position_embeddings", None) or length
        fields: dict[str, Any] = {"original_max_position_embeddings": original, "partial_rotary_factor": rotated}
        if kind == "yarn":
            fields["attention_factor"] = 0.1 * math.log(max(1.0, parameters["factor"])) + 1.0
        if kind == "longrope":
            fields["attention_factor"] = math.sqrt(1 + math.log(max(1.0, length / original)) / math.log(original))
        options = {name: parameters.get(name) for name in (*required, *optional)}
        fields |= {name: _of_type(name, value) for name, value in options.items() if value is not None}
        return cls(theta=float(parameters.get("rope_theta") or 10000.0), kind=kind, **fields)

    def to_hf(self) -> dict[str, Any]:
        """`rope_theta` and `rope_scaling`: the form that transformers 4 and 5 both read."""
        if self.kind == "default":
            return {"rope_theta": self.theta, "rope_scaling": None}
        key = "type" if self.kind == "longrope" else "rope_type"  # some code knows longrope by the older key only
        values = {name: getattr(self, name) for name in itertools.chain(*KINDS[self.kind])}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"rope_theta": self.theta, "rope_scaling": {key: self.kind, **values}}


def _of_type(field: str, value: Any) -> Any:
    """A config's value, converted to the field's type."""
    if isinstance(value, list):
        return tuple(map(float, value))
    return type(getattr(Rotary, field))(value)


def rotary_tables(rotary: Rotary, head_size: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each position's angles, scaled: float32 [B, T, half of the rotated dimensions]."""
    angles = positions[..., None].astype(jnp.float32) * _inverse_frequencies(rotary, head_size)[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    scale = rotary.attention_factor
    return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


@functools.lru_cache
def _inverse_frequencies(rotary: Rotary, head_size: int) -> np.ndarray:
    size = int(head_size * rotary.partial_rotary_factor)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = (np.float32(1.0) / np.power(np.float32(rotary.theta), exponents)).astype(np.float32)
    if rotary.kind == "linear":
        return frequencies / np.float32(rotary.factor)
    if rotary.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        length, low, high = rotary.original_max_position_embeddings, rotary.low_freq_factor, rotary.high_freq_factor
        smooth = (length / wavelengths - low) / (high - low)
        between = (1 - smooth) * frequencies / rotary.factor + smooth * frequencies
        scaled = np.where(wavelengths > length / low, frequencies / rotary.factor, frequencies)
        medium = (wavelengths <= length / low) & (wavelengths >= length / high)
        return np.where(medium, between, scaled).astype(np.float32)
    if rotary.kind == "yarn":
        return _yarn(frequencies, rotary, size)
    if rotary.kind == "longrope":
        return frequencies / np.asarray(rotary.short_factor, np.float32)
    return frequencies  # "dynamic" equals the default up to the original length and is refused beyond


def _yarn(frequencies: np.ndarray, rotary: Rotary, size: int) -> np.ndarray:
    """YaRN (Peng et al. 2023, section 3.2): low frequencies are divided by the factor, high ones kept, with a linear
    ramp between them."""

    def dimension(rotations: float) -> float:  # whose frequency makes so many rotations over the original length
        wavelength = rotary.original_max_position_embeddings / (rotations * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(rotary.theta))

    low, high = dimension(rotary.beta_fast), dimension(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    return (frequencies / rotary.factor * ramp + frequencies * (1 - ramp)).astype(np.float32)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B,T,H,D] by the tables' angles, pairing the first half of the rotated dimensions with the second.

    Tables narrower than D/2 rotate the first dimensions only.
    """
    size = 2 * tables[0].shape[-1]
    if size < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :size], tables), x[..., size:]], axis=-1)
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
