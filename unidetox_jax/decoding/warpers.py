"""Warpers: pure functions scores → scores over a whole vocabulary that reshape the next token's distribution.

B batch, V vocabulary. Dropped tokens get −inf. Each warper keeps the same tokens as its namesake in Hugging Face
transformers, ties included (in top-p, transformers leaves the choice among ties to torch's unstable sort; here the
higher ids stay, as in a stable sort). `in_order` fixes their order: temperature, top-k, top-p, min-p.

A warper is a frozen value, equal if its settings are. In a jitted function its numbers are traced (another temperature
does not recompile), but top-k's k is static, as it is a shape. The compiled sampler applies warpers to the k candidates
only (`sampling`); the functions here define the results that it must reproduce.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from unidetox_jax.decoding import order_statistics
from unidetox_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """Keeps only the most probable token, of ties the lowest id: the limit of temperature 0."""

    def __call__(self, scores: jax.Array) -> jax.Array:
        best = jnp.argmax(scores, -1, keepdims=True)
        return jnp.where(jnp.arange(scores.shape[-1]) == best, scores, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Temperature:
    """scores / t."""

    t: float

    def __call__(self, scores: jax.Array) -> jax.Array:
        return scores.astype(jnp.float32) / self.t


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """Drops tokens below the k-th largest score; ties with it survive."""

    k: int = dataclasses.field(metadata={"static": True})

    def __call__(self, scores: jax.Array) -> jax.Array:
        scores = scores.astype(jnp.float32)
        floor = order_statistics.kth_largest(scores, min(self.k, scores.shape[-1]))
        return jnp.where(scores < floor, -jnp.inf, scores)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopP:
    """Drops the least probable tokens while their cumulative mass is ≤ 1 − p; keeps at least one.

    `tail` is 1 − p, rounded once from double precision: 1 − float32(p) differs, and tokens of round probabilities lie
    exactly on the boundary.
    """

    p: float
    tail: float

    def __call__(self, scores: jax.Array) -> jax.Array:
        scores = scores.astype(jnp.float32)
        return jnp.where(order_statistics.outside_tail(jax.nn.softmax(scores, -1), self.tail), scores, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinP:
    """Drops tokens less probable than p times the maximum."""

    p: float

    def __call__(self, scores: jax.Array) -> jax.Array:
        scores = scores.astype(jnp.float32)
        probabilities = jax.nn.softmax(scores, -1)
        return jnp.where(probabilities < self.p * probabilities.max(-1, keepdims=True), -jnp.inf, scores)


Warper = Greedy | Temperature | TopK | TopP | MinP
_ORDER = (Greedy, Temperature, TopK, TopP, MinP)


def temperature(t: float) -> Temperature | Greedy:
    """Divides scores by t > 0. t = 0 is the greedy limit, a value of another type that compiles another program."""
    t = _number("temperature", t, 0.0, math.inf, "a number ≥ 0 (0 = greedy)")
    return Temperature(t) if t else Greedy()


def greedy() -> Greedy:
    """Always takes the most probable token; equal to `temperature(0)`."""
    return Greedy()


def top_k(k: int) -> TopK:
    """Keeps the k largest scores and ties with the k-th. k ≥ 1 is static: another k recompiles."""
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or k < 1:
        raise UserError(f"top_k: found {k!r}, expected a whole number ≥ 1")
    return TopK(int(k))


def top_p(p: float) -> TopP:
    """Keeps the smallest set of most probable tokens with mass ≥ p, 0 ≤ p ≤ 1, and at least one token."""
    p = _number("top_p", p, 0.0, 1.0, "a number from 0 to 1")
    return TopP(p, 1.0 - p)


def min_p(p: float) -> MinP:
    """Keeps tokens at least p times as probable as the most probable one, 0 ≤ p ≤ 1."""
    return MinP(_number("min_p", p, 0.0, 1.0, "a number from 0 to 1"))


def _number(name: str, value: Any, low: float, high: float, expected: str) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or math.isinf(value):
        raise UserError(f"{name}: found {value!r}, expected {expected}")
    return float(value)


# Warper → the setting that disables it
_OFF: dict[Callable[[Any], Warper], float | None] = {temperature: None, top_k: 0, top_p: 1.0, min_p: 0.0}


def choose(**settings: float) -> tuple[Warper, ...]:
    """The ordered warpers for a sampler's usual settings: temperature, top_k (0: off), top_p (1: off), min_p (0: off).
    Raises UserError for a value out of range."""
    chosen = {make: settings[make.__name__] for make in _OFF if make.__name__ in settings}
    return in_order([make(value) for make, value in chosen.items() if value != _OFF[make]])


def in_order(warpers: Sequence[Warper]) -> tuple[Warper, ...]:
    """The warpers in the order in which they are applied. Raises UserError: not a warper, or two of one kind."""
    for warper in warpers:
        if not isinstance(warper, _ORDER):
            raise UserError(
                f"warpers: found {warper!r}, expected temperature, top_k, top_p or min_p of decoding.warpers"
            )
    kinds = [type(warper) for warper in warpers]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise UserError(f"warpers: {kind.__name__} is given {kinds.count(kind)} times, expected at most once")
    return tuple(sorted(warpers, key=lambda warper: _ORDER.index(type(warper))))


def apply(warpers: Sequence[Warper], scores: jax.Array) -> jax.Array:
    """Applies all warpers in order over the whole vocabulary: [...,V] → float32 [...,V], −inf for dropped tokens."""
    scores = scores.astype(jnp.float32)
    for warper in in_order(warpers):
        scores = warper(scores)
    return scores
