"""The bootstrap: how far an estimate would move with other prompts, or other texts.

An estimate is Σ values / Σ weights over N prompts or texts; with strata, the unweighted mean of theirs. A seed draws
the same resamples of the same strata whatever the values are, so the interval of a change between two models that
were asked the same is a paired one.

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
    """Estimates and their values on resamples.

    Args:
      values: [..., N]; NaN where there is none.
      strata: name → indices into N, each resampled by itself; None: all together.
      weights: [..., N]; None: 1 where there is a value.

    Returns:
      [...] and [..., R]; NaN where nothing has weight.
    """
    strata = strata or {"": np.arange(values.shape[-1])}
    there = ~np.isnan(values)
    weights = there if weights is None else np.where(there, weights, 0)
    values = np.where(there, values, 0.0)
    estimates, resampled = [], []
    for name, rows in strata.items():
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        counts = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples).T
        with np.errstate(divide="ignore", invalid="ignore"):
            estimates.append(values[..., rows].sum(-1) / weights[..., rows].sum(-1))
            resampled.append(values[..., rows] @ counts / (weights[..., rows] @ counts))
    return np.mean(estimates, axis=0), np.mean(resampled, axis=0)


def interval(resampled: np.ndarray) -> dict[str, float]:
    """The 95 % percentile interval of [R], {"low", "high"}; NaN is passed over, and is the answer where all are."""
    there = resampled[~np.isnan(resampled)]
    low, high = np.percentile(there, (2.5, 97.5)) if there.size else (np.nan, np.nan)
    return {"low": float(low), "high": float(high)}


def over_runs(runs: np.ndarray, resampled: np.ndarray) -> dict[str, Any]:
    """{"mean", "sd" (population), "runs", "low", "high"}: the values of several runs, and the interval of their mean
    from its values on resamples [R]."""
    return {"mean": float(runs.mean()), "sd": float(runs.std()), "runs": runs.tolist(), **interval(resampled)}


def change(estimates: np.ndarray, resampled: np.ndarray | None = None) -> dict[str, float | None] | None:
    """{"percent", "low", "high"} from the first to the second of two estimates [2], resampled together [2, R].

    None where there is no finite change (the first is 0). low and high are None without resamples, and where the
    interval reaches some that have no finite change either: what is rare is absent from them.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        percent = 100 * (estimates[1] / estimates[0] - 1)
        if not np.isfinite(percent):
            return None
        bounds: dict[str, float | None] = {"low": None, "high": None}
        if resampled is not None:
            spread = 100 * (resampled[1] / resampled[0] - 1)
            wide = interval(np.where(np.isfinite(spread), spread, np.inf))
            if np.isfinite(list(wide.values())).all():
                bounds.update(wide)
    return {"percent": float(percent), **bounds}


def mean(values: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """{"mean", "low", "high", "texts"} of N values, NaN where a text has none; None where no text has one."""
    values = np.asarray(values, np.float64)
    if np.isnan(values).all():
        return {"mean": None, "low": None, "high": None, "texts": 0}
    estimate, resampled = resample(values, resamples, seed)
    return {"mean": float(estimate), **interval(resampled), "texts": int(np.isfinite(values).sum())}


def difference(one: np.ndarray, other: np.ndarray, resamples: int, seed: int) -> dict[str, float] | None:
    """{"difference", "low", "high"} of two means, one − other, of sets of text that are not paired and so resampled
    apart; None where a set has no value."""
    sides = [np.asarray(side, np.float64) for side in (one, other)]
    if any(np.isnan(side).all() for side in sides):
        return None
    (mean_one, spread_one), (mean_other, spread_other) = (
        resample(side, resamples, seed + at) for at, side in enumerate(sides)
    )
    return {"difference": float(mean_one - mean_other), **interval(spread_one - spread_other)}
