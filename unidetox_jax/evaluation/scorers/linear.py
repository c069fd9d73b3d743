"""A linear text classifier: logistic regression on TF-IDF of words and characters.

It serves as an offline toxicity scorer and as the classifier of political leaning. It is fitted by scikit-learn but
stored as plain data (`linear.json`, and `linear.npz` read with allow_pickle=False), so loading cannot execute code.

Importing scikit-learn takes a second, and `unidetox run` imports every stage: all modules import it where it is used.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse
from etils import epath

from unidetox_jax import storage
from unidetox_jax.errors import UserError

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

ARGUMENT = "DIRECTORY"
FORMAT = 1
SETTINGS, ARRAYS = "linear.json", "linear.npz"
# Character n-grams stay within words, to be robust to spelling.
ANALYSES = {
    "words": {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"},
    "characters": {"analyzer": "char_wb", "ngram_range": (2, 5)},
}


@dataclasses.dataclass(frozen=True, eq=False)
class LinearClassifier:
    """A fitted classifier.

    weights: [features, columns], bias: [columns], with one column for two labels, else one per label.
    labels: names in the order of the probabilities; of two, the second is the one of `toxicity`.
    vocabularies: analysis → its terms, in the order of the features. idf: [features].
    """

    labels: tuple[str, ...]
    vocabularies: dict[str, list[str]]
    idf: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def features(self, texts: Sequence[str]) -> scipy.sparse.csr_matrix:
        """TF-IDF rows [N, features], each analysis of unit length."""
        blocks = []
        for name, (counter, weights) in self._analyses.items():
            counts = _counts_by_word(counter, texts) if name == "characters" else counter.transform(texts)
            blocks.append(weights.transform(counts))
        return scipy.sparse.hstack(blocks, format="csr")

    @functools.cached_property
    def _analyses(self) -> dict[str, tuple["CountVectorizer", "TfidfTransformer"]]:
        """For each analysis, the counter of its terms and their weights."""
        from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

        analyses, start = {}, 0
        for name, terms in self.vocabularies.items():
            counter = CountVectorizer(vocabulary={term: index for index, term in enumerate(terms)}, **ANALYSES[name])
            weights = TfidfTransformer(sublinear_tf=True)
            weights.idf_ = self.idf[start : start + len(terms)]
            analyses[name] = counter, weights
            start += len(terms)
        return analyses

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities of the labels, float64 [N, labels]; rows sum to 1."""
        logits = self.features(texts) @ self.weights + self.bias
        if logits.shape[1] == 1:
            logits = np.hstack([np.zeros_like(logits), logits])
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    def toxicity(self, texts: Sequence[str]) -> np.ndarray:
        """The second label's probability, float64 [N]."""
        if len(self.labels) != 2:
            raise UserError(f"a linear scorer with the labels {', '.join(self.labels)}: toxicity needs exactly two")
        return self.probabilities(texts)[:, 1]


def fit(
    texts: Sequence[str],
    labels: Sequence[str],
    order: Sequence[str] = (),
    analyses: Sequence[str] = ("words", "characters"),
    strength: float = 4.0,
    min_texts: int = 3,
    max_features: int = 100_000,
    balanced: bool = False,
) -> LinearClassifier:
    """Fits a classifier.

    Args:
      texts, labels: N texts and the names of their labels.
      order: the order of the labels; empty: sorted.
      strength: inverse of the L2 penalty (scikit-learn's C).
      min_texts: the least number of texts in which a term must occur.
      max_features: at most this many terms per analysis, the most frequent ones.
      balanced: give all labels the same weight, however rare.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    order = tuple(order) or tuple(sorted(set(labels)))
    if len(set(labels)) < 2 or set(labels) != set(order):
        raise UserError(f"labels found: {sorted(set(labels))}; expected at least two, and those of {list(order)}")
    vocabularies, idf, blocks = {}, [], []
    for name in analyses:
        vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=min_texts, max_features=max_features, **ANALYSES[name])
        try:
            blocks.append(vectorizer.fit_transform(texts))
        except ValueError as error:  # no term is frequent enough
            raise UserError(f"{len(texts)} texts are too few or too short for a classifier: {error}") from None
        vocabularies[name] = [str(term) for term in vectorizer.get_feature_names_out()]
        idf.append(vectorizer.idf_)
    model = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced" if balanced else None)
    model.fit(scipy.sparse.hstack(blocks, format="csr"), [order.index(label) for label in labels])
    return LinearClassifier(order, vocabularies, np.concatenate(idf), model.coef_.T.copy(), model.intercept_)


def _counts_by_word(counter: "CountVectorizer", texts: Sequence[str]) -> scipy.sparse.csr_matrix:
    """Counts of terms [N, terms] for an analysis within words: each distinct word is analysed only once."""
    words = [text.lower().split() for text in texts]
    ids: dict[str, int] = {}
    columns = [ids.setdefault(word, len(ids)) for text in words for word in text]
    rows = np.repeat(np.arange(len(words)), [len(text) for text in words])
    if not ids:
        return scipy.sparse.csr_matrix((len(words), len(counter.vocabulary)), dtype=np.int64)
    occurrences = scipy.sparse.csr_matrix((np.ones(len(rows), np.int64), (rows, columns)), (len(words), len(ids)))
    return occurrences @ counter.transform(list(ids))


def save(directory: epath.PathLike, classifier: LinearClassifier, figures: dict) -> None:
    """Writes `linear.npz` and `linear.json`, with `figures` (held-out AUC, counts) in the latter."""
    directory = epath.Path(directory)
    arrays = {"idf": classifier.idf, "weights": classifier.weights, "bias": classifier.bias}
    storage.write_arrays(directory / ARRAYS, {name: value.astype(np.float64) for name, value in arrays.items()})
    content = {
        "format": FORMAT,
        "labels": list(classifier.labels),
        "figures": figures,
        "vocabularies": classifier.vocabularies,
    }
    storage.write_text(directory / SETTINGS, json.dumps(content, ensure_ascii=False))


def make(directory: str):
    """`texts → P(toxic)` of a classifier that was fitted to tell toxic texts."""
    return load(directory).toxicity


def files(directory: str) -> list[epath.Path]:
    return sorted(epath.Path(directory).glob("linear.*"))


def load(directory: epath.PathLike) -> LinearClassifier:
    """Reads a classifier written by `save`.

    Raises:
      UserError: a missing file, another format, or arrays that do not match the vocabulary.
    """
    directory = epath.Path(directory)
    path = directory / SETTINGS
    if not path.exists():
        nested = directory / "scorer"
        hint = f"; did you mean {nested}?" if (nested / SETTINGS).exists() else ""
        raise UserError(f"{path}: no such file; expected a directory that `unidetox fit-scorer` made{hint}")
    try:
        content = json.loads(path.read_text())
        if content.get("format") != FORMAT:
            raise UserError(f"{path}: format {content.get('format')!r}, expected {FORMAT}")
        idf, weights, bias = storage.read_arrays(directory / ARRAYS, ("idf", "weights", "bias")).values()
        labels, vocabularies = tuple(content["labels"]), content["vocabularies"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: not a linear classifier ({error})") from None
    features, columns = sum(map(len, vocabularies.values())), 1 if len(labels) == 2 else len(labels)
    if not set(vocabularies) <= set(ANALYSES) or idf.shape != (features,) or weights.shape != (features, columns):
        raise UserError(f"{directory}: {features} terms and {len(labels)} labels, but weights of shape {weights.shape}")
    return LinearClassifier(labels, vocabularies, idf, weights, bias)
