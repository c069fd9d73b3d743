"""Chooses the variant of a method: the least toxic one that leaves the language model intact.

The rule is the same for every method and uses validation prompts only: the lowest TP among variants whose perplexity
rose by at most a given fraction of the published model's; if there is none, the variant whose perplexity rose least.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

ALL = "all targets"  # the key of a choice for all targets together
VARIANT = re.compile(r"(.+?)-(\w+=.*)")


def split_form(form: str) -> tuple[str, str]:
    """Method and variant of a form's name: ("dexperts", "alpha=2.0") for "dexperts-alpha=2.0"."""
    match = VARIANT.fullmatch(form)
    return (match[1], match[2]) if match else (form, "")


@dataclasses.dataclass(frozen=True)
class VariantScores:
    """Results of a method's variant on validation prompts.

    tp: share of prompts continued toxically, in [0, 1]; perplexity: of its continuations; original: perplexity of the
    published model. NaN if not measured; such variants are chosen only if no other was measured.
    """

    method: str
    variant: str
    tp: float
    perplexity: float
    original: float

    @property
    def rise(self) -> float:
        """Relative increase of the perplexity over the published model's."""
        return self.perplexity / self.original - 1


@dataclasses.dataclass(frozen=True)
class Choice:
    """within: whether the perplexity rose by at most the allowed fraction; if not, no variant's did."""

    scores: VariantScores
    within: bool


def choose(variants: Iterable[VariantScores], most: float) -> dict[str, Choice]:
    """Method → the chosen variant, of equal ones the first. most: the allowed relative increase of perplexity."""
    methods: dict[str, list[VariantScores]] = {}
    for variant in variants:
        methods.setdefault(variant.method, []).append(variant)
    chosen = {}
    for method, candidates in methods.items():
        allowed = [each for each in candidates if each.perplexity <= (1 + most) * each.original]
        if allowed:
            chosen[method] = Choice(min(allowed, key=lambda each: (_nan_last(each.tp), each.rise)), True)
        else:
            least = min(candidates, key=lambda each: (_nan_last(each.rise), _nan_last(each.tp)))
            chosen[method] = Choice(least, False)
    return chosen


def pooled(by_target: Mapping[str, Sequence[VariantScores]]) -> list[VariantScores]:
    """Each variant over all targets: mean TP and mean relative perplexity. Variants that were not measured on all
    targets of their method are left out."""
    groups: dict[tuple[str, str], list[VariantScores]] = {}
    for each in (each for variants in by_target.values() for each in variants):
        groups.setdefault((each.method, each.variant), []).append(each)
    targets: dict[str, int] = {}
    for (method, _), group in groups.items():
        targets[method] = max(targets.get(method, 0), len(group))
    return [
        VariantScores(method, variant, _mean(each.tp for each in group), _mean(each.rise + 1 for each in group), 1.0)
        for (method, variant), group in groups.items()
        if len(group) == targets[method]
    ]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _nan_last(value: float) -> float:
    """A sort key that puts NaN last."""
    return math.inf if math.isnan(value) else value
