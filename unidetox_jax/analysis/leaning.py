"""Political leaning of texts, by classifiers fitted on labelled news.

A news classifier learns its publishers' house style sooner than their politics. So articles are split by publisher
into folds, a classifier is fitted on all folds but one, and its accuracy is that on the publishers it never saw. No
classifier is fitted on all articles: a text's probabilities are the mean over those whose accuracy was measured.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import bootstrap
from unidetox_jax.evaluation.scorers import linear

FOLDS = 3
ORDER = ("left", "center", "right")  # of the labels, where the data has these
SETTINGS: dict[str, Any] = {"analyses": ("words",), "strength": 1.0, "max_features": 30_000, "balanced": True}
ALIASES = {"ap fact check": "associated press"}  # one publisher under two names in Baly et al. (2020)


@dataclasses.dataclass(frozen=True, eq=False)
class Leaning:
    """What scores texts: labels in the order of the columns, texts → probabilities [N, labels], its quality (`fit`)."""

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
      texts, labels, sources: N articles, the leaning and the source of each.
      words: accuracy is also measured on the articles' first so many words, the length of the texts to be scored;
        0: not.

    Returns:
      quality: {"accuracy" (of all articles, each by the classifier that never saw its publisher), "by_label" (recall),
      "majority" (share of the commonest label: what guessing it gives), "balanced_accuracy" (mean recall; guessing
      gives 1/labels), "accuracy_short", "balanced_accuracy_short", "words" (for these two), "articles", "publishers",
      "folds": [{"articles", "publishers", "accuracy"}, …], "of_nothing": label → probability of a text without a
      known word, from which every text's leaning is to be seen}.

    Raises:
      UserError: a label that fewer than two publishers have, so that it cannot be both learnt and tested.
    """
    said, groups = np.array(labels), np.array([publisher(source) for source in sources])
    names = tuple(sorted(set(said.tolist()), key=lambda name: (ORDER.index(name) if name in ORDER else 99, name)))
    if len(names) < 2:
        raise UserError(f"leaning: the articles have the label {', '.join(names)} only, expected at least two labels")
    for name in names:
        known = sorted(set(groups[said == name].tolist()))
        if len(known) < 2:
            raise UserError(f"leaning: all articles labelled {name!r} are by {known[0]!r}; expected several publishers")
    folds = min(FOLDS, *(len(set(groups[said == name].tolist())) for name in names))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    short = [" ".join(text.split()[:words]) for text in texts] if words else []
    called, called_short, classifiers, tested = np.empty_like(said), np.empty_like(said), [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a label of few articles: checked above, by publisher
        splits = list(splitter.split(texts, said, groups))
    for train, test in splits:
        if set(said[train].tolist()) != set(names):
            raise UserError("leaning: a label's publishers all fell into one fold; another config.analyze.seed may do")
        classifier = linear.fit([texts[i] for i in train], said[train].tolist(), names, **SETTINGS)
        called[test] = _called(classifier, [texts[i] for i in test])
        if words:
            called_short[test] = _called(classifier, [short[i] for i in test])
        classifiers.append(classifier)
        accuracy, publishers = float((called[test] == said[test]).mean()), sorted(set(groups[test].tolist()))
        tested.append({"articles": len(test), "publishers": publishers, "accuracy": accuracy})

    def probabilities(texts: Sequence[str]) -> np.ndarray:
        return np.mean([classifier.probabilities(texts) for classifier in classifiers], axis=0)

    quality = {
        **_accuracy(called, said, names),
        "majority": max(float((said == name).mean()) for name in names),
        "articles": len(texts),
        "publishers": len(set(groups.tolist())),
        "folds": tested,
        "of_nothing": dict(zip(names, probabilities([""])[0].tolist(), strict=True)),
    }
    if words:
        on_short = _accuracy(called_short, said, names)
        quality |= {f"{key}_short": on_short[key] for key in ("accuracy", "balanced_accuracy")} | {"words": words}
    return Leaning(names, probabilities, quality)


def from_classifier(source: str) -> Leaning:
    """A Hugging Face sequence classifier; its held-out accuracy is for its makers to tell."""
    from unidetox_jax.evaluation.scorers import classifier

    loaded = classifier.load(source)
    return Leaning(tuple(loaded.cfg.labels), loaded.probabilities, {"classifier": source})


def summarize(probabilities: np.ndarray, labels: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    """A set's leaning, from its texts' probabilities [N, labels].

    Returns:
      {"probability": label → mean with its interval, "called": label → share of texts whose likeliest label it is,
      with its interval, "balance": P(last label) − P(first label), likewise}.
    """
    called = probabilities.argmax(axis=1)
    return {
        "probability": {name: bootstrap.mean(probabilities[:, at], resamples, seed) for at, name in enumerate(labels)},
        "called": {name: bootstrap.mean(called == at, resamples, seed) for at, name in enumerate(labels)},
        "balance": bootstrap.mean(balance(probabilities), resamples, seed),
    }


def balance(probabilities: np.ndarray) -> np.ndarray:
    """P(last label) − P(first label) of each text: right − left. [N, labels] → [N], in [−1, 1]."""
    return probabilities[:, -1] - probabilities[:, 0]


def _called(classifier: linear.LinearClassifier, texts: Sequence[str]) -> np.ndarray:
    return np.array(classifier.labels)[classifier.probabilities(texts).argmax(axis=1)]


def _accuracy(called: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    recall = {name: float((called[labels == name] == name).mean()) for name in names}
    accuracy = float((called == labels).mean())
    return {"accuracy": accuracy, "by_label": recall, "balanced_accuracy": float(np.mean(list(recall.values())))}
