"""Text to tokens, once: every text of a data set one after another in a single int32 array.

What stands around a text is what its tokenizer puts there: LLaMA's `<s>` and OPT's `</s>` in front, nothing in front
for GPT-2 and Falcon (as in the released code; `add_bos=True` asks for it). One end token follows a text that ended by
itself, and none follows a text that was cut, or the model would learn to stop in the middle.

A sampled text keeps the tokens that it was sampled as, for every model whose tokenizer reads them as that text.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from unidetox_jax.data.texts import Texts
from unidetox_jax.errors import UserError

BATCH = 1024  # texts a call of the tokenizer: enough to fill its threads, little enough for memory


class Around(NamedTuple):
    """What stands around each text to train on.

    before: tokens; after: of a text that ended by itself. given: tokens at the beginning that are no targets.
    """

    before: list[int]
    after: list[int]
    given: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised texts; `tokens[i]` is the i-th that was kept.

    Attributes:
      ids: int32 [total], all texts end to end.
      offsets: int64 [N + 1], where each begins.
      rows: int32 [N], each kept text's index in the list that was tokenised.
      pad_id: what fills rows.
      max_length: tokens a text may have.
      truncated: texts cut at max_length.
      skipped: texts left out because they are empty.
      given: tokens at the beginning of each that are no targets.
      reproduce_release: padding is trained on, to the longest text of all, as in the released code.
    """

    ids: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    pad_id: int
    max_length: int
    truncated: int = 0
    skipped: int = 0
    given: int = 1
    reproduce_release: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each text."""
        return np.diff(self.offsets)

    def report(self) -> str:
        """One line: how many texts and tokens, what was cut, what was left out."""
        lengths = self.lengths
        line = (
            f"{len(self):,} texts, {len(self.ids):,} tokens (mean {lengths.mean():.1f}, longest {lengths.max()}, "
            f"limit {self.max_length})"
        )
        line += f"; {self.truncated:,} cut at the limit" if self.truncated else ""
        return line + (f"; {self.skipped:,} empty ones left out" if self.skipped else "")


def tokenize(
    texts: Sequence[str],
    tokenizer,
    max_length: int,
    *,
    context: int | None = None,
    vocab_size: int | None = None,
    add_bos: bool | None = None,
    around: Around | None = None,
    reproduce_release: bool = False,
) -> Tokens:
    """Tokenises texts for training; what is cut or left out is counted and logged.

    Args:
      texts: strings. Of `Texts` it is known which were cut (no end token follows those) and what was sampled.
      tokenizer: one of `checkpoint.load_tokenizer`'s.
      max_length: most tokens of a text, special ones included; longer texts are cut.
      context: the model's context length, to check max_length against; None checks nothing.
      vocab_size: tokens in the model's embedding: one beyond it is an error, or, if it is the pad token, not used.
      add_bos: None leaves the beginning to the tokenizer; True or False decides.
      around: what stands around each text, an assistant's turn say; None: what its tokenizer puts there, and the end.
      reproduce_release: the released code's form: no end token, padding trained on, every text tokenised anew.

    Raises:
      UserError: max_length below 2 or beyond the context, no text left, a token that the tokenizer does not have or
        the model does not.
    """
    if max_length < 2:
        raise UserError(f"max_length: found {max_length}, expected at least 2: a text needs a token and its next one")
    if context is not None and max_length > context:
        raise UserError(f"max_length: found {max_length}, beyond the model's context of {context} tokens")
    if not len(texts):
        raise UserError("no text to tokenise: the data set is empty")
    if around is None:
        suffix = [] if reproduce_release else [_special(tokenizer, "eos_token_id")]
        around = Around(prefix(tokenizer, add_bos), suffix)
    if max_length <= len(around.before):
        raise UserError(f"max_length: found {max_length}, but {len(around.before)} tokens stand before each text")
    pad_id, size = tokenizer.pad_token_id, math.inf if vocab_size is None else vocab_size
    pad_id = pad_id if pad_id is not None and pad_id < size else _special(tokenizer, "eos_token_id")
    rows = texts.rows if isinstance(texts, Texts) else [{"text": text} for text in texts]
    pieces, indices, truncated = [], [], 0
    for index, (row, own) in enumerate(zip(rows, _own_tokens(tokenizer, rows, anew=reproduce_release), strict=True)):
        if not own or not row["text"].strip():
            continue
        whole = around.before + own + (around.after if row.get("ended", True) else [])
        truncated += len(whole) > max_length
        pieces.append(np.asarray(whole[:max_length], np.int32))
        indices.append(index)
    if not pieces:
        raise UserError(f"no text is left to train on: all {len(texts)} are empty")
    ids = np.concatenate(pieces)
    if (largest := max(int(ids.max()), pad_id)) >= size:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer gave token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), but the model's vocabulary has {vocab_size} tokens"
        )
    tokens = Tokens(
        ids=ids,
        offsets=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        rows=np.asarray(indices, np.int32),
        pad_id=pad_id,
        max_length=max_length,
        truncated=truncated,
        skipped=len(texts) - len(pieces),
        given=around.given,
        reproduce_release=reproduce_release,
    )
    logging.info("tokenised %s", tokens.report())
    return tokens


def _own_tokens(tokenizer, rows: Sequence[Mapping[str, Any]], anew: bool) -> Iterator[list[int]]:
    """Each text's tokens without what stands around it: the sampled ones where this tokenizer decodes them to that very
    text, which another vocabulary does not, nor where the text was edited since; else, or if `anew`, it is encoded."""
    for start in range(0, len(rows), BATCH):
        chunk = rows[start : start + BATCH]
        sampled = [list(row.get("tokens", ())[1 : -1 if row.get("ended") else None]) for row in chunk]
        texts = [row["text"] for row in chunk]
        same = [not anew and text == read for text, read in zip(texts, decode(tokenizer, sampled), strict=True)]
        encoded = iter(encode(tokenizer, [text for text, as_is in zip(texts, same, strict=True) if not as_is], False))
        yield from (tokens if as_is else next(encoded) for tokens, as_is in zip(sampled, same, strict=True))


def encode(tokenizer, texts: Sequence[str], begin: bool = True, end: bool = False) -> list[list[int]]:
    """Token lists of texts, however long, with what the tokenizer puts in front of a text (`begin`) and behind it.

    Nothing stands behind one unless `end` asks for it, so that a text is not over where a continuation is to follow.
    The Rust library is asked itself: what transformers puts around each of its answers takes longer than the answers.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    before = prefix(tokenizer) if begin and not end else []
    return [before + encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=end)]


def decode(tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts of token lists, without special tokens, exactly as the tokens spell them."""
    return tokenizer.backend_tokenizer.decode_batch(list(rows), skip_special_tokens=True)


def prefix(tokenizer, add_bos: bool | None = None) -> list[int]:
    """What stands before a text's own tokens: for add_bos None what the tokenizer itself puts there."""
    if add_bos is not None:
        return [_special(tokenizer, "bos_token_id")] if add_bos else []
    whole, bare = (tokenizer.backend_tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    raise UserError(f"{type(tokenizer).__name__}: its special tokens change the text's own; set add_bos")


def vocabulary_size(tokenizer) -> int:
    """One more than a tokenizer's last token: a model's matrices may be filled up beyond."""
    return max(tokenizer.get_vocab().values()) + 1


def bos(tokenizer) -> list[int]:
    """What text that follows nothing begins with, even where the tokenizer does not put it there; [] without a BOS."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _special(tokenizer, name: str) -> int:
    value = getattr(tokenizer, name)
    if value is None:
        raise UserError(f"{type(tokenizer).__name__}: has no {name}, which training needs")
    return value
