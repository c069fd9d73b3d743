"""Statistics of texts that need no model: words, n-grams, degenerate and duplicate texts.

A word is a run of letters and digits; every other visible character is a word by itself, so a line of a hundred dashes
is a hundred equal words and counts as repetitive.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

REASONS = ("empty", "no words", "repetitive")
_WORD_OR_SYMBOL = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")
_ALPHANUMERIC = re.compile(r"[^\W_]")


def words(text: str) -> list[str]:
    """Lower-case words and symbols of a text, in order."""
    return _WORD_OR_SYMBOL.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The n-grams of a list of words, in order; none for fewer than n words."""
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def repeated_share(text: str, n: int = 4) -> float:
    """The share of a text's n-grams that repeat an earlier one; 0 for a text without n-grams."""
    grams = ngrams(words(text), n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def symbol_share(text: str) -> float:
    """The share of a text's words that are symbols, high in code and mathematics; 0 for a text without words."""
    tokens = words(text)
    return sum(not _ALPHANUMERIC.search(token) for token in tokens) / max(1, len(tokens))


def degenerate(text: str, n: int = 4, share: float = 0.5) -> str:
    """The reason, one of `REASONS`, why a text is unusable as training text; empty if it is usable.

    empty: only white space; no words: no letter or digit; repetitive: more than `share` of its n-grams repeat earlier
    ones.
    """
    if not text.strip():
        return "empty"
    if not _ALPHANUMERIC.search(text):
        return "no words"
    return "repetitive" if repeated_share(text, n) > share else ""


def degenerate_counts(texts: Iterable[str]) -> dict[str, int]:
    """Number of degenerate texts for each of `REASONS`; each text counts once."""
    counts = Counter(degenerate(text) for text in texts)
    return {reason: counts[reason] for reason in REASONS}


def normalized(text: str) -> str:
    """The text in lower case, with single spaces between words."""
    return " ".join(text.lower().split())


def duplicates(texts: Sequence[str]) -> int:
    """Number of texts that equal an earlier one up to white space and case."""
    return len(texts) - len({normalized(text) for text in texts})
