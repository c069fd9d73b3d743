"""Toxicity scorers: texts → float64 [N] in [0, 1].

A scorer's module is imported on first use. Every scorer's output is checked here: one number per text, between 0 and 1;
anything else, including NaN, is an error.
"""

import hashlib
import inspect
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from unidetox_jax import extensions
from unidetox_jax.errors import UserError, suggest

Scorer = Callable[[Sequence[str]], np.ndarray]


def get(spec: str) -> Scorer:
    """A scorer by name.

    Args:
      spec: `lexicon` (of the built-in world), `linear:DIRECTORY` (from `unidetox fit-scorer`),
        `classifier:PATH_OR_HUB_ID[#LABEL]` (BERT, RoBERTa, XLM-R or DistilBERT: a Hugging Face directory or id, or a
        Detoxify `.ckpt`), or `package.module:function` (yours: list of texts → [N] in [0, 1]).

    Raises:
      UserError: no such scorer, path or label.
    """
    kind, _, argument = spec.partition(":")
    if kind not in _KINDS and all(name.isidentifier() for name in [*kind.split("."), argument]):
        return _checked(extensions.load(spec, "scorer", known=_KINDS), spec)
    if kind not in _KINDS:
        raise UserError(f"scorer {spec!r}: no such kind{suggest(kind, _KINDS)}")
    make, expected = _KINDS[kind]
    if expected and not argument:
        raise UserError(f"scorer {spec!r}: nothing after the colon; expected {kind}:{expected}")
    if expected is None and argument:
        raise UserError(f"scorer {spec!r}: {kind} takes no argument, found {argument!r}")
    return _checked(make(argument), spec)


def _checked(scorer: Scorer, spec: str) -> Scorer:
    def score(texts: Sequence[str]) -> np.ndarray:
        if isinstance(texts, str):
            raise TypeError("a scorer takes a list of texts, not one text")
        texts = list(texts)
        if not texts:
            return np.zeros(0)
        scores = np.asarray(scorer(texts), np.float64)
        if scores.shape != (len(texts),):
            raise UserError(f"scorer {spec!r}: gave an array of shape {scores.shape} for {len(texts)} texts")
        invalid = ~((scores >= 0) & (scores <= 1))  # true for NaN as well
        if invalid.any():
            index = int(np.argmax(invalid))
            raise UserError(
                f"scorer {spec!r}: gave {scores[index]} for text {index}; {int(invalid.sum())} of {len(texts)} texts "
                "have no number in [0, 1]"
            )
        return scores

    return score


def _lexicon(argument: str) -> Scorer:
    from unidetox_jax.data import toyworld

    return toyworld.score


def _linear(directory: str) -> Scorer:
    from unidetox_jax.evaluation.scorers import linear

    return linear.load(directory).toxicity


def _classifier(source: str) -> Scorer:
    from unidetox_jax.evaluation.scorers import classifier

    path, _, label = source.partition("#")
    return classifier.scorer(path, label)


def content_hash(spec: str) -> str:
    """A short hash of a scorer's files (names and content, not location), or of a function's module. Raises UserError
    as `get`."""
    kind, _, argument = spec.partition(":")
    if kind == "lexicon":
        from unidetox_jax.data import toyworld

        paths = [epath.Path(toyworld.__file__)]
    elif kind == "linear":
        paths = sorted(epath.Path(argument).glob("linear.*"))
    elif kind == "classifier":
        from unidetox_jax.evaluation.scorers import classifier

        paths = classifier.files(argument.partition("#")[0])
    else:
        function = extensions.load(spec, "scorer", known=_KINDS)
        paths = [epath.Path(inspect.getsourcefile(inspect.unwrap(function)) or "")]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


# kind → (factory, form of its argument after the colon; None: no argument)
_KINDS: dict[str, tuple[Callable[[str], Scorer], str | None]] = {
    "lexicon": (_lexicon, None),
    "linear": (_linear, "DIRECTORY"),
    "classifier": (_classifier, "PATH_OR_HUB_ID[#LABEL]"),
}
