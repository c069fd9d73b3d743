"""Rotary position embedding (Su et al. 2021): what a checkpoint says of it, its tables, and the rotation.

Letters: B batch, T time, H heads, D head size.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unidetox_jax.errors import UserError

# Our fields and what transformers' modeling_rope_utils.py calls them.
NAMES = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "scale": "attention_factor",
    "fast_rotations": "beta_fast",
    "slow_rotations": "beta_slow",
    "truncate": "truncate",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
}
# Kinds, and the fields that a config says beside the base: those that it must, those that it may.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_frequency_factor", "high_frequency_factor", "original_length"), ()),
    "yarn": (("factor",), ("original_length", "scale", "fast_rotations", "slow_rotations", "truncate")),
    "longrope": (("short_factors", "long_factors"), ()),
}
# What changes those kinds further, and is not implemented.
OFF = {"yarn": ("mscale", "mscale_all_dim"), "longrope": ("factor", "attention_factor")}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The embedding's base, and how a checkpoint stretches it.

    kind: "default", "linear", "llama3", "yarn" (Peng et al. 2023), or "dynamic" and "longrope" (Ding et al. 2024),
    which are exact up to `original_length` and refused beyond.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 0
    share: float = 1.0  # of a head's dimensions, from the first, that are rotated
    scale: float = 1.0  # of what is rotated
    fast_rotations: float = 32.0  # over the original length: what turns as often is not stretched, …
    slow_rotations: float = 1.0  # … and what turns no more than this is, by the whole factor
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # of each frequency, up to the original length
    long_factors: tuple[float, ...] = ()  # and beyond

    @classmethod
    def from_hf(
        cls, parameters: Mapping[str, Any] | None, length: int, where: str, original: int = 0, partial: bool = False
    ) -> "Rotary":
        """From transformers 5's `rope_parameters`.

        Args:
          length: the config's max_position_embeddings. original: its original_max_position_embeddings, where it has
            one. partial: whether the family rotates a part of a head only, where the config says so.
        """
        parameters = dict(parameters or {})
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind not in KINDS:
            raise UserError(f"{where}: rope_type {kind!r} is not implemented (known: {', '.join(KINDS)})")
        needed, allowed = KINDS[kind]
        missing = [NAMES[field] for field in needed if parameters.get(NAMES[field]) is None]
        if missing:
            raise UserError(f"{where}: rope_type {kind!r} needs {', '.join(missing)}")
        for name in OFF.get(kind, ()):
            if parameters.get(name) is not None:
                raise UserError(f"{where}: {name} = {parameters[name]!r} of rope_type {kind!r} is not implemented")
        share = float(parameters.get("partial_rotary_factor") or 1)
        if share != 1 and not partial:
            raise UserError(f"{where}: partial_rotary_factor {share!r} is not implemented (known: 1)")
        said = {field: parameters.get(NAMES[field]) for field in (*needed, *allowed)}
        original = original or length
        known: dict[str, Any] = {"original_length": original}
        if kind == "yarn":
            known["scale"] = 0.1 * math.log(max(1.0, parameters["factor"])) + 1.0
        if kind == "longrope":
            known["scale"] = math.sqrt(1 + math.log(max(1.0, length / original)) / math.log(original))
        known |= {field: _of_type(field, value) for field, value in said.items() if value is not None}
        return cls(theta=float(parameters.get("rope_theta") or 10000.0), kind=kind, share=share, **known)

    def to_hf(self) -> dict[str, Any]:
        """`rope_theta` and `rope_scaling`: the form that transformers 4 and 5 both read."""
        if self.kind == "default":
            return {"rope_theta": self.theta, "rope_scaling": None}
        key = "type" if self.kind == "longrope" else "rope_type"  # some code reads that kind by the older name alone
        values = {NAMES[field]: getattr(self, field) for field in itertools.chain(*KINDS[self.kind])}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"rope_theta": self.theta, "rope_scaling": {key: self.kind, **values}}


def _of_type(field: str, value: Any) -> Any:
    """A value of a config as the field has it."""
    if isinstance(value, list):
        return tuple(map(float, value))
    return type(getattr(Rotary, field))(value)


def rotary_tables(rotary: Rotary, head_size: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each position's angles, with the checkpoint's scaling: float32 [B, T, half of what is rotated]."""
    angles = positions[..., None].astype(jnp.float32) * _inverse_frequencies(rotary, head_size)[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rotary.scale == 1 else (cos * rotary.scale, sin * rotary.scale)


@functools.lru_cache
def _inverse_frequencies(rotary: Rotary, head_size: int) -> np.ndarray:
    size = int(head_size * rotary.share)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = (np.float32(1.0) / np.power(np.float32(rotary.theta), exponents)).astype(np.float32)
    if rotary.kind == "linear":
        return frequencies / np.float32(rotary.factor)
    if rotary.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low = rotary.original_length / rotary.low_frequency_factor
        high = rotary.original_length / rotary.high_frequency_factor
        smooth = (rotary.original_length / wavelengths - rotary.low_frequency_factor) / (
            rotary.high_frequency_factor - rotary.low_frequency_factor
        )
        between = (1 - smooth) * frequencies / rotary.factor + smooth * frequencies
        scaled = np.where(wavelengths > low, frequencies / rotary.factor, frequencies)
        return np.where((wavelengths <= low) & (wavelengths >= high), between, scaled).astype(np.float32)
    if rotary.kind == "yarn":
        return _stretched(frequencies, rotary, size)
    if rotary.kind == "longrope":
        return frequencies / np.asarray(rotary.short_factors, np.float32)
    return frequencies  # "dynamic" equals the default up to the original length, and is refused beyond


def _stretched(frequencies: np.ndarray, rotary: Rotary, size: int) -> np.ndarray:
    """Frequencies by YaRN (Peng et al. 2023, section 3.2): what turns seldom over the original length is divided by the
    factor, what turns often is not, and between them a ramp."""

    def dimension(rotations: float) -> float:  # of which the frequency makes so many
        turns = rotary.original_length / (rotations * 2 * math.pi)
        return size * math.log(turns) / (2 * math.log(rotary.theta))

    low, high = dimension(rotary.fast_rotations), dimension(rotary.slow_rotations)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    return (frequencies / rotary.factor * ramp + frequencies * (1 - ramp)).astype(np.float32)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B,T,H,D], whose halves pair up (first half with second), by the tables' angles; of less than D where
    the tables are narrower."""
    size = 2 * tables[0].shape[-1]
    if size < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :size], tables), x[..., size:]], axis=-1)
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
