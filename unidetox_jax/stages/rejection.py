"""Rejection of distilled texts: those that a scorer calls toxic, degenerate ones, and copies."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from unidetox_jax import data, distributed, extensions, text_statistics
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import scorers
from unidetox_jax.evaluation.scorers import Scorer
from unidetox_jax.stages.settings import RejectSettings, Run

SECTION = "config.distill.reject"


class Rejection:
    """Maps texts, in order, to the reason why each is rejected, or an empty string.

    Process 0 decides; every process passes the same texts and gets the same answer.

    Attributes:
      made: how many texts it has seen.
      counts: reason → texts; a text counts under its first reason only.
    """

    def __init__(self, settings: RejectSettings, judges: Mapping[str, Scorer], toxic_texts: Sequence[str]):
        self._settings, self._judges, self._seen = settings, judges, set[str]()
        self._toxic_ngrams = {ngram for text in toxic_texts for ngram in self._ngrams(text)}
        self.made, self.counts = 0, Counter[str]()

    def __call__(self, texts: Sequence[str]) -> list[str]:
        local = self._reasons(texts) if distributed.is_main_process() else []
        reasons = json.loads(distributed.broadcast(json.dumps(local)))
        self.made += len(texts)
        self.counts.update(filter(None, reasons))
        return reasons

    def _reasons(self, texts: Sequence[str]) -> list[str]:
        reasons = [self._reason_without_scorers(text) for text in texts]
        for name, judge in self._judges.items():
            toxic = judge(texts) > self._settings.above
            reasons = [
                reason or (f"toxic by {name}" if above else "") for reason, above in zip(reasons, toxic, strict=True)
            ]
        return reasons

    def _reason_without_scorers(self, text: str) -> str:
        if self._settings.degenerate and (reason := text_statistics.degenerate(text)):
            return reason
        if not self._settings.copied_words:
            return ""
        plain = text_statistics.normalized(text)
        duplicate = plain in self._seen
        self._seen.add(plain)
        return "copied" if duplicate or not self._toxic_ngrams.isdisjoint(self._ngrams(text)) else ""

    def _ngrams(self, text: str) -> list[tuple[str, ...]]:
        return text_statistics.ngrams(text_statistics.words(text), self._settings.copied_words)


def make(run: Run) -> Rejection | None:
    """The configured rejection; None if there is none. Raises UserError for a scorer that cannot be loaded."""
    settings = run.distill.reject
    if not is_enabled(settings):
        return None
    judges: dict[str, Scorer] = {}
    toxic_texts: Sequence[str] = ()
    if distributed.is_main_process():
        judges = {name: scorers.get(run.path(spec)) for name, spec in scorer_specs(settings).items()}
        if settings.copied_words:
            toxic_texts = data.texts(run.path(run.toxify.data), data_dir=run.shared.data_dir)
    return Rejection(settings, judges, toxic_texts)


def is_enabled(settings: RejectSettings) -> bool:
    """Whether anything is to be rejected."""
    return bool(settings.scorers or settings.degenerate or settings.copied_words)


def scorer_specs(settings: RejectSettings) -> dict[str, str]:
    """{name: scorer}."""
    return extensions.parse_named(settings.scorers, f"{SECTION}.scorers", "SCORER")


def check(settings: RejectSettings) -> None:
    """Raises UserError for settings out of range."""
    scorer_specs(settings)
    for name, valid, expected in (
        ("above", 0 <= settings.above <= 1, "a number in [0, 1]"),
        ("copied_words", settings.copied_words >= 0, "at least 0"),
        ("most", settings.most >= 1, "at least 1"),
    ):
        if not valid:
            raise UserError(f"{SECTION}.{name}: found {getattr(settings, name)}, expected {expected}")


def describe(figures: Mapping) -> str:
    """The rejected texts in a line."""
    listed = ", ".join(f"{count} {reason}" for reason, count in figures["rejected"].items())
    return f"of {figures['made']:,} texts {sum(figures['rejected'].values()):,} were rejected: {listed or 'none'}"
