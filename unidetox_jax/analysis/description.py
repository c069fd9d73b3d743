"""The outside of a set of texts: how long they are, how often they repeat, how many are no use.

Words are `text_statistics.words`: a symbol counts by itself, so that a line of dashes shows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unidetox_jax import text_statistics


def describe(texts: Sequence[str]) -> dict[str, Any]:
    """{"texts", "words": {"total", "distinct", "mean", "median", "low", "high" (5 and 95 %)}, "duplicates",
    "degenerate": reason → texts, "degenerate_share", "repeated_share" (mean share of a text's 4-grams that it said
    before)}. `texts` must not be empty."""
    split = [text_statistics.words(text) for text in texts]
    lengths = np.array([len(words) for words in split])
    low, median, high = np.percentile(lengths, (5, 50, 95))
    degenerate = text_statistics.degenerate_counts(texts)
    return {
        "texts": len(texts),
        "words": {
            "total": int(lengths.sum()),
            "distinct": len(set().union(*split)),
            "mean": float(lengths.mean()),
            "median": float(median),
            "low": float(low),
            "high": float(high),
        },
        "duplicates": text_statistics.duplicates(texts),
        "degenerate": degenerate,
        "degenerate_share": sum(degenerate.values()) / len(texts),
        "repeated_share": float(np.mean([text_statistics.repeated_share(text) for text in texts])),
    }


def vocabulary(texts: Sequence[str]) -> set[str]:
    """The different words of texts, without single symbols."""
    return {word for text in texts for word in text_statistics.words(text) if any(map(str.isalnum, word))}


def jaccard(one: set[str], other: set[str]) -> float:
    """|A ∩ B| / |A ∪ B|, which words two sets of texts share; 0 where both are empty."""
    return len(one & other) / max(1, len(one | other))
