"""TF-IDF keywords: what a set of texts is about, and what distinguishes it from the others.

Vocabulary and IDF are common to all sets, so weights are comparable. A word's weight in a set is its mean over the
texts; the most "distinctive" words are those whose weight exceeds the highest one in any other set by most.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WORD = r"(?u)\b[^\W\d_][\w'’-]*[^\W\d_]\b"  # at least two letters; no numbers
MAX_WORDS = 50_000  # the most frequent words of all sets together


def keywords(sets: Mapping[str, Sequence[str]], count: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The top `count` words of every set.

    Returns:
      {set: {"frequent": [entry, …], "distinctive": [entry, …] (empty for a single set)}}; an entry is {"word", "weight"
      (mean TF-IDF over the set's texts), "texts" (share of them with the word)}.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        token_pattern=WORD, stop_words="english", sublinear_tf=True, max_features=MAX_WORDS, dtype=np.float64
    )
    try:
        matrix = vectorizer.fit_transform([text for texts in sets.values() for text in texts])
    except ValueError:  # nothing but stop words
        return {name: {"frequent": [], "distinctive": []} for name in sets}
    words = vectorizer.get_feature_names_out()
    bounds = np.cumsum([0, *map(len, sets.values())])
    rows = [matrix[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    means = np.stack([np.asarray(block.mean(axis=0)).ravel() for block in rows])  # [sets, words]
    shares = np.stack([np.asarray((block > 0).mean(axis=0)).ravel() for block in rows])

    def entries(index: int, scores: np.ndarray) -> list[dict[str, Any]]:
        top = [i for i in np.argsort(-scores, kind="stable")[:count] if scores[i] > 0]
        return [
            {"word": str(words[i]), "weight": float(means[index, i]), "texts": float(shares[index, i])} for i in top
        ]

    result = {}
    for index, name in enumerate(sets):
        others = np.delete(means, index, axis=0)
        distinctive = entries(index, means[index] - others.max(axis=0)) if len(others) else []
        result[name] = {"frequent": entries(index, means[index]), "distinctive": distinctive}
    return result
