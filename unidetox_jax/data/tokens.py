"""Tokenises a data set once, into a single int32 array of all texts end to end.

Each text starts as its tokenizer starts it: with LLaMA's `<s>` or OPT's `</s>`, with nothing for GPT-2 and Falcon, as
in the released code. An end token follows a text that ended by itself, but not one that was cut, or the model would
learn to stop in the middle.

A sampled text keeps its sampled tokens for every model whose tokenizer decodes them to that text.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from unidetox_jax.data.texts import Texts
from unidetox_jax.errors import UserError

BATCH = 1024  # texts a call of the tokenizer: enough to fill its threads, few enough for memory


class Affixes(NamedTuple):
    """Tokens around each text to train on.

    prefix: before every text. suffix: after a text that ended by itself. loss_start: index of the first target.
    """

    prefix: list[int]
    suffix: list[int]
    loss_start: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised texts; `tokens[i]` is the i-th non-empty one.

    Attributes:
      ids: int32 [total], all texts end to end.
      offsets: int64 [N + 1], where each begins.
      rows: int32 [N], each text's index in the tokenised list.
      pad_id: the token that fills rows.
      max_length: most tokens of a text.
      truncated: number of texts cut at max_length.
      skipped: number of empty texts left out.
      loss_start: index of each text's first target.
      reproduce_release: padding, up to the longest text of all, is trained on, as in the released code.
    """

    ids: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    pad_id: int
    max_length: int
    truncated: int = 0
    skipped: int = 0
    loss_start: int = 1
    reproduce_release: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each text."""
        return np.diff(self.offsets)

    def report(self) -> str:
        """One line: number of texts and tokens, how many were cut or left out."""
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
    affixes: Affixes | None = None,
    reproduce_release: bool = False,
) -> Tokens:
    """Tokenises texts for training; logs how many were cut or left out.

    Args:
      texts: strings, or `Texts`, which know the sampled tokens and which texts were cut (those get no end token).
      tokenizer: as from `checkpoint.load_tokenizer`.
      max_length: most tokens of a text, special ones included; longer texts are cut.
      context: the model's context length, an upper bound of max_length; None: not checked.
      vocab_size: size of the model's embedding: a token beyond it is an error, a pad token beyond it is not used.
      affixes: tokens around each text, of a chat template say; None: the tokenizer's prefix, and an end token.
      reproduce_release: as the released code: no end token, padding trained on, sampled tokens not reused.

    Raises:
      UserError: max_length below 2 or above the context, no text left, a special token missing from the tokenizer, a
        token missing from the model.
    """
    if max_length < 2:
        raise UserError(f"max_length: found {max_length}, expected at least 2: a token and one to predict from it")
    if context is not None and max_length > context:
        raise UserError(f"max_length: found {max_length}, beyond the model's context of {context} tokens")
    if not len(texts):
        raise UserError("no text to tokenise: the data set is empty")
    if affixes is None:
        suffix = [] if reproduce_release else [_special(tokenizer, "eos_token_id")]
        affixes = Affixes(prefix(tokenizer), suffix)
    if max_length <= len(affixes.prefix):
        raise UserError(f"max_length: found {max_length}, but {len(affixes.prefix)} tokens precede each text")
    pad_id, size = tokenizer.pad_token_id, math.inf if vocab_size is None else vocab_size
    pad_id = pad_id if pad_id is not None and pad_id < size else _special(tokenizer, "eos_token_id")
    rows = texts.rows if isinstance(texts, Texts) else [{"text": text} for text in texts]
    pieces, indices, truncated = [], [], 0
    text_tokens = _text_tokens(tokenizer, rows, reuse_sampled=not reproduce_release)
    for index, (row, tokens) in enumerate(zip(rows, text_tokens, strict=True)):
        if not tokens or not row["text"].strip():
            continue
        tokens = affixes.prefix + tokens + (affixes.suffix if row.get("ended", True) else [])
        truncated += len(tokens) > max_length
        pieces.append(np.asarray(tokens[:max_length], np.int32))
        indices.append(index)
    if not pieces:
        raise UserError(f"no text is left to train on: all {len(texts)} are empty")
    ids = np.concatenate(pieces)
    if (largest := max(int(ids.max()), pad_id)) >= size:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer gave token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), but the model's vocabulary has {vocab_size} tokens"
        )
    tokenized = Tokens(
        ids=ids,
        offsets=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        rows=np.asarray(indices, np.int32),
        pad_id=pad_id,
        max_length=max_length,
        truncated=truncated,
        skipped=len(texts) - len(pieces),
        loss_start=affixes.loss_start,
        reproduce_release=reproduce_release,
    )
    logging.info("tokenised %s", tokenized.report())
    return tokenized


def _text_tokens(tokenizer, rows: Sequence[Mapping[str, Any]], reuse_sampled: bool) -> Iterator[list[int]]:
    """Each text's tokens without affixes. Sampled ones are reused if this tokenizer decodes them to the very same text,
    which fails for another vocabulary or an edited text; other texts are encoded."""
    for start in range(0, len(rows), BATCH):
        chunk = rows[start : start + BATCH]
        sampled = [list(row.get("tokens", ())[1 : -1 if row.get("ended") else None]) for row in chunk]
        texts = [row["text"] for row in chunk]
        decoded = decode(tokenizer, sampled)
        reuse = [reuse_sampled and text == other for text, other in zip(texts, decoded, strict=True)]
        to_encode = [text for text, reused in zip(texts, reuse, strict=True) if not reused]
        encoded = iter(encode(tokenizer, to_encode, begin=False))
        yield from (tokens if reused else next(encoded) for tokens, reused in zip(sampled, reuse, strict=True))


def encode(tokenizer, texts: Sequence[str], begin: bool = True, end: bool = False) -> list[list[int]]:
    """Token lists of texts of any length, with the special tokens the tokenizer adds at the `begin` and the `end`.

    None at the end by default, so that a continuation can follow. Calls the Rust library directly: transformers'
    wrapping of each result takes longer than the tokenisation.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    start = prefix(tokenizer) if begin and not end else []
    return [start + encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=end)]


def decode(tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts of token lists, without special tokens, exactly as the tokens spell them."""
    return tokenizer.backend_tokenizer.decode_batch(list(rows), skip_special_tokens=True)


def prefix(tokenizer) -> list[int]:
    """The special tokens that the tokenizer adds before a text."""
    full, bare = (tokenizer.backend_tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    raise UserError(f"{type(tokenizer).__name__}: adding special tokens changes the text's own tokens")


def vocabulary_size(tokenizer) -> int:
    """Largest token id plus one; a model's embedding may be padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


def bos(tokenizer) -> list[int]:
    """The start of text generated from nothing, even if the tokenizer does not add BOS itself; [] without a BOS."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _special(tokenizer, name: str) -> int:
    value = getattr(tokenizer, name)
    if value is None:
        raise UserError(f"{type(tokenizer).__name__}: has no {name}, which training needs")
    return value
