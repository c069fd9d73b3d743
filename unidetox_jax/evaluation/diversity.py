"""Diversity of continuations: distinct n-grams of a prompt's samples divided by their words (Li et al., 2016).

Counted as in the paper's released code: words are separated by single spaces, an empty text is one (empty) word, and
the number of words is the denominator for every n.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.metrics import Cell, Metric, Quantity, Result, Subject

ORDERS = (1, 2, 3)


class Diversity(Metric):
    """Dist-1, 2, 3 of the continuations."""

    def compute(self, subject: Subject) -> Result:
        runs = [run.texts for run in subject.runs]
        if subject.settings.reproduce_release:  # the released code counts the prompts as well
            prompts = subject.prompts.texts
            runs = [[[p + text for text in texts] for p, texts in zip(prompts, run, strict=True)] for run in runs]
        ratios = np.stack([per_prompt(run) for run in runs])  # [R, P, 3]
        by_order = {f"dist{order}": ratios[:, :, column] for column, order in enumerate(ORDERS)}
        return Result(
            {name: subject.estimate(values) for name, values in by_order.items()},
            {name: values.mean(axis=0) for name, values in by_order.items()},
        )

    def cells(self, summary: Mapping[str, Any]) -> dict[Quantity, Cell]:
        explanation = "Dist-n: share of distinct n-grams among a prompt's continuations."
        return {
            Quantity(name, f"Dist-{name[4:]}", False, primary=False, explanation=explanation, per_prompt=name): Cell.of(
                estimate
            )
            for name, estimate in summary.items()
        }


def distinct(texts_by_prompt: Sequence[Sequence[str]]) -> dict[str, float]:
    """Dist-n: the mean over prompts of (distinct n-grams / words) of the prompt's texts.

    Returns:
      {"dist1", "dist2", "dist3", "prompts", "texts"}.

    Raises:
      UserError: no prompts, or a prompt without texts.
    """
    ratios = per_prompt(texts_by_prompt)
    means = {f"dist{order}": float(ratios[:, column].mean()) for column, order in enumerate(ORDERS)}
    return {**means, "prompts": len(texts_by_prompt), "texts": sum(map(len, texts_by_prompt))}


def per_prompt(texts_by_prompt: Sequence[Sequence[str]]) -> np.ndarray:
    """Dist-1, 2, 3 of each prompt's texts: float64 [P, 3]. Raises UserError like `distinct`."""
    if not texts_by_prompt:
        raise UserError("diversity: no prompts")
    ratios = np.empty((len(texts_by_prompt), len(ORDERS)))
    for row, texts in enumerate(texts_by_prompt):
        if not texts:
            raise UserError(f"diversity: prompt {row} has no texts")
        split = [text.split(" ") for text in texts]
        total = sum(map(len, split))
        for column, order in enumerate(ORDERS):
            grams = {gram for words in split for gram in zip(*(words[i:] for i in range(order)), strict=False)}
            ratios[row, column] = len(grams) / total
    return ratios
