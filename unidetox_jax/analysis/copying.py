"""Copying from a corpus: shared word n-grams, the longest shared run, the most similar sentences.

Words are `text_statistics.words`, which ignore case and spacing. Some overlap is chance: compare with texts that cannot
have copied, such as samples of the base model.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from unidetox_jax import text_statistics

LONGEST_RUN = 200  # words; longer copies are reported with this length
FEWEST_WORDS = 4  # of a compared sentence; shorter ones are similar by chance
BLOCK = 1024  # sentences whose similarities to the whole corpus are in memory at a time
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n+")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


class Corpus:
    """A corpus, split into words and sentences once for all comparisons."""

    def __init__(self, texts: Sequence[str]):
        self.words = [text_statistics.words(text) for text in dict.fromkeys(texts)]
        self.sentences = _sentences(texts)
        self._ngrams: dict[int, set[tuple[str, ...]]] = {}

    def ngrams(self, n: int) -> set[tuple[str, ...]]:
        """All its n-grams, cached for each n."""
        if n not in self._ngrams:
            self._ngrams[n] = {ngram for words in self.words for ngram in text_statistics.ngrams(words, n)}
        return self._ngrams[n]


def overlap(texts: Sequence[str], corpus: Corpus, n: int) -> dict[str, Any]:
    """{"ngrams" (all n-grams of the texts), "shared" (those also in the corpus), "share", "texts_with_shared",
    "longest_run" (words of the longest run also in the corpus), "longest_run_text" (its text's index or None)}."""
    words_of = [text_statistics.words(text) for text in texts]
    known = corpus.ngrams(n)
    ngrams_of = [text_statistics.ngrams(words, n) for words in words_of]
    counts = np.array([[len(ngrams), sum(ngram in known for ngram in ngrams)] for ngrams in ngrams_of])
    total, shared = (int(value) for value in counts.sum(axis=0))
    length, index = longest_run(words_of, corpus)
    return {
        "ngrams": total,
        "shared": shared,
        "share": shared / total if total else 0.0,
        "texts_with_shared": int((counts[:, 1] > 0).sum()),
        "longest_run": length,
        "longest_run_text": index,
    }


def longest_run(words_of: Sequence[Sequence[str]], corpus: Corpus) -> tuple[int, int | None]:
    """(words of the longest run that a text shares with the corpus, up to `LONGEST_RUN`; the text's index or None).

    Increases n while any text shares an n-gram; a text that shares none shares no longer ones.
    """
    sharing, n = list(range(len(words_of))), 0
    while sharing and n < LONGEST_RUN:
        known = corpus.ngrams(n + 1)
        still = [i for i in sharing if not known.isdisjoint(text_statistics.ngrams(words_of[i], n + 1))]
        if not still:
            break
        sharing, n = still, n + 1
    return (n, sharing[0]) if n else (0, None)


def nearest(texts: Sequence[str], corpus: Corpus, count: int) -> list[dict[str, Any]]:
    """The `count` sentences of the texts that are most similar to a sentence of the corpus, most similar first.

    Similarity is the cosine of TF-IDF vectors of words and word pairs. Vocabulary and IDF are of texts and corpus
    together, so that a word that the corpus lacks lowers the similarity. Each sentence of either side occurs once.

    Returns:
      [{"text" (index), "sentence", "corpus_sentence", "similarity" in [0, 1]}, …].
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    owners_and_sentences = [(index, sentence) for index, text in enumerate(texts) for sentence in _sentences([text])]
    if not owners_and_sentences or not corpus.sentences:
        return []
    owners, sentences = zip(*owners_and_sentences, strict=True)
    vectorizer = TfidfVectorizer(analyzer=_words_and_pairs, dtype=np.float32)
    vectorizer.fit([*corpus.sentences, *sentences])
    corpus_vectors = vectorizer.transform(corpus.sentences).T.tocsc()
    best, match = np.zeros(len(sentences)), np.zeros(len(sentences), int)
    for start in range(0, len(sentences), BLOCK):
        similarity = (vectorizer.transform(sentences[start : start + BLOCK]) @ corpus_vectors).tocsr()
        best[start : start + BLOCK] = similarity.max(axis=1).toarray().ravel()
        match[start : start + BLOCK] = np.asarray(similarity.argmax(axis=1)).ravel()
    result: list[dict[str, Any]] = []
    used: set[str] = set()
    for i in np.argsort(-best, kind="stable"):
        pair = {sentences[i].lower(), f"corpus {match[i]}"}
        if best[i] <= 0 or len(result) == count:
            break
        if used.isdisjoint(pair):
            used |= pair
            similar = {"corpus_sentence": corpus.sentences[match[i]], "similarity": min(1.0, float(best[i]))}
            result.append({"text": owners[i], "sentence": sentences[i], **similar})
    return result


def _words_and_pairs(sentence: str) -> list[str]:
    words = text_statistics.words(sentence)
    return [*words, *(" ".join(pair) for pair in text_statistics.ngrams(words, 2))]


def _sentences(texts: Sequence[str]) -> list[str]:
    """Distinct sentences of at least `FEWEST_WORDS` words, not counting symbols, with single spaces."""
    sentences = (" ".join(sentence.split()) for text in texts for sentence in _SENTENCE_END.split(text))
    return [sentence for sentence in dict.fromkeys(sentences) if len(_WORD.findall(sentence)) >= FEWEST_WORDS]
