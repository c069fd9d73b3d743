"""Political leaning of texts, by classifiers fitted on labelled news.

A news classifier learns its publishers' house style sooner than their politics. So articles are split into folds by
publisher, and each classifier is tested on publishers that it never saw. A text's probabilities are the mean over these
classifiers; none is fitted on all articles, so that all have a measured accuracy.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import bootstrap
from unidetox_jax.evaluation.scorers import linear

FOLDS = 3
ORDER = ("left", "center", "right")  # of these labels; others follow
SETTINGS: dict[str, Any] = {"analyses": ("words",), "strength": 1.0, "max_features": 30_000, "balanced": True}
ALIASES = {"ap fact check": "associated press"}  # one publisher under two names in Baly et al. (2020)


@dataclasses.dataclass(frozen=True, eq=False)
class Leaning:
    """A classifier: labels, texts → probabilities [N, labels], and its quality as of `fit`."""

    labels: tuple[str, ...]
    probabilities: Callable[[Sequence[str]], np.ndarray]
    quality: Mapping[str, Any]


def publisher(source: str) -> str:
    """A source's publisher: 'The Daily (Web News)' and 'Daily - Opinion' are both 'daily'."""
    name = re.sub(r"\s*\([^)]*\)|\s+[-–]\s.*$", "", source).strip().lower()
    name = re.sub(r"^the\s+", "", name)
    return ALIASES.get(name, name)


def fit(texts: Sequence[str], labels: Sequence[str], sources: Sequence[str], words: int = 0, seed: int = 0) -> Leaning:
    """Fits a linear classifier for each fold of publishers.

    Args:
      texts, labels, sources: of N articles.
      words: also measures the accuracy on the first so many words of each article, the length of the texts to be
        scored; 0: no.

    Returns:
      quality: {"accuracy" (of all articles, each by the classifier that never saw its publisher), "by_label" (recall),
      "majority" (share of the most common label, the accuracy of guessing it), "balanced_accuracy" (mean recall;
      guessing gives 1/labels), "accuracy_short", "balanced_accuracy_short", "words" (of these two), "articles",
      "publishers", "folds": [{"articles", "publishers", "accuracy"}, …], "of_nothing": {label: probability of a text
      without a known word, the reference for all texts}}.

    Raises:
      UserError: a label of fewer than two publishers, which cannot be both learnt and tested.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    true, groups = np.array(labels), np.array([publisher(source) for source in sources])
    names = tuple(sorted(set(true.tolist()), key=lambda name: (ORDER.index(name) if name in ORDER else 99, name)))
    if len(names) < 2:
        raise UserError(f"leaning: the articles have the label {', '.join(names)} only, expected at least two labels")
    publishers_of = {name: sorted(set(groups[true == name].tolist())) for name in names}
    for name, publishers in publishers_of.items():
        if len(publishers) < 2:
            raise UserError(
                f"leaning: all articles labelled {name!r} are by {publishers[0]!r}; expected several publishers"
            )
    splitter = StratifiedGroupKFold(min(FOLDS, *map(len, publishers_of.values())), shuffle=True, random_state=seed)
    short_texts = [" ".join(text.split()[:words]) for text in texts] if words else []
    predicted, predicted_short, classifiers, folds = np.empty_like(true), np.empty_like(true), [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about labels of few articles, checked above by publisher
        splits = list(splitter.split(texts, true, groups))
    for train, test in splits:
        if set(true[train].tolist()) != set(names):
            raise UserError("leaning: all publishers of a label are in one fold; try another config.analyze.seed")
        classifier = linear.fit([texts[i] for i in train], true[train].tolist(), names, **SETTINGS)
        predicted[test] = _predict(classifier, [texts[i] for i in test])
        if words:
            predicted_short[test] = _predict(classifier, [short_texts[i] for i in test])
        classifiers.append(classifier)
        accuracy, publishers = float((predicted[test] == true[test]).mean()), sorted(set(groups[test].tolist()))
        folds.append({"articles": len(test), "publishers": publishers, "accuracy": accuracy})

    def probabilities(texts: Sequence[str]) -> np.ndarray:
        return np.mean([classifier.probabilities(texts) for classifier in classifiers], axis=0)

    quality = {
        **_accuracy(predicted, true, names),
        "majority": max(float((true == name).mean()) for name in names),
        "articles": len(texts),
        "publishers": len(set(groups.tolist())),
        "folds": folds,
        "of_nothing": dict(zip(names, probabilities([""])[0].tolist(), strict=True)),
    }
    if words:
        on_short = _accuracy(predicted_short, true, names)
        quality |= {f"{key}_short": on_short[key] for key in ("accuracy", "balanced_accuracy")} | {"words": words}
    return Leaning(names, probabilities, quality)


def from_classifier(source: str) -> Leaning:
    """A Hugging Face sequence classifier, whose accuracy is not measured."""
    from unidetox_jax.evaluation.scorers import classifier

    loaded = classifier.load(source)
    return Leaning(tuple(loaded.cfg.labels), loaded.probabilities, {"classifier": source})


def summarize(probabilities: np.ndarray, labels: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    """The leaning of a set of texts, from their probabilities [N, labels].

    Returns:
      {"probability": {label: estimate of the mean}, "called": {label: estimate of the share of texts with this label as
      the most likely one}, "balance": estimate of P(last label) − P(first label)}.
    """
    predicted = probabilities.argmax(axis=1)
    return {
        "probability": {name: bootstrap.mean(probabilities[:, i], resamples, seed) for i, name in enumerate(labels)},
        "called": {name: bootstrap.mean(predicted == i, resamples, seed) for i, name in enumerate(labels)},
        "balance": bootstrap.mean(balance(probabilities), resamples, seed),
    }


def balance(probabilities: np.ndarray) -> np.ndarray:
    """P(last label) − P(first label), right − left, of each text: [N, labels] → [N], in [−1, 1]."""
    return probabilities[:, -1] - probabilities[:, 0]


def _predict(classifier: linear.LinearClassifier, texts: Sequence[str]) -> np.ndarray:
    return np.array(classifier.labels)[classifier.probabilities(texts).argmax(axis=1)]


def _accuracy(predicted: np.ndarray, true: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    recall = {name: float((predicted[true == name] == name).mean()) for name in names}
    accuracy = float((predicted == true).mean())
    return {"accuracy": accuracy, "by_label": recall, "balanced_accuracy": float(np.mean(list(recall.values())))}
