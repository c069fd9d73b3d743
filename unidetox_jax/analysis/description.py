"""Basic statistics of a set of texts: lengths, repetition, degenerate texts.

Words are `text_statistics.words`, where each symbol counts by itself, so that a line of dashes is repetitive.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unidetox_jax import text_statistics


def describe(texts: Sequence[str]) -> dict[str, Any]:
    """{"texts", "words": {"total", "distinct", "mean", "median", "low", "high" (5 and 95 %)}, "duplicates",
    "degenerate": {reason: texts}, "degenerate_share", "repeated_share" (mean share of a text's 4-grams that repeat an
    earlier one)}. `texts` must not be empty."""
    words_of = [text_statistics.words(text) for text in texts]
    lengths = np.array([len(words) for words in words_of])
    low, median, high = np.percentile(lengths, (5, 50, 95))
    degenerate = text_statistics.degenerate_counts(texts)
    return {
        "texts": len(texts),
        "words": {
            "total": int(lengths.sum()),
            "distinct": len(set().union(*words_of)),
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
    """The distinct words of texts, without symbols."""
    return {word for text in texts for word in text_statistics.words(text) if any(map(str.isalnum, word))}


def jaccard(one: set[str], other: set[str]) -> float:
    """|A ∩ B| / |A ∪ B|; 0 if both are empty."""
    return len(one & other) / max(1, len(one | other))
