"""Continuations of prompts, as text: a prompt's samples side by side, prompts of like length together.

The random numbers of a continuation belong to its prompt and sample, so batches do not matter. The surprising thing:
text is cut where the prompt's own tokens end, decoded together with them, since sentencepiece drops the space before
a first word; the released code (`official`) removes every occurrence of the prompt instead.

P prompts, S samples of a prompt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unidetox_jax import decoding
from unidetox_jax.data import tokens as data_tokens
from unidetox_jax.decoding import objectives
from unidetox_jax.decoding.warpers import Warper
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.perplexity import encode
from unidetox_jax.models import Model
from unidetox_jax.progress import Progress

FULL_BATCH_LENGTH = 128  # prompt and continuation of up to this many tokens: whole batches; longer: smaller ones


class Continuations(NamedTuple):
    """texts: P lists of S; ended: bool [P, S], by themselves; a continuation may be empty."""

    texts: list[list[str]]
    ended: np.ndarray


def tokenize_prompts(tokenizer: Any, prompts: Sequence[str], bos: bool = True) -> list[list[int]]:
    """Token lists of prompts, begun as the tokenizer begins a text (`bos`) or by nothing.

    Raises:
      UserError: a prompt of no token of its own.
    """
    before = data_tokens.prefix(tokenizer) if bos else []
    found = encode(tokenizer, prompts, special=False)
    for index, own in enumerate(found):
        if not own:
            raise UserError(f"prompt {index} ({prompts[index]!r}) has no tokens under the model's tokenizer")
    return [before + own for own in found]


def generate(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    samples: int,
    max_new_tokens: int,
    warpers: Sequence[Warper] = (),
    seed: int = 0,
    batch_size: int = 512,
    bos: bool = True,
    official: bool = False,
    label: str | None = None,
) -> Continuations:
    """S continuations of every prompt.

    Args:
      batch_size: continuations at a time where prompt and continuation have up to 128 tokens together, else
        proportionally fewer.
      bos: prompts begin as the tokenizer begins a text (LLaMA and OPT: BOS; GPT-2 and Falcon: nothing).
      official: remove the prompt by its text, wherever it occurs, and not by its tokens.
      label: shows progress under this name.

    Raises:
      UserError: a prompt without tokens, or too long for the model's context with `max_new_tokens` more.
    """
    encoded = tokenize_prompts(tokenizer, prompts, bos)
    new = np.empty((len(prompts), samples), object)
    ended = np.zeros((len(prompts), samples), bool)
    with Progress(
        len(prompts) * samples, "texts", label or "", disable=label is None or jax.process_index() > 0
    ) as bar:
        for chosen, first, count in _batches([len(tokens) for tokens in encoded], samples, max_new_tokens, batch_size):
            rows = [encoded[p] for p in chosen]
            tokens, mask = _padded(rows)
            owners = [(p, s) for p in chosen for s in range(first, first + count)]
            found = decoding.generate(
                [model],
                tokens,
                objective=objectives.get("base"),
                warpers=warpers,
                max_new_tokens=max_new_tokens,
                seed=seed,
                attention_mask=mask,
                row_ids=[p * samples + s for p, s in owners],
                samples=count,
            )
            for row, owner in enumerate(owners):
                own = found.tokens[row, : found.lengths[row] - found.ended[row]]
                new[owner], ended[owner] = own.tolist(), found.ended[row]
            bar.update(count * len(set(chosen)))
    return Continuations(_texts(tokenizer, prompts, encoded, new, official), ended)


def _batches(lengths: Sequence[int], samples: int, max_new_tokens: int, batch_size: int):
    """(prompt indices, first sample, number of samples) of batches, longest prompts first; every batch of a size class
    has the same number of prompts, filled up with copies of its last."""
    order = sorted(range(len(lengths)), key=lambda p: -lengths[p])
    for first in range(0, samples, batch_size):
        count = min(batch_size, samples - first)
        at = 0
        while at < len(order):
            size = batch_size
            while size > 1 and size * (lengths[order[at]] + max_new_tokens) > batch_size * FULL_BATCH_LENGTH:
                size //= 2
            size = min(max(1, size // count), len(order))
            chosen = order[at : at + size]
            yield chosen + chosen[-1:] * (size - len(chosen)), first, count
            at += size


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [rows, T], padding on the left."""
    length = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        tokens[index, length - len(row) :] = row
        mask[index, length - len(row) :] = True
    return tokens, mask


def _texts(tokenizer, prompts, encoded, new, official: bool) -> list[list[str]]:
    heads = _decode(tokenizer, encoded)
    result = []
    for prompt, tokens, head, own in zip(prompts, encoded, heads, new, strict=True):
        whole = _decode(tokenizer, [tokens + continuation for continuation in own])
        if official:
            result.append([text.replace(prompt, "") for text in whole])
        else:
            result.append([_after(head, text, tokenizer, own[i]) for i, text in enumerate(whole)])
    return result


def _after(head: str, whole: str, tokenizer, own: Sequence[int]) -> str:
    # The prompt's end may be half a character, which the continuation completes.
    return whole[len(head) :] if whole.startswith(head) else _decode(tokenizer, [own])[0]


def _decode(tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    return tokenizer.batch_decode(list(rows), skip_special_tokens=True, clean_up_tokenization_spaces=False)
