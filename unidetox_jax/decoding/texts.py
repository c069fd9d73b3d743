"""Whole texts sampled from an objective, batch by batch: the distilled data set (Lu et al., ICLR 2025, section 3.2).

A text depends on the seed and on its own number alone. Every batch has the same shape, so one program serves all, and
whoever keeps finished batches (`keep`) goes on after a kill with the first one missing, to the same bytes.
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
Batch = dict[str, Any]  # {"made_on": the hardware in words, "rows": a dictionary a text}


def anew(name: str, make: Callable[[], Value], together: bool = True) -> Value:
    """Keeps nothing: what is asked for is made."""
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
    keep: Callable[[str, Callable[[], Batch]], Batch] = anew,
    begin: Sequence[int] | None = None,
    label: str | None = None,
    **options: Any,
) -> Texts:
    """`num_texts` continuations of one prompt. Every process calls it and gets all texts.

    A text's row holds "row" (its number), "seed", "text", "ended" (by itself), "log_probabilities" (model's name → mean
    over its new tokens, untruncated) and "tokens" (the prompt's first, the end token last).

    Args:
      models, objective, seed, options (warpers, cache, vocab_size): as in `generate`.
      prompt: token ids that every text begins with.
      max_length: tokens of a text at most, the prompt's included.
      names: the models' names in "log_probabilities"; empty: the objective's own names for them.
      reject: texts → why each is left out, empty for one that is kept; as many more are made, up to `most` times
        `num_texts` in all. None: all are kept.
      keep: called with a batch's name and what makes it; gives the batch.
      begin: what stands in a row in place of the prompt, where that is no part of the text: a conversation's beginning.
      label: shows progress under this name; None shows none.

    Raises:
      UserError: a prompt that leaves no room, a context that is too short, too few texts that are kept, and as
        `generate`.
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
    kept: list[dict[str, Any]] = []

    def make(first: int) -> Batch:
        started = time.monotonic()
        row_ids = np.arange(first, first + size, dtype=np.int32)  # the last batch is as large as the others
        prompts = np.tile(np.asarray(prompt, np.int32), (size, 1))
        result = generate(models, prompts, row_ids=row_ids, log_probabilities=True, **options)
        wanted = range(min(size, limit - first))
        before = prompt if begin is None else begin
        rows = [_row(result, i, int(row_ids[i]), before, tokenizer, seed, names) for i in wanted]
        rate = int(result.lengths[wanted].sum()) / (time.monotonic() - started)
        bar.set_postfix({"tokens/s": f"{rate:.0f}"}, refresh=False)
        return {"made_on": hardware, "rows": rows}

    with Progress(num_texts, "texts", label or "", disable=label is None or jax.process_index() > 0) as bar:
        for first in range(0, limit, size):
            if len(kept) < num_texts:
                batch = keep(f"{first // size:06d}", functools.partial(make, first))
                made_on.add(batch["made_on"])
                reasons = reject([row["text"] for row in batch["rows"]]) if reject else [""] * len(batch["rows"])
                kept += [row for row, why in zip(batch["rows"], reasons, strict=True) if not why]
                bar.update(min(len(kept), num_texts) - bar.n)
    if len(kept) < num_texts:
        raise UserError(
            f"reject: left {len(kept)} of {limit} texts, expected {num_texts}; reject less, or raise reject.most"
        )
    return Texts(tuple(kept[:num_texts]), tuple(sorted(made_on)))


def _row(result, index: int, row_id: int, prompt, tokenizer, seed: int, names: Sequence[str]) -> dict[str, Any]:
    tokens = [*prompt, *result.tokens[index, : result.lengths[index]].tolist()]
    values = zip(names, result.log_probabilities[:, index], strict=True)
    return {  # in the order of a sorted JSON file, so that a kept row is this one to the byte
        "ended": bool(result.ended[index]),
        "log_probabilities": {name: round(float(value), 5) for name, value in sorted(values)},
        "row": row_id,
        "seed": seed,
        "text": decode(tokenizer, [tokens])[0],
        "tokens": tokens,
    }


def distinct_names(names: Sequence[str]) -> list[str]:
    """Each name once: the second of two equal ones gets its place added."""
    return [name if name not in names[:i] else f"{name}#{i + 1}" for i, name in enumerate(names)]


def _hardware(models: Sequence[Model]) -> str:
    mesh, dtype = mesh_of(models), models[0].cfg.dtype
    device = jax.devices()[0].device_kind
    if mesh is None:
        return f"1 x {device}, computed in {dtype}"
    layout = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
    return f"{mesh.size} x {device}, mesh {layout}, computed in {dtype}"


def first_token(tokenizer: Any, name: str) -> int:
    """What a text begins with: BOS, or where there is none EOS; `name` says whose tokenizer it is in the error."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError(f"the tokenizer of {name!r} has neither BOS nor EOS")


def common_vocabulary(tokenizers: Sequence[Any], names: Sequence[str]) -> int:
    """How many tokens, from the first, mean the same to all tokenizers; padding may differ, as no text is padded.

    What a tokenizer has beyond them are tokens that were added to it, and is left out: that is told in a line.

    Raises:
      UserError: two of whose tokens mean different things.
    """
    vocabularies = [{index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in tokenizers]
    sizes = [max(vocabulary) + 1 for vocabulary in vocabularies]
    common = min(sizes)
    for name, tokenizer, theirs, size in zip(names, tokenizers, vocabularies, sizes, strict=True):
        problem = f"{name} and {names[0]} have different tokenizers"
        added = set(tokenizer.get_added_vocab().values())
        if any(index >= common and index not in added for index in theirs):
            raise UserError(f"{problem} ({size} and {min(sizes)} tokens)")
        for index in range(common):
            if theirs.get(index) != vocabularies[0].get(index):
                found, expected = theirs.get(index), vocabularies[0].get(index)
                raise UserError(f"{problem} (token {index} is {found!r} and {expected!r})")
        for field in ("bos_token_id", "eos_token_id"):
            if getattr(tokenizer, field) != getattr(tokenizers[0], field):
                found, expected = getattr(tokenizer, field), getattr(tokenizers[0], field)
                raise UserError(f"{problem} ({field} {found} and {expected})")
        if size > common:
            logging.warning("%s: its %d last tokens are left out, which the others do not have", name, size - common)
    return common


def same_weights(models: Sequence[Model], names: Sequence[str]) -> tuple[str, ...]:
    """The names of the first two models whose weights are equal; nothing where all differ."""

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
    """Counts of texts, tokens, ends, degenerate and repeated texts, and mean log-probabilities over texts."""
    lengths = [len(row["tokens"]) for row in texts.rows]
    names = texts.rows[0]["log_probabilities"]
    return {
        "texts": len(texts),
        "tokens": sum(lengths),  # with BOS and the end
        "mean_tokens": round(sum(lengths) / len(lengths), 2),
        "ended": sum(texts.ended or ()),
        "degenerate": text_statistics.degenerate_counts(texts),
        "duplicates": text_statistics.duplicates(texts),
        "repeated_4grams": round(float(np.mean([text_statistics.repeated_share(text) for text in texts])), 4),
        "log_probabilities": {
            name: round(float(np.mean([row["log_probabilities"][name] for row in texts.rows])), 4) for name in names
        },
    }
