"""Which variant of a method is taken: the least toxic one among those that leave the language model one.

The rule is the same for every method, and reads validation prompts alone: the lowest TP among the variants whose
perplexity rose by at most a given part of the published model's; where none is so, the one whose perplexity rose least.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

ALL = "all targets"  # whose choice it is, where it is not one target's
VARIANT = re.compile(r"(.+?)-(\w+=.*)")


def method(form: str) -> tuple[str, str]:
    """A form's method and variant: ("dexperts", "alpha=2.0") of "dexperts-alpha=2.0"."""
    match = VARIANT.fullmatch(form)
    return (match[1], match[2]) if match else (form, "")


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a variant of a method came to on validation prompts.

    tp: the share of prompts continued toxically, in [0, 1]; perplexity: of its continuations; original: that of the
    model as published. NaN where nothing was measured, which is never chosen if anything was.
    """

    method: str
    variant: str
    tp: float
    perplexity: float
    original: float

    @property
    def rise(self) -> float:
        """Of the perplexity, as a part of the published model's."""
        return self.perplexity / self.original - 1


@dataclasses.dataclass(frozen=True)
class Choice:
    """within: whether the perplexity rose by no more than was allowed; if not, no variant's did."""

    figures: Figures
    within: bool


def choose(figures: Iterable[Figures], most: float) -> dict[str, Choice]:
    """Method → the variant that is taken; of equals the first."""
    methods: dict[str, list[Figures]] = {}
    for one in figures:
        methods.setdefault(one.method, []).append(one)
    chosen = {}
    for method, variants in methods.items():
        allowed = [one for one in variants if one.perplexity <= (1 + most) * one.original]
        if allowed:
            chosen[method] = Choice(min(allowed, key=lambda one: (_last(one.tp), one.rise)), True)
        else:
            chosen[method] = Choice(min(variants, key=lambda one: (_last(one.rise), _last(one.tp))), False)
    return chosen


def pooled(by_target: Mapping[str, Sequence[Figures]]) -> list[Figures]:
    """Each variant over all targets, for one choice for all of them: the mean TP, and the mean of the perplexities as
    parts of the published models'. A variant counts where it was measured on every target that its method has."""
    found: dict[tuple[str, str], list[Figures]] = {}
    for one in (one for rows in by_target.values() for one in rows):
        found.setdefault((one.method, one.variant), []).append(one)
    most: dict[str, int] = {}
    for (method, _), rows in found.items():
        most[method] = max(most.get(method, 0), len(rows))
    return [
        Figures(method, variant, _mean(one.tp for one in rows), _mean(one.rise + 1 for one in rows), 1.0)
        for (method, variant), rows in found.items()
        if len(rows) == most[method]
    ]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _last(value: float) -> float:
    """For an order in which NaN comes last."""
    return math.inf if math.isnan(value) else value
