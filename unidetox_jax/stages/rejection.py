"""What distillation leaves out where it is asked to: texts that a scorer calls toxic, degenerate ones, copies."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from unidetox_jax import data, distributed, extensions, text_statistics
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import scorers
from unidetox_jax.evaluation.scorers import Scorer
from unidetox_jax.stages.settings import RejectSettings, Run

FIELD = "config.distill.reject"


class Rejection:
    """Texts, in their order → why each is left out, or an empty string; it counts what it said.

    Every process gives it the same texts and gets the same answer: process 0 judges. made: texts so far; counts: reason
    → how many, each text under the first of its reasons.
    """

    def __init__(self, settings: RejectSettings, judges: Mapping[str, Scorer], toxic: Sequence[str]):
        self._settings, self._judges, self._seen = settings, judges, set[str]()
        self._copied = {gram for text in toxic for gram in self._grams(text)}
        self.made, self.counts = 0, Counter[str]()

    def __call__(self, texts: Sequence[str]) -> list[str]:
        own = self._reasons(texts) if distributed.is_main_process() else []
        reasons = json.loads(distributed.broadcast(json.dumps(own)))
        self.made += len(texts)
        self.counts.update(filter(None, reasons))
        return reasons

    def _reasons(self, texts: Sequence[str]) -> list[str]:
        reasons = [self._without_scorer(text) for text in texts]
        for name, judge in self._judges.items():
            whys = np.where(judge(texts) > self._settings.above, f"toxic by {name}", "").tolist()
            reasons = [earlier or why for earlier, why in zip(reasons, whys, strict=True)]
        return reasons

    def _without_scorer(self, text: str) -> str:
        if self._settings.degenerate and (why := text_statistics.degenerate(text)):
            return why
        if not self._settings.copied_words:
            return ""
        plain = text_statistics.normalized(text)
        again = plain in self._seen
        self._seen.add(plain)
        return "copied" if again or not self._copied.isdisjoint(self._grams(text)) else ""

    def _grams(self, text: str) -> list[tuple[str, ...]]:
        return text_statistics.ngrams(text_statistics.words(text), self._settings.copied_words)


def make(run: Run) -> Rejection | None:
    """As the configuration asks; None where it asks for nothing. Raises UserError where a scorer cannot be had."""
    settings = run.distill.reject
    judges: dict[str, scorers.Scorer] = {}
    toxic: Sequence[str] = ()
    if not is_asked(settings):
        return None
    if distributed.is_main_process():
        judges = {name: scorers.get(run.path(spec)) for name, spec in named(settings).items()}
        toxic = data.texts(run.path(run.toxify.data), data_dir=run.shared.data_dir) if settings.copied_words else ()
    return Rejection(settings, judges, toxic)


def is_asked(settings: RejectSettings) -> bool:
    """Whether anything is to be left out."""
    return bool(settings.scorers or settings.degenerate or settings.copied_words)


def named(settings: RejectSettings) -> dict[str, str]:
    """Name → scorer."""
    return extensions.parse_named(settings.scorers, f"{FIELD}.scorers", "SCORER")


def check(settings: RejectSettings) -> None:
    """Raises UserError for settings that are wrong."""
    named(settings)
    for name, right, expected in (
        ("above", 0 <= settings.above <= 1, "a number in [0, 1]"),
        ("copied_words", settings.copied_words >= 0, "at least 0"),
        ("most", settings.most >= 1, "at least 1"),
    ):
        if not right:
            raise UserError(f"{FIELD}.{name}: found {getattr(settings, name)}, expected {expected}")


def describe(figures: Mapping) -> str:
    """What was left out, in words."""
    listed = ", ".join(f"{count} {reason}" for reason, count in figures["rejected"].items())
    return f"of {figures['made']:,} texts {sum(figures['rejected'].values()):,} were rejected: {listed or 'none'}"
