"""TF-IDF keywords: what a set of texts is about, and what sets it apart from the others.

One vocabulary and one IDF serve all sets, so that weights compare. A set's weight of a word is the mean over its
texts; "distinctive" words are those whose mean exceeds the highest mean of any other set by most.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

WORD = r"(?u)\b[^\W\d_][\w'’-]*[^\W\d_]\b"  # at least two letters; numbers are no keywords
MAX_WORDS = 50_000  # the most frequent words of all sets together


def keywords(sets: Mapping[str, Sequence[str]], count: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The `count` weightiest words of every set.

    Returns:
      set → {"frequent": [entry, …], "distinctive": [entry, …] (none where there is one set only)}, an entry being
      {"word", "weight" (mean TF-IDF over the set's texts), "texts" (share of them with the word)}. A set without a
      word has no entries.
    """
    vectorizer = TfidfVectorizer(
        token_pattern=WORD, stop_words="english", sublinear_tf=True, max_features=MAX_WORDS, dtype=np.float64
    )
    try:
        matrix = vectorizer.fit_transform([text for texts in sets.values() for text in texts])
    except ValueError:  # scikit-learn's word for: nothing but stop words
        return {name: {"frequent": [], "distinctive": []} for name in sets}
    words = vectorizer.get_feature_names_out()
    bounds = np.cumsum([0, *map(len, sets.values())])
    rows = [matrix[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    means = np.stack([np.asarray(block.mean(axis=0)).ravel() for block in rows])  # [sets, words]
    shares = np.stack([np.asarray((block > 0).mean(axis=0)).ravel() for block in rows])

    def entries(at: int, ranking: np.ndarray) -> list[dict[str, Any]]:
        chosen = [i for i in np.argsort(-ranking, kind="stable")[:count] if ranking[i] > 0]
        return [{"word": str(words[i]), "weight": float(means[at, i]), "texts": float(shares[at, i])} for i in chosen]

    result = {}
    for at, name in enumerate(sets):
        others = np.delete(means, at, axis=0)
        distinctive = entries(at, means[at] - others.max(axis=0)) if len(others) else []
        result[name] = {"frequent": entries(at, means[at]), "distinctive": distinctive}
    return result
