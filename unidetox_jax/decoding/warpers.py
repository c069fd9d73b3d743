"""Warpers: pure functions scores → scores over a whole vocabulary, which reshape the distribution of the next token.

B batch, V vocabulary. Dropped tokens are −inf. Each keeps the tokens that the class of the same name in
Hugging Face transformers keeps, ties included (top-p leaves the choice among equals to torch's unstable sort
there; here the higher ids stay, as with a stable one). The order is fixed by `in_order`, not by the caller:
temperature, top-k, top-p, min-p.

A warper is a frozen value: equal when its settings are. As an argument of a jitted function, its numbers are
traced (another temperature compiles nothing) and top-k's k is static (it is a shape). The compiled sampler
applies them to the k candidates only, see `sampling`; the forms here define what that must equal.
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


def _static(**kwargs):
    return dataclasses.field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most probable token, the lowest id among equals: what temperature 0 means."""

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
    """Drops what is below the k-th largest score; ties with it survive."""

    k: int = _static()

    def __call__(self, scores: jax.Array) -> jax.Array:
        scores = scores.astype(jnp.float32)
        floor = order_statistics.kth_largest(scores, min(self.k, scores.shape[-1]))
        return jnp.where(scores < floor, -jnp.inf, scores)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopP:
    """Drops the least probable tokens while their mass, in ascending order, is ≤ 1 − p; at least one is kept.

    `tail` is 1 − p, rounded once, from double precision: 1 − float32(p) would be another number, and
    tokens of round probabilities lie exactly on it.
    """

    p: float
    tail: float

    def __call__(self, scores: jax.Array) -> jax.Array:
        scores = scores.astype(jnp.float32)
        return jnp.where(order_statistics.outside_tail(jax.nn.softmax(scores, -1), self.tail), scores, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinP:
    """Drops tokens less probable than p times the most probable one."""

    p: float

    def __call__(self, scores: jax.Array) -> jax.Array:
        scores = scores.astype(jnp.float32)
        probabilities = jax.nn.softmax(scores, -1)
        return jnp.where(probabilities < self.p * probabilities.max(-1, keepdims=True), -jnp.inf, scores)


Warper = Greedy | Temperature | TopK | TopP | MinP
_ORDER = (Greedy, Temperature, TopK, TopP, MinP)


def temperature(t: float) -> Temperature | Greedy:
    """Divides scores by t > 0. t = 0 is the limit: greedy choice (another type, so another compilation)."""
    t = _number("temperature", t, 0.0, math.inf, "a number ≥ 0 (0 = greedy)")
    return Temperature(t) if t else Greedy()


def greedy() -> Greedy:
    """The most probable token; the same value as `temperature(0)`."""
    return Greedy()


def top_k(k: int) -> TopK:
    """Keeps the k largest scores, and what ties with the k-th. k ≥ 1 is static: another k compiles again."""
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or k < 1:
        raise UserError(f"top_k: found {k!r}, expected a whole number ≥ 1")
    return TopK(int(k))


def top_p(p: float) -> TopP:
    """Keeps the smallest set of most probable tokens of mass ≥ p, 0 ≤ p ≤ 1; at least one."""
    p = _number("top_p", p, 0.0, 1.0, "a number from 0 to 1")
    return TopP(p, 1.0 - p)


def min_p(p: float) -> MinP:
    """Keeps tokens at least p times as probable as the most probable one, 0 ≤ p ≤ 1."""
    return MinP(_number("min_p", p, 0.0, 1.0, "a number from 0 to 1"))


def _number(name: str, value: Any, low: float, high: float, expected: str) -> float:
    known = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not known or not low <= value <= high or math.isinf(value):
        raise UserError(f"{name}: found {value!r}, expected {expected}")
    return float(value)


_OFF: dict[Callable[[Any], Warper], float | None] = {temperature: None, top_k: 0, top_p: 1.0, min_p: 0.0}


def choose(**settings: float) -> tuple[Warper, ...]:
    """The warpers of a sampler's usual settings (temperature, top_k, top_p, min_p; top_k 0, top_p 1 and min_p 0 stand
    for none), in their order. Raises UserError for a value out of range."""
    chosen = {make: settings[make.__name__] for make in _OFF if make.__name__ in settings}
    return in_order([make(value) for make, value in chosen.items() if value != _OFF[make]])


def in_order(warpers: Sequence[Warper]) -> tuple[Warper, ...]:
    """The warpers in the order in which they act, whatever order they were given in.

    Raises:
      UserError: something that is no warper, or two of a kind.
    """
    for warper in warpers:
        if not isinstance(warper, _ORDER):
            raise UserError(
                f"warpers: found {warper!r}, expected temperature, top_k, top_p or min_p of decoding.warpers"
            )
    kinds = [type(warper) for warper in warpers]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise UserError(f"warpers: {kind.__name__} is given {kinds.count(kind)} times, expected once at most")
    return tuple(sorted(warpers, key=lambda warper: _ORDER.index(type(warper))))


def apply(warpers: Sequence[Warper], scores: jax.Array) -> jax.Array:
    """All warpers in their order, over the whole vocabulary: [...,V] → float32 [...,V], dropped = −inf."""
    scores = scores.astype(jnp.float32)
    for warper in in_order(warpers):
        scores = warper(scores)
    return scores
