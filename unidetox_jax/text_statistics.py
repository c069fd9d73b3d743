"""What can be said of a text without any model: its words, its n-grams, whether it is degenerate.

Pure functions of strings, below every other room, so that distillation can count what analysis will report.
A word here is a run of letters and digits, and every other visible character counts by itself: a line of a
hundred dashes is a hundred equal words, and so looks as repetitive as it is.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

REASONS = ("empty", "no words", "repetitive")
_UNIT = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")
_WORD = re.compile(r"[^\W_]")


def words(text: str) -> list[str]:
    """Lower-case words and single symbols of a text, in order."""
    return _UNIT.findall(text.lower())


def ngrams(units: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The n-grams of a list of words, in order; fewer than n words give none."""
    return list(zip(*(units[start:] for start in range(n)), strict=False))


def repeated_share(text: str, n: int = 4) -> float:
    """The share of a text's n-grams that already occurred in it; 0 where none does, or no n-gram fits."""
    found = ngrams(words(text), n)
    return 1.0 - len(set(found)) / len(found) if found else 0.0


def degenerate(text: str, n: int = 4, share: float = 0.5) -> str:
    """Why a text is no use as training text, one of `REASONS`; an empty string when it is fine.

    empty: nothing but white space; no words: no letter and no digit; repetitive: more than `share` of its
    n-grams occurred in it before.
    """
    if not text.strip():
        return "empty"
    if not _WORD.search(text):
        return "no words"
    return "repetitive" if repeated_share(text, n) > share else ""


def degenerate_counts(texts: Iterable[str]) -> dict[str, int]:
    """How many texts are degenerate, for each of `REASONS` (each text counts once)."""
    found = Counter(degenerate(text) for text in texts)
    return {reason: found[reason] for reason in REASONS}


def plain(text: str) -> str:
    """The text without what white space and case add."""
    return " ".join(text.lower().split())


def duplicates(texts: Sequence[str]) -> int:
    """How many texts repeat an earlier one, but for white space and case."""
    return len(texts) - len({plain(text) for text in texts})
