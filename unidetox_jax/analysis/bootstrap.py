"""How far a mean over texts would move with other texts: percentile intervals, by resampling texts.

Sets of text are not paired, so each is resampled by itself, and a difference takes independent resamples of both.

Axes: N texts, K quantities, R resamples.
"""

from typing import Any

import numpy as np

from unidetox_jax.evaluation.toxicity import interval


def resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of resampled texts: [N, K] → [R, K]. NaN marks a text without a value: it counts in no mean."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples)
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return counts @ np.where(there, values, 0.0) / (counts @ there)


def mean(values: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """{"mean", "low", "high", "texts"}: the mean of N values and its 95 % interval; None where no text has a value."""
    values = np.asarray(values, np.float64)
    there = int(np.isfinite(values).sum())
    if not there:
        return {"mean": None, "low": None, "high": None, "texts": 0}
    spread = interval(resampled_means(values[:, None], resamples, seed))
    return {"mean": float(np.nanmean(values)), **spread, "texts": there}


def difference(one: np.ndarray, other: np.ndarray, resamples: int, seed: int) -> dict[str, float] | None:
    """{"difference", "low", "high"} of two means, one − other; None where a set has no value."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if not np.isfinite(one).any() or not np.isfinite(other).any():
        return None
    spread = resampled_means(one[:, None], resamples, seed) - resampled_means(other[:, None], resamples, seed + 1)
    return {"difference": float(np.nanmean(one) - np.nanmean(other)), **interval(spread)}
