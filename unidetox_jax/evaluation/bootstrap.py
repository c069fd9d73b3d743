"""Bootstrap intervals: the variation of an estimate over prompts or texts.

An estimate is Σ values / Σ weights over N prompts or texts; with strata, the unweighted mean of the strata's estimates.
Resamples depend only on seed and strata, not on the values, so intervals of changes between two models on the same
prompts are paired.

Axes: N prompts or texts, R resamples.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def resample(
    values: np.ndarray,
    resamples: int,
    seed: int,
    strata: Mapping[str, np.ndarray] | None = None,
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Estimates, and their values on resamples.

    Args:
      values: [..., N]; NaN marks missing values.
      strata: name → indices into N, resampled separately; None: one stratum.
      weights: [..., N]; None: 1 for each value.

    Returns:
      [...] and [..., R]; NaN where the weights sum to 0.
    """
    strata = strata or {"": np.arange(values.shape[-1])}
    valid = ~np.isnan(values)
    weights = valid if weights is None else np.where(valid, weights, 0)
    values = np.where(valid, values, 0.0)
    estimates, resampled = [], []
    for name, rows in strata.items():
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        counts = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples).T
        with np.errstate(divide="ignore", invalid="ignore"):
            estimates.append(values[..., rows].sum(-1) / weights[..., rows].sum(-1))
            resampled.append(values[..., rows] @ counts / (weights[..., rows] @ counts))
    return np.mean(estimates, axis=0), np.mean(resampled, axis=0)


def interval(resampled: np.ndarray) -> dict[str, float]:
    """The 95 % percentile interval of [R], {"low", "high"}. NaNs are ignored; the bounds are NaN if all values are."""
    valid = resampled[~np.isnan(resampled)]
    low, high = np.percentile(valid, (2.5, 97.5)) if valid.size else (np.nan, np.nan)
    return {"low": float(low), "high": float(high)}


def over_runs(runs: np.ndarray, resampled: np.ndarray) -> dict[str, Any]:
    """{"mean", "sd" (population), "runs", "low", "high"} of the values of several runs; resampled [R]: their mean on
    resamples, for the interval."""
    return {"mean": float(runs.mean()), "sd": float(runs.std()), "runs": runs.tolist(), **interval(resampled)}


def change(estimates: np.ndarray, resampled: np.ndarray | None = None) -> dict[str, float | None] | None:
    """{"percent", "low", "high"}: the relative change between two estimates [2], resampled together [2, R].

    None if the change is not finite (the first estimate is 0). low and high are None without resamples, or if the
    interval includes resamples without a finite change, in which a rare event did not occur.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        percent = 100 * (estimates[1] / estimates[0] - 1)
        if not np.isfinite(percent):
            return None
        bounds: dict[str, float | None] = {"low": None, "high": None}
        if resampled is not None:
            spread = 100 * (resampled[1] / resampled[0] - 1)
            bounds_or_inf = interval(np.where(np.isfinite(spread), spread, np.inf))
            if np.isfinite(list(bounds_or_inf.values())).all():
                bounds.update(bounds_or_inf)
    return {"percent": float(percent), **bounds}


def mean(values: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """{"mean", "low", "high", "texts"} of N values, NaN for texts without one; mean and bounds None if all are NaN."""
    values = np.asarray(values, np.float64)
    if np.isnan(values).all():
        return {"mean": None, "low": None, "high": None, "texts": 0}
    estimate, resampled = resample(values, resamples, seed)
    return {"mean": float(estimate), **interval(resampled), "texts": int(np.isfinite(values).sum())}


def difference(first: np.ndarray, second: np.ndarray, resamples: int, seed: int) -> dict[str, float] | None:
    """{"difference", "low", "high"} of two means, first − second, of unpaired sets of texts, which are resampled
    independently; None if a set has no values."""
    samples = [np.asarray(values, np.float64) for values in (first, second)]
    if any(np.isnan(values).all() for values in samples):
        return None
    (first_mean, first_resampled), (second_mean, second_resampled) = (
        resample(values, resamples, seed + index) for index, values in enumerate(samples)
    )
    return {"difference": float(first_mean - second_mean), **interval(first_resampled - second_resampled)}
