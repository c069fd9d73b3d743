"""How varied continuations are: distinct n-grams of a prompt's samples over their words (Li et al., 2016).

As the released code counts: words are what lies between single spaces, an empty text is one (empty) word, and the
number of words is the denominator for every n.
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
        prompts, released = subject.prompts.texts, subject.settings.reproduce_release
        ratios = np.stack([per_prompt(_counted(prompts, run.texts, released)) for run in subject.runs])  # [R, P, 3]
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


def _counted(prompts: Sequence[str], texts: Sequence[Sequence[str]], released: bool) -> Sequence[Sequence[str]]:
    """The texts; as the released code counts, with their prompts before them."""
    if not released:
        return texts
    return [[prompt + text for text in own] for prompt, own in zip(prompts, texts, strict=True)]


def distinct(texts_by_prompt: Sequence[Sequence[str]]) -> dict[str, float]:
    """Dist-n: the mean over prompts of distinct n-grams over words of the prompt's texts.

    Returns:
      {"dist1", "dist2", "dist3", "prompts", "texts"}.

    Raises:
      UserError: no prompt, or a prompt without a text.
    """
    ratios = per_prompt(texts_by_prompt)
    means = {f"dist{order}": float(ratios[:, column].mean()) for column, order in enumerate(ORDERS)}
    return {**means, "prompts": len(texts_by_prompt), "texts": sum(map(len, texts_by_prompt))}


def per_prompt(texts_by_prompt: Sequence[Sequence[str]]) -> np.ndarray:
    """Dist-1, 2, 3 of each prompt's texts: float64 [P, 3]. Raises UserError as `distinct` does."""
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
