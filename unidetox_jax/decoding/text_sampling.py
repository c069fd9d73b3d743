"""Samples whole texts from an objective, batch by batch: the distilled data set (Lu et al., ICLR 2025, section 3.2).

A text depends only on the seed and its own number. All batches have the same shape, so one program serves them all, and
a caller that stores finished batches (`keep`) resumes an interrupted run with identical results.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from unidetox_jax import text_statistics
from unidetox_jax.data.texts import Texts
from unidetox_jax.data.tokens import decode
from unidetox_jax.decoding.generate import generate
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.decoding.preparation import Prepared, mesh_of, prepare
from unidetox_jax.errors import UserError
from unidetox_jax.models import Model
from unidetox_jax.progress import Progress

Value = TypeVar("Value")
Batch = dict[str, Any]  # {"made_on": description of the hardware, "rows": one dictionary per text}


def uncached(name: str, make: Callable[[], Value], together: bool = True) -> Value:
    """A `keep` that stores nothing: it always calls `make`."""
    return make()


def sample_texts(
    models: Sequence[Model],
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    objective: Objective,
    seed: int,
    num_texts: int,
    max_length: int,
    batch_size: int,
    names: Sequence[str] = (),
    reject: Callable[[Sequence[str]], Sequence[str]] | None = None,
    most: float = 4.0,
    keep: Callable[[str, Callable[[], Batch]], Batch] = uncached,
    begin: Sequence[int] | None = None,
    label: str | None = None,
    **options: Any,
) -> Texts:
    """Samples `num_texts` continuations of one prompt. Every process calls it and gets all texts.

    Each row of the result has "row" (its number), "seed", "text", "ended" (whether it reached an end token),
    "log_probabilities" (model name → mean over the new tokens, untruncated) and "tokens" (from the prompt's first to
    the end token).

    Args:
      models, objective, seed, options (warpers, cache, vocab_size): as in `generate`.
      prompt: token ids that every text begins with. max_length: tokens per text at most, including the prompt.
      names: the models' names in "log_probabilities"; empty: the objective's argument names.
      reject: texts → reasons for rejection, "" for accepted texts; up to `most` times `num_texts` texts are sampled to
        replace rejected ones. None accepts all.
      keep: (batch name, make) → batch; calls `make` or returns a stored batch.
      begin: tokens to store in place of the prompt if that is not part of the text: the start of a conversation.
      label: title of a progress bar; None shows none.

    Raises:
      UserError: a prompt that leaves no room, a too short context, too few accepted texts, or as `generate`.
    """
    if len(prompt) >= max_length:
        raise UserError(f"max_length: found {max_length}, but the prompt alone has {len(prompt)} tokens with BOS")
    names = distinct_names(names or objective.arguments)
    size, hardware = min(batch_size, num_texts), _hardware(models)
    if not isinstance(models[0].params, Prepared):
        models = prepare(models, side_by_side=options.get("cache", "own") == "own")
    options |= {"objective": objective, "seed": seed, "max_new_tokens": max_length - len(prompt)}
    limit = num_texts if reject is None else int(most * num_texts)
    made_on: set[str] = set()
    accepted: list[dict[str, Any]] = []

    def sample_batch(first: int) -> Batch:
        started = time.monotonic()
        row_ids = np.arange(first, first + size, dtype=np.int32)  # the last batch has the same shape as the others
        prompts = np.tile(np.asarray(prompt, np.int32), (size, 1))
        result = generate(models, prompts, row_ids=row_ids, log_probabilities=True, **options)
        rows = _rows(result, row_ids[: limit - first], prompt if begin is None else begin, tokenizer, seed, names)
        rate = int(result.lengths[: len(rows)].sum()) / (time.monotonic() - started)
        bar.set_postfix({"tokens/s": f"{rate:.0f}"}, refresh=False)
        return {"made_on": hardware, "rows": rows}

    with Progress(num_texts, "texts", label or "", disable=label is None or jax.process_index() > 0) as bar:
        for first in range(0, limit, size):
            if len(accepted) < num_texts:
                batch = keep(f"{first // size:06d}", functools.partial(sample_batch, first))
                made_on.add(batch["made_on"])
                accepted += _accepted(batch["rows"], reject)
                bar.update(min(len(accepted), num_texts) - bar.n)
    if len(accepted) < num_texts:
        raise UserError(
            f"reject: left {len(accepted)} of {limit} texts, expected {num_texts}; reject less, or raise reject.most"
        )
    return Texts(tuple(accepted[:num_texts]), tuple(sorted(made_on)))


def _rows(result, row_ids, start, tokenizer, seed: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """The result's rows as dictionaries, without those that only pad the batch."""
    rows = []
    for index, row_id in enumerate(row_ids.tolist()):
        tokens = [*start, *result.tokens[index, : result.lengths[index]].tolist()]
        values = zip(names, result.log_probabilities[:, index], strict=True)
        rows.append(
            {  # in the key order of a sorted JSON file, so that a stored row is identical to the byte
                "ended": bool(result.ended[index]),
                "log_probabilities": {name: round(float(value), 5) for name, value in sorted(values)},
                "row": row_id,
                "seed": seed,
                "text": decode(tokenizer, [tokens])[0],
                "tokens": tokens,
            }
        )
    return rows


def _accepted(rows: list[dict[str, Any]], reject: Callable[[Sequence[str]], Sequence[str]] | None) -> list:
    if reject is None:
        return rows
    reasons = reject([row["text"] for row in rows])
    return [row for row, reason in zip(rows, reasons, strict=True) if not reason]


def distinct_names(names: Sequence[str]) -> list[str]:
    """Makes names unique: a repeated name gets its position appended."""
    return [name if name not in names[:i] else f"{name}#{i + 1}" for i, name in enumerate(names)]


def _hardware(models: Sequence[Model]) -> str:
    mesh, dtype = mesh_of(models), models[0].cfg.dtype
    device = jax.devices()[0].device_kind
    if mesh is None:
        return f"1 x {device}, computed in {dtype}"
    layout = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
    return f"{mesh.size} x {device}, mesh {layout}, computed in {dtype}"


def first_token(tokenizer: Any, name: str) -> int:
    """The token that texts begin with: BOS, or else EOS. `name`: the model's, for the error message."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError(f"the tokenizer of {name!r} has neither BOS nor EOS")


def common_vocabulary(tokenizers: Sequence[Any], names: Sequence[str]) -> int:
    """The number of token ids, from 0 on, that mean the same to all tokenizers. Padding tokens may differ.

    Tokens beyond them that were added to a tokenizer are ignored, with a warning.

    Raises:
      UserError: tokenizers that disagree on a token.
    """
    vocabularies = [{index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in tokenizers]
    sizes = [max(vocabulary) + 1 for vocabulary in vocabularies]
    common = min(sizes)
    for name, tokenizer, theirs, size in zip(names, tokenizers, vocabularies, sizes, strict=True):
        problem = f"{name} and {names[0]} have different tokenizers"
        added = set(tokenizer.get_added_vocab().values())
        if any(index >= common and index not in added for index in theirs):
            raise UserError(f"{problem} ({size} and {common} tokens)")
        for index in range(common):
            if theirs.get(index) != vocabularies[0].get(index):
                found, expected = theirs.get(index), vocabularies[0].get(index)
                raise UserError(f"{problem} (token {index} is {found!r} and {expected!r})")
        for field in ("bos_token_id", "eos_token_id"):
            if getattr(tokenizer, field) != getattr(tokenizers[0], field):
                found, expected = getattr(tokenizer, field), getattr(tokenizers[0], field)
                raise UserError(f"{problem} ({field} {found} and {expected})")
        if size > common:
            logging.warning("%s: ignoring its last %d tokens, which the others do not have", name, size - common)
    return common


def same_weights(models: Sequence[Model], names: Sequence[str]) -> tuple[str, ...]:
    """The names of the first two models with equal weights; empty if all differ."""

    def equal(left: Any, right: Any) -> bool:
        pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
        return left is right or all(bool(jnp.array_equal(a, b)) for a, b in pairs)

    for later in range(len(models)):
        for earlier in range(later):
            same_shape = models[earlier].cfg == models[later].cfg
            if same_shape and equal(models[earlier].params, models[later].params):
                return names[earlier], names[later]
    return ()


def statistics(texts: Texts) -> dict[str, Any]:
    """Counts of texts, tokens, end tokens, degenerate and duplicate texts, and mean log-probabilities over texts."""
    lengths = [len(row["tokens"]) for row in texts.rows]
    names = texts.rows[0]["log_probabilities"]
    return {
        "texts": len(texts),
        "tokens": sum(lengths),  # including BOS and end tokens
        "mean_tokens": round(sum(lengths) / len(lengths), 2),
        "ended": sum(texts.ended or ()),
        "degenerate": text_statistics.degenerate_counts(texts),
        "duplicates": text_statistics.duplicates(texts),
        "repeated_4grams": round(float(np.mean([text_statistics.repeated_share(text) for text in texts])), 4),
        "log_probabilities": {
            name: round(float(np.mean([row["log_probabilities"][name] for row in texts.rows])), 4) for name in names
        },
    }
