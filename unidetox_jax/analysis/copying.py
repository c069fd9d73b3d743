"""Is anything of a corpus copied in a text? Shared word n-grams, the longest shared run, the nearest sentences.

Words are `text_statistics.words`, so case and spacing hide nothing. What chance alone gives is not nothing: compare
with a set of texts that cannot have copied, such as samples of the base model.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from unidetox_jax import text_statistics

LONGEST_RUN = 200  # words: a longer copy is reported as one of this length
FEWEST_WORDS = 4  # of a sentence that is compared: shorter ones are alike by chance
BLOCK = 1024  # sentences whose similarities to the whole corpus are held at once
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n+")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


class Corpus:
    """A corpus, cut into words and sentences once, for all the sets that are compared with it."""

    def __init__(self, texts: Sequence[str]):
        self.words = [text_statistics.words(text) for text in dict.fromkeys(texts)]
        self.sentences = _sentences(texts)
        self._grams: dict[int, set[tuple[str, ...]]] = {}

    def grams(self, n: int) -> set[tuple[str, ...]]:
        """All its n-grams; those of the last n are kept."""
        if n not in self._grams:
            self._grams[n] = {gram for words in self.words for gram in text_statistics.ngrams(words, n)}
        return self._grams[n]


def overlap(texts: Sequence[str], corpus: Corpus, n: int) -> dict[str, Any]:
    """{"ngrams" (all n-grams of the texts), "shared" (those that the corpus has), "share", "texts_with_shared",
    "longest_run" (words in a row that stand in the corpus as well), "longest_run_text" (its index, None: none)}."""
    split = [text_statistics.words(text) for text in texts]
    known = corpus.grams(n)
    grams_of = [text_statistics.ngrams(words, n) for words in split]
    counts = np.array([[len(grams), sum(gram in known for gram in grams)] for grams in grams_of])
    total, shared = (int(value) for value in counts.sum(axis=0))
    longest, owner = longest_run(split, corpus)
    return {
        "ngrams": total,
        "shared": shared,
        "share": shared / total if total else 0.0,
        "texts_with_shared": int((counts[:, 1] > 0).sum()),
        "longest_run": longest,
        "longest_run_text": owner,
    }


def longest_run(split: Sequence[Sequence[str]], corpus: Corpus) -> tuple[int, int | None]:
    """The longest run of words that a text shares with the corpus, up to `LONGEST_RUN`, and the text's index.

    Grows n by one while any text shares an n-gram: a text without one has no longer ones either.
    """
    alive, n = list(range(len(split))), 0
    while alive and n < LONGEST_RUN:
        known = corpus.grams(n + 1)
        following = [at for at in alive if any(gram in known for gram in text_statistics.ngrams(split[at], n + 1))]
        if not following:
            break
        alive, n = following, n + 1
    return (n, alive[0]) if n else (0, None)


def nearest(texts: Sequence[str], corpus: Corpus, count: int) -> list[dict[str, Any]]:
    """The `count` sentences of the texts that are most like a sentence of the corpus, most alike first.

    Likeness is the cosine of TF-IDF vectors of words and word pairs. Vocabulary and IDF are those of both sides
    together: a word that the corpus lacks has to count against likeness. Each sentence of either side occurs once.

    Returns:
      [{"text" (index), "sentence", "corpus_sentence", "similarity" in [0, 1]}, …].
    """
    pairs = [(at, sentence) for at, text in enumerate(texts) for sentence in _sentences([text])]
    owners, sentences = [at for at, _ in pairs], [sentence for _, sentence in pairs]
    if not sentences or not corpus.sentences:
        return []
    vectorizer = TfidfVectorizer(analyzer=_words_and_pairs, dtype=np.float32)
    vectorizer.fit([*corpus.sentences, *sentences])
    known = vectorizer.transform(corpus.sentences).T.tocsc()
    best, match = np.zeros(len(sentences)), np.zeros(len(sentences), int)
    for start in range(0, len(sentences), BLOCK):
        similar = (vectorizer.transform(sentences[start : start + BLOCK]) @ known).tocsr()
        best[start : start + BLOCK] = similar.max(axis=1).toarray().ravel()
        match[start : start + BLOCK] = np.asarray(similar.argmax(axis=1)).ravel()
    result: list[dict[str, Any]] = []
    used: set[str] = set()
    for at in np.argsort(-best, kind="stable"):
        pair = {sentences[at].lower(), f"corpus {match[at]}"}
        if best[at] <= 0 or len(result) == count:
            break
        if used.isdisjoint(pair):
            used |= pair
            likeness = {"corpus_sentence": corpus.sentences[match[at]], "similarity": min(1.0, float(best[at]))}
            result.append({"text": owners[at], "sentence": sentences[at], **likeness})
    return result


def _words_and_pairs(sentence: str) -> list[str]:
    words = text_statistics.words(sentence)
    return [*words, *(" ".join(pair) for pair in text_statistics.ngrams(words, 2))]


def _sentences(texts: Sequence[str]) -> list[str]:
    """Distinct sentences of at least `FEWEST_WORDS` words, symbols not counted, white space made plain."""
    pieces = (" ".join(piece.split()) for text in texts for piece in _SENTENCE_END.split(text))
    return [piece for piece in dict.fromkeys(pieces) if len(_WORD.findall(piece)) >= FEWEST_WORDS]
