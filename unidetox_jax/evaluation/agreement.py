"""Agreement of toxicity scorers on single texts: Cohen's kappa of their toxic/non-toxic decisions (Cohen, 1960) and
Spearman's rank correlation of their scores. Scorers fitted on different data that agree little measure different
things."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np


def pairwise(scores: Mapping[str, np.ndarray], threshold: float) -> list[dict[str, Any]]:
    """The agreement of every pair of scorers.

    Args:
      scores: scorer name → scores of the same texts, of any shape, NaN for texts that it refused.
      threshold: scores above it mean toxic.

    Returns:
      [{"scorers": [first, second], "kappa", "rank_correlation", "toxic": share of toxic texts by each, "texts"}, …].
      Undefined values are None: kappa if all decisions of both are the same, a correlation if one gives equal scores.
    """
    import scipy.stats
    from sklearn.metrics import cohen_kappa_score

    results = []
    for (first, first_scores), (second, second_scores) in itertools.combinations(scores.items(), 2):
        scored = np.isfinite(first_scores) & np.isfinite(second_scores)
        pair = [first_scores[scored], second_scores[scored]]
        decisions = [values > threshold for values in pair]
        has_kappa = any(np.unique(decision).size > 1 for decision in decisions)
        has_correlation = all(np.unique(values).size > 1 for values in pair)
        results.append(
            {
                "scorers": [first, second],
                "kappa": float(cohen_kappa_score(*decisions)) if has_kappa else None,
                "rank_correlation": float(scipy.stats.spearmanr(*pair).statistic) if has_correlation else None,
                "toxic": [float(decision.mean()) if decision.size else None for decision in decisions],
                "texts": int(scored.sum()),
            }
        )
    return results
