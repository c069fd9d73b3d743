"""Toxicity scorers: texts → float64 [N] in [0, 1].

A scorer is a module of this package, imported on first use, with

    ARGUMENT         the form of what follows the colon in its name; None: nothing does
    make(argument)   the scorer
    files(argument)  what it is made of, for `content_hash`

Every scorer's output is checked here: one number per text, between 0 and 1;
anything else, including NaN, is an error.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
from etils import epath

from unidetox_jax import extensions
from unidetox_jax.errors import UserError, suggest

KINDS = ("lexicon", "linear", "classifier")

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
    if kind not in KINDS and all(name.isidentifier() for name in [*kind.split("."), argument]):
        return _checked(extensions.load(spec, "scorer", known=KINDS), spec)
    if kind not in KINDS:
        raise UserError(f"scorer {spec!r}: no such kind{suggest(kind, KINDS)}")
    module = _module(kind)
    if module.ARGUMENT and not argument:
        raise UserError(f"scorer {spec!r}: nothing after the colon; expected {kind}:{module.ARGUMENT}")
    if module.ARGUMENT is None and argument:
        raise UserError(f"scorer {spec!r}: {kind} takes no argument, found {argument!r}")
    return _checked(module.make(argument), spec)


def _module(kind: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{kind}")


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


def content_hash(spec: str) -> str:
    """A short hash of a scorer's files (names and content, not location), or of a function's module. Raises UserError
    as `get`."""
    kind, _, argument = spec.partition(":")
    if kind in KINDS:
        paths = _module(kind).files(argument)
    else:
        function = extensions.load(spec, "scorer", known=KINDS)
        paths = [epath.Path(inspect.getsourcefile(inspect.unwrap(function)) or "")]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]
