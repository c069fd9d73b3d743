"""How far toxicity scorers agree on single texts: Cohen's kappa of what each calls toxic (Cohen, 1960), and Spearman's
rank correlation of their scores. Two that were fitted on different data and agree little measure different things."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.stats
from sklearn.metrics import cohen_kappa_score


def of(scores: Mapping[str, np.ndarray], threshold: float) -> list[dict[str, Any]]:
    """Every two scorers' agreement.

    Args:
      scores: scorer's name → scores of the same texts, of any shape, NaN for a text that it refused.
      threshold: toxic is what scores above it.

    Returns:
      [{"scorers": [one, other], "kappa", "rank_correlation", "toxic": share of texts by each, "texts"}, …]; None for
      what does not exist: a kappa where both, a correlation where one of them says the same of all texts.
    """
    found = []
    for (one, left), (other, right) in itertools.combinations(scores.items(), 2):
        both = np.isfinite(left) & np.isfinite(right)
        sides = [left[both], right[both]]
        calls = [side > threshold for side in sides]
        varied = all(side.size and np.ptp(side) for side in sides)
        differ = any(np.unique(call).size > 1 for call in calls)
        varied = all(np.unique(side).size > 1 for side in sides)
        found.append(
            {
                "scorers": [one, other],
                "kappa": float(cohen_kappa_score(*calls)) if differ else None,
                "rank_correlation": float(scipy.stats.spearmanr(*sides).statistic) if varied else None,
                "toxic": [float(call.mean()) if call.size else None for call in calls],
                "texts": int(both.sum()),
            }
        )
    return found
