"""Samples continuations of prompts, in batches of prompts of similar length.

A continuation's random numbers depend only on its prompt and sample indices, so batching does not change it. A
continuation is decoded together with its prompt's tokens and cut after them, since sentencepiece drops the space before
a first word; the released code (`reproduce_release`) removes every occurrence of the prompt instead.

Axes: P prompts, S samples of a prompt.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unidetox_jax import decoding, devices, padded_sizes, sharding
from unidetox_jax.data import chat as conversations
from unidetox_jax.data import tokens as data_tokens
from unidetox_jax.decoding.preparation import prepare
from unidetox_jax.decoding.warpers import Warper, choose
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.config import EvaluationConfig
from unidetox_jax.evaluation.generator import Generator, as_generator
from unidetox_jax.models import Model, ModelConfig, costs
from unidetox_jax.progress import Progress

FULL_BATCH_LENGTH = 128  # prompts of up to this many tokens use the full batch size, longer ones a smaller one
SHORTEST_BUCKET = 16  # tokens
COMPILE_SECONDS = 5.0  # of a decoding program


class Continuations(NamedTuple):
    """texts: P lists of S, possibly empty strings; ended: bool [P, S], whether an end token was sampled."""

    texts: list[list[str]]
    ended: np.ndarray


def tokenize_prompts(tokenizer: Any, prompts: Sequence[str], bos: bool = True) -> list[list[int]]:
    """Token lists of prompts, preceded by the tokenizer's start of a text if `bos`; an empty prompt is BOS.

    Raises:
      UserError: a prompt without tokens: an empty one if the tokenizer has no BOS, or one that it encodes to nothing.
    """
    start = data_tokens.prefix(tokenizer) if bos else []
    encoded = data_tokens.encode(tokenizer, prompts, begin=False)
    unprompted = start or data_tokens.bos(tokenizer)
    for index, tokens in enumerate(encoded):
        if not tokens and (prompts[index] or not unprompted):
            raise UserError(f"prompt {index} ({prompts[index]!r}) has no tokens under the model's tokenizer")
    return [start + tokens or unprompted for tokens in encoded]


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
      bos: start prompts as the tokenizer starts a text (LLaMA and OPT: BOS; GPT-2 and Falcon: nothing).
      chat: prompts are user turns in the tokenizer's chat template, after `system_prompt` if it is not empty.
      reproduce_release: remove every occurrence of the prompt's text instead of its tokens.
      options: `samples`, `max_new_tokens` and other arguments of `complete`.

    Raises:
      UserError: a prompt without tokens, or one that does not fit into the model's context with `max_new_tokens`;
        `chat` for a tokenizer without chat template.
    """
    if chat:
        encoded = conversations.encode_prompts(tokenizer, prompts, system_prompt)
    else:
        encoded = tokenize_prompts(tokenizer, prompts, bos)
    new, ended = complete(model, encoded, vocab_size=data_tokens.vocabulary_size(tokenizer), **options)
    for index in np.ndindex(ended.shape):  # without the end token
        new[index] = new[index][: len(new[index]) - int(ended[index])]
    return Continuations(_texts(tokenizer, prompts, encoded, new, reproduce_release), ended)


def generate_runs(
    load: Callable[[], tuple[Model | Generator, Any]], prompts: Sequence[str], config: EvaluationConfig, keep: Callable
) -> list:
    """The `Continuations` of each run of an evaluation.

    Args:
      load: returns the model or generator and its tokenizer; called only for missing runs.
      keep: (name, make) → make()'s result, or the one stored before an interruption.
    """

    def make(index: int) -> list[dict[str, Any]]:
        result = generate(
            *load(),
            prompts,
            samples=config.samples,
            max_new_tokens=config.max_new_tokens,
            warpers=choose(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p),
            seed=config.seed + index,
            batch_size=config.batch_size,
            bos=config.prompt_bos and not config.reproduce_release,
            chat=config.chat,
            system_prompt=config.system_prompt,
            reproduce_release=config.reproduce_release,
            label=f"run {index + 1} of {config.runs}",
        )
        return [{"texts": texts, "ended": row.tolist()} for texts, row in zip(*result, strict=True)]

    runs = [keep(f"run{index}.texts.jsonl", functools.partial(make, index)) for index in range(config.runs)]
    return [Continuations([row["texts"] for row in rows], np.array([row["ended"] for row in rows])) for rows in runs]


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
    """S continuations of every prompt as tokens: an object array [P, S] of token lists, including end tokens, and bool
    [P, S], whether an end token was sampled.

    Args:
      batch_size: continuations per batch for prompts of up to 128 tokens, proportionally fewer for longer ones.
      label: title of a progress bar. Other arguments as in `decoding.generate`.
    """
    new = np.empty((len(prompts), samples), object)
    ended = np.zeros((len(prompts), samples), bool)
    hidden = label is None or jax.process_index() > 0
    generator = as_generator(model)
    same_inputs = not any(generator.prefixes)
    models = prepare(generator.models, side_by_side=same_inputs)
    mesh = sharding.mesh_of(generator.params) or sharding.single_device_mesh()
    cost = functools.partial(
        _seconds_per_prompt,
        configs=[model.cfg for model in generator.models],
        kind=sharding.device_of(mesh).device_kind,
        count=mesh.size,
        samples=samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    lengths = [len(tokens) for tokens in prompts]
    buckets = _buckets(lengths, cost)
    with Progress(len(prompts) * samples, "texts", label or "", disable=hidden) as bar:
        for batch in _batches(lengths, samples, batch_size, buckets):
            inputs = [
                _left_padded([generator.model_input(index, prompts[p]) for p in batch.prompts])
                for index in range(1 if same_inputs else len(models))
            ] * (len(models) if same_inputs else 1)
            owners = [(p, batch.first + s) for p in batch.prompts for s in range(batch.samples)]
            generation = decoding.generate(
                models,
                [tokens for tokens, _ in inputs],
                objective=generator.objective,
                warpers=warpers,
                max_new_tokens=max_new_tokens,
                seed=seed,
                attention_mask=[mask for _, mask in inputs],
                eos_id=eos_id,
                row_ids=[p * samples + s for p, s in owners],
                samples=batch.samples,
                prompt_slots=batch.slots,
                vocab_size=generator.vocab_size or vocab_size,
            )
            for row, owner in enumerate(owners):
                new[owner] = generation.tokens[row, : generation.lengths[row]].tolist()
                ended[owner] = generation.ended[row]
            bar.update(batch.samples * len(set(batch.prompts)))
    return new, ended


class _Batch(NamedTuple):
    """Indices of prompts (the last is repeated as padding), their samples first … first + samples − 1, and the number
    of cache slots for a prompt."""

    prompts: list[int]
    first: int
    samples: int
    slots: int


def _batches(lengths: Sequence[int], samples: int, batch_size: int, buckets: Mapping[int, int]) -> Iterator[_Batch]:
    """Batches, longest prompts first, of one shape per length bucket.

    buckets: cache slots for a prompt's length, from `_buckets`.
    """
    by_slots: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        by_slots.setdefault(buckets[lengths[index]], []).append(index)
    for first in range(0, samples, batch_size):
        count = min(batch_size, samples - first)
        for slots, members in by_slots.items():
            full = min(_prompts_per_batch(slots, count, batch_size), len(members))
            for start in range(0, len(members), full):
                chosen = members[start : start + full]
                yield _Batch(chosen + chosen[-1:] * (full - len(chosen)), first, count, slots)


def _prompts_per_batch(slots: int, samples: int, batch_size: int) -> int:
    """Prompts of so many cache slots, each with its samples, in a batch of limited memory."""
    rows = batch_size
    while rows > 1 and rows * slots > batch_size * FULL_BATCH_LENGTH:
        rows //= 2
    return max(1, rows // samples)


def _buckets(lengths: Sequence[int], cost: Callable[[int], float]) -> dict[int, int]:
    """Cache slots for prompts of each of the lengths: powers of two, or the next larger ones of a program that is
    compiled anyway, where padding in all evaluations takes less time than compiling another.

    cost: cache slots → seconds for a prompt and its continuations.
    """
    prompts: dict[int, list[int]] = {}
    for length in sorted(lengths, reverse=True):
        slots = max(padded_sizes.next_power_of_two(max(length - 1, 1)), SHORTEST_BUCKET)
        prompts.setdefault(slots, []).append(length)
    buckets: dict[int, int] = {}
    compiled = 0
    for slots, members in prompts.items():
        prompts_read = padded_sizes.PROGRAM_USES * len(members)
        if not compiled or prompts_read * (cost(compiled) - cost(slots)) > COMPILE_SECONDS:
            compiled = slots
        buckets |= dict.fromkeys(members, compiled)
    return buckets


def _seconds_per_prompt(
    slots: int,
    configs: Sequence[ModelConfig],
    kind: str,
    count: int,
    samples: int,
    max_new_tokens: int,
    batch_size: int,
) -> float:
    """About the seconds that a prompt of so many cache slots and its continuations take on `count` devices of a kind:
    its FLOPs, and its share of reading the weights in every step of its batch."""
    flops_rate, bandwidth = devices.usual_rates(kind)
    batch = _prompts_per_batch(slots, min(samples, batch_size), batch_size)
    flops = sum(
        slots * costs.forward_flops(cfg, slots / 2, logits=0)
        + samples * max_new_tokens * costs.forward_flops(cfg, slots + max_new_tokens / 2)
        for cfg in configs
    )
    reads = max_new_tokens * sum(costs.read_bytes(cfg) for cfg in configs) / batch
    return flops / (flops_rate * count) + reads / bandwidth


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [rows, T], left-padded."""
    length = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        tokens[index, length - len(row) :] = row
        mask[index, length - len(row) :] = True
    return tokens, mask


def _texts(tokenizer, prompts, encoded, new, reproduce_release: bool) -> list[list[str]]:
    """The continuations' texts: `encoded` [P] prompts and `new` [P, S] continuations as tokens."""

    def remainder(decoded_prompt: str, text: str, continuation: Sequence[int]) -> str:
        if text.startswith(decoded_prompt):
            return text[len(decoded_prompt) :]
        # The prompt ends within a character that the continuation completes.
        return data_tokens.decode(tokenizer, [continuation])[0]

    result = []
    for prompt, tokens, decoded, samples in zip(
        prompts, encoded, data_tokens.decode(tokenizer, encoded), new, strict=True
    ):
        texts = data_tokens.decode(tokenizer, [tokens + continuation for continuation in samples])
        if reproduce_release:
            result.append([text.replace(prompt, "") for text in texts])
        else:
            result.append([remainder(decoded, *pair) for pair in zip(texts, samples, strict=True)])
    return result
