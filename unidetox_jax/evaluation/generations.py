"""Continuations of prompts, as text: a prompt's samples side by side, prompts of like length together.

The random numbers of a continuation belong to its prompt and sample, so batches do not matter. A text is cut where the
prompt's own tokens end, decoded together with them, since sentencepiece drops the space before a first word; the
released code (`reproduce_release`) removes every occurrence of the prompt instead.

P prompts, S samples of a prompt.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unidetox_jax import buckets, decoding
from unidetox_jax.data import chat as conversations
from unidetox_jax.data import tokens as data_tokens
from unidetox_jax.decoding.preparation import prepare
from unidetox_jax.decoding.warpers import Warper, choose
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.generator import Generator, alone
from unidetox_jax.evaluation.protocol import Protocol
from unidetox_jax.models import Model
from unidetox_jax.progress import Progress

FULL_BATCH_LENGTH = 128  # prompts of up to this many tokens come in whole batches; longer ones in smaller ones
SHORTEST_CLASS = 16  # tokens of the first class of prompts
FEWEST_BATCHES = 3  # of a class


class Continuations(NamedTuple):
    """texts: P lists of S; ended: bool [P, S], by themselves; a continuation may be empty."""

    texts: list[list[str]]
    ended: np.ndarray


def tokenize_prompts(tokenizer: Any, prompts: Sequence[str], bos: bool = True) -> list[list[int]]:
    """Token lists of prompts, begun as the tokenizer begins a text (`bos`) or by nothing; an empty prompt is BOS.

    Raises:
      UserError: a prompt without tokens: an empty one where the tokenizer has no BOS, or one that it reads as nothing.
    """
    before = data_tokens.prefix(tokenizer) if bos else []
    encoded = data_tokens.encode(tokenizer, prompts, begin=False)
    unprompted = before or data_tokens.bos(tokenizer)
    for index, own in enumerate(encoded):
        if not own and (prompts[index] or not unprompted):
            raise UserError(f"prompt {index} ({prompts[index]!r}) has no tokens under the model's tokenizer")
    return [before + own or unprompted for own in encoded]


def generate(
    model: Model | Generator,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    bos: bool = True,
    chat: bool = False,
    system_prompt: str = "",
    reproduce_release: bool = False,
    **options: Any,
) -> Continuations:
    """S continuations of every prompt.

    Args:
      bos: prompts begin as the tokenizer begins a text (LLaMA and OPT: BOS; GPT-2 and Falcon: nothing).
      chat: prompts are a user's turns, after `system_prompt` if there is one, as the tokenizer's chat template says.
      reproduce_release: remove the prompt by its text, wherever it occurs, and not by its tokens.
      options: `samples`, `max_new_tokens` and the others of `complete`.

    Raises:
      UserError: a prompt without tokens, or too long for the model's context with `max_new_tokens` more; `chat` where
        the tokenizer has no template.
    """
    if chat:
        encoded = conversations.encode_prompts(tokenizer, prompts, system_prompt)
    else:
        encoded = tokenize_prompts(tokenizer, prompts, bos)
    new, ended = complete(model, encoded, vocab_size=data_tokens.vocabulary_size(tokenizer), **options)
    for index in np.ndindex(ended.shape):  # the end token is no part of the text
        new[index] = new[index][: len(new[index]) - int(ended[index])]
    return Continuations(_texts(tokenizer, prompts, encoded, new, reproduce_release), ended)


def runs(
    load: Callable[[], tuple[Model | Generator, Any]], prompts: Sequence[str], settings: Protocol, keep: Callable
) -> list:
    """The `Continuations` of each run of an evaluation.

    Args:
      load: gives the model, or the generator, and its tokenizer, where a run is missing.
      keep: (name, make) → what make() gives, or gave before an interruption.
    """

    def make(index: int) -> list[dict[str, Any]]:
        made = generate(
            *load(),
            prompts,
            samples=settings.samples,
            max_new_tokens=settings.max_new_tokens,
            warpers=choose(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p),
            seed=settings.seed + index,
            batch_size=settings.batch_size,
            bos=settings.prompt_bos and not settings.reproduce_release,
            chat=settings.chat,
            system_prompt=settings.system_prompt,
            reproduce_release=settings.reproduce_release,
            label=f"run {index + 1} of {settings.runs}",
        )
        return [{"texts": texts, "ended": row.tolist()} for texts, row in zip(made.texts, made.ended, strict=True)]

    kept = [keep(f"run{index}.texts.jsonl", functools.partial(make, index)) for index in range(settings.runs)]
    return [Continuations([row["texts"] for row in rows], np.array([row["ended"] for row in rows])) for rows in kept]


def complete(
    model: Model | Generator,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    warpers: Sequence[Warper] = (),
    seed: int = 0,
    batch_size: int = 512,
    eos_id: Sequence[int] | None = None,
    vocab_size: int | None = None,
    label: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S continuations of every prompt as tokens: an object array [P, S] of token lists, the end token included, and
    bool [P, S], whether one ended by itself.

    Args:
      batch_size: continuations at a time where prompts have up to 128 tokens, else proportionally fewer.
      label: shows progress under this name. The others are those of `decoding.generate`.
    """
    new = np.empty((len(prompts), samples), object)
    ended = np.zeros((len(prompts), samples), bool)
    hidden = label is None or jax.process_index() > 0
    generator = alone(model)
    same = not any(generator.prefixes)  # all models read the same
    models = prepare(generator.models, side_by_side=same)
    with Progress(len(prompts) * samples, "texts", label or "", disable=hidden) as bar:
        for batch in _batches([len(tokens) for tokens in prompts], samples, batch_size):
            read = [
                _padded([generator.read_by(index, prompts[p]) for p in batch.prompts])
                for index in range(1 if same else len(models))
            ] * (len(models) if same else 1)
            owners = [(p, batch.first + s) for p in batch.prompts for s in range(batch.samples)]
            generation = decoding.generate(
                models,
                [tokens for tokens, _ in read],
                objective=generator.objective,
                warpers=warpers,
                max_new_tokens=max_new_tokens,
                seed=seed,
                attention_mask=[mask for _, mask in read],
                eos_id=eos_id,
                row_ids=[p * samples + s for p, s in owners],
                samples=batch.samples,
                prompt_slots=batch.slots,
                vocab_size=generator.vocab_size or vocab_size,
            )
            for row, owner in enumerate(owners):
                new[owner], ended[owner] = (
                    generation.tokens[row, : generation.lengths[row]].tolist(),
                    generation.ended[row],
                )
            bar.update(batch.samples * len(set(batch.prompts)))
    return new, ended


class _Batch(NamedTuple):
    """Prompts by index (the last may come again, to fill up), their samples first … first + samples − 1, and the room
    for a prompt."""

    prompts: list[int]
    first: int
    samples: int
    slots: int


def _batches(lengths: Sequence[int], samples: int, batch_size: int):
    """Batches, longest prompts first; those of one size class have one shape. A class is a power of two, and one of
    less than `FEWEST_BATCHES` joins one up to four times as large: compiling takes as long as many a batch."""
    classes: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        classes.setdefault(max(buckets.next_power_of_two(max(lengths[index] - 1, 1)), SHORTEST_CLASS), []).append(index)
    for first in range(0, samples, batch_size):
        count = min(batch_size, samples - first)

        def size(slots, count=count):
            rows = batch_size
            while rows > 1 and rows * slots > batch_size * FULL_BATCH_LENGTH:
                rows //= 2
            return max(1, rows // count)

        merged: list[tuple[int, list[int]]] = []
        for slots, members in classes.items():
            if merged and len(members) < FEWEST_BATCHES * size(slots) and merged[-1][0] <= 4 * slots:
                merged[-1][1].extend(members)
            else:
                merged.append((slots, list(members)))
        for slots, members in merged:
            full = min(size(slots), len(members))
            for at in range(0, len(members), full):
                chosen = members[at : at + full]
                yield _Batch(chosen + chosen[-1:] * (full - len(chosen)), first, count, slots)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [rows, T], padding on the left."""
    length = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        tokens[index, length - len(row) :] = row
        mask[index, length - len(row) :] = True
    return tokens, mask


def _texts(tokenizer, prompts, encoded, new, reproduce_release: bool) -> list[list[str]]:
    heads = data_tokens.decode(tokenizer, encoded)
    result = []
    for prompt, tokens, head, own in zip(prompts, encoded, heads, new, strict=True):
        whole = data_tokens.decode(tokenizer, [tokens + continuation for continuation in own])
        if reproduce_release:
            result.append([text.replace(prompt, "") for text in whole])
        else:
            result.append([_after(head, text, tokenizer, own[i]) for i, text in enumerate(whole)])
    return result


def _after(head: str, whole: str, tokenizer, own: Sequence[int]) -> str:
    # The prompt's end may be half a character, which the continuation completes.
    return whole[len(head) :] if whole.startswith(head) else data_tokens.decode(tokenizer, [own])[0]
