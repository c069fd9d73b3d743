"""How varied continuations are: distinct n-grams of a prompt's samples over the number of their words.

The surprising thing: the denominator is the number of words for every n, and an empty text counts as one
(empty) word, because words are what lies between single spaces (REFERENCE section 3, as the released code
counts).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.toxicity import figure

ORDERS = (1, 2, 3)


def distinct(texts_by_prompt: Sequence[Sequence[str]]) -> dict[str, float]:
    """Dist-n (Li et al. 2016): the mean over prompts of distinct n-grams over words of the prompt's texts.

    Args:
      texts_by_prompt: for each prompt its texts: continuations, or (the released code) prompt and
      continuation.

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


def summarize_runs(ratios: np.ndarray, resamples: int = 1000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`per_prompt` of every run together: [R, P, 3] → {"dist1", "dist2", "dist3"}, each {"mean", "sd", "runs", "low",
    "high"}: mean and population standard deviation over runs, and the 95 % bootstrap interval over prompts."""
    prompts = ratios.shape[1]
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    resampled = counts @ ratios.mean(axis=0) / prompts  # [N, 3]
    return {
        f"dist{order}": figure(ratios[:, :, column].mean(axis=1), resampled[:, column])
        for column, order in enumerate(ORDERS)
    }
