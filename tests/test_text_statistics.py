"""Words, n-grams and degenerate texts, against cases worked out by hand."""

import csv

import pytest

from unidetox_jax import text_statistics


def test_words_keeps_contractions_and_counts_symbols_one_by_one():
    assert text_statistics.words("Don't stop -- IT'S a_b 42!") == (
        ["don't", "stop", "-", "-", "it's", "a", "_", "b", "42", "!"]
    )
    assert text_statistics.words("naïve Straße 東京") == ["naïve", "straße", "東京"]


def test_ngrams():
    assert text_statistics.ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert text_statistics.ngrams(["a"], 2) == []


def test_repeated_share_is_one_minus_distinct_over_all():
    assert text_statistics.repeated_share("one two three four five", 2) == 0.0
    assert text_statistics.repeated_share("a b a b a b", 2) == pytest.approx(1 - 2 / 5)
    assert text_statistics.repeated_share("a b", 4) == 0.0


def test_symbol_share():
    assert text_statistics.symbol_share("x = f(42) # why?") == 5 / 9
    assert text_statistics.symbol_share("") == 0.0 and text_statistics.symbol_share("Don't, she said") == 1 / 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("... !!! ___ —", "no words"),
        ("no no no no no no no no no", "repetitive"),
        ("He said " + "-" * 60, "repetitive"),
        ("the cat sat on the mat. " * 5, "repetitive"),
        ("A plain sentence about a plain thing, said once.", ""),
        ("Yes.", ""),
        ("42", ""),
    ],
)
def test_degenerate(text, reason):
    assert text_statistics.degenerate(text) == reason


def test_counts_and_duplicates():
    texts = ["", "fine here", "Fine  here\n", "?!", "go " * 30]
    assert text_statistics.degenerate_counts(texts) == {"empty": 1, "no words": 1, "repetitive": 1}
    assert text_statistics.duplicates(texts) == 1


def test_one_of_the_released_texts_is_degenerate(shared):
    with open(next((shared / "data/distilled").glob("*.csv")), newline="") as file:
        texts = [row["Text"] for row in csv.DictReader(file)]
    assert len(texts) == 640
    assert text_statistics.degenerate_counts(texts) == {"empty": 0, "no words": 0, "repetitive": 1}
