"""Perplexity of continuations given their prompts, under any scorer model; and plain perplexity of a text file.

The definition subtracts two likelihoods: exp((NLL(prompt + continuation) − NLL(prompt)) / new tokens), of two texts
that are tokenised on their own (REFERENCE section 3). What both token lists begin with cancels, so only what follows
is scored: as a rule the continuation alone, and where the border falls inside a token, the prompt's end as well.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from unidetox_jax.data.tokens import bos, encode
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.likelihood import loglikelihood
from unidetox_jax.evaluation.toxicity import interval
from unidetox_jax.models import Model

LIMIT = 1e4  # continuations of at least this perplexity are left out of the mean, and counted
LONGEST_WINDOW = 2048  # of a file, unless asked for: what a longer context adds is small, and attention's cost is not


def conditional(
    scorer: Model,
    tokenizer: Any,
    prompts: Sequence[str],
    continuations: Sequence[Sequence[str]],
    batch_size: int = 256,
    official: bool = False,
    label: str | None = None,
) -> tuple[np.ndarray, int]:
    """Perplexity of every continuation: float64 [P, S], and how many texts lost context on the left.

    NaN where there is nothing to measure: the continuation adds no token to its prompt. Token lists are the
    tokenizer's own, special tokens included (LLaMA's begin with BOS); a text's first token is not scored. BOS stands
    before what follows an empty prompt.

    Args:
      prompts, continuations: P prompts, S texts each.
      official: divide as the released code does, by the difference to the length of the last *new* prompt: another
        prompt's, where a prompt comes again after others.

    Raises:
      UserError: a prompt without a token, where the tokenizer has no BOS.
    """
    flat = [prompt + text for prompt, texts in zip(prompts, continuations, strict=True) for text in texts]
    prompt_tokens = encode(tokenizer, prompts)
    full_tokens = encode(tokenizer, flat)
    owner = np.repeat(np.arange(len(prompts)), [len(texts) for texts in continuations])
    for index in [p for p, tokens in enumerate(prompt_tokens) if not tokens]:
        prompt_tokens[index] = bos(tokenizer)
        if prompts[index] or not prompt_tokens[index]:
            raise UserError(
                f"perplexity: prompt {index} ({prompts[index]!r}) has no tokens under the scorer's tokenizer"
            )
        for row in np.flatnonzero(owner == index):
            full_tokens[row] = prompt_tokens[index] + full_tokens[row]

    shared = [_common(prompt_tokens[p], tokens) for p, tokens in zip(owner, full_tokens, strict=True)]
    tails = dict.fromkeys((int(p), c) for p, c in zip(owner, shared, strict=True) if c < len(prompt_tokens[p]))
    texts = [(tokens, c) for tokens, c in zip(full_tokens, shared, strict=True)]
    texts += [(prompt_tokens[p], c) for p, c in tails]
    found = loglikelihood(scorer, [t[:c] for t, c in texts], [t[c:] for t, c in texts], batch_size, label=label)

    prompt_sums = dict(zip(tails, found.sums[len(flat) :], strict=True))
    nll = -found.sums[: len(flat)]
    nll += np.array([prompt_sums.get((int(p), c), 0.0) for p, c in zip(owner, shared, strict=True)])
    lengths = np.array([len(tokens) for tokens in prompt_tokens])
    divisor_owner = _stale(prompts, owner) if official else owner
    added = np.array([len(tokens) for tokens in full_tokens]) - lengths[divisor_owner]
    if not np.isfinite(nll).all():
        bad = int(np.argmin(np.isfinite(nll)))
        raise UserError(f"perplexity: the scorer model gave text {bad} ({flat[bad][:40]!r}) a likelihood of {nll[bad]}")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = np.exp(nll / added)
    if not official:
        values[added <= 0] = np.nan
    return values.reshape(len(prompts), -1), int(np.count_nonzero(found.truncated))


def summarize(values: np.ndarray, limit: float = LIMIT) -> dict[str, Any]:
    """Mean of the perplexities below `limit`, and what it rests on: values [P, S] → {"ppl", "texts", "counted",
    "excluded" (at or above the limit), "undefined" (nothing to measure)}; ppl is None when nothing is left."""
    counted = values[values < limit]
    undefined = int(np.isnan(values).sum())
    return {
        "ppl": float(counted.mean()) if counted.size else None,
        "texts": int(values.size),
        "counted": int(counted.size),
        "excluded": int(values.size - counted.size - undefined),
        "undefined": undefined,
    }


def summarize_runs(values: np.ndarray, limit: float = LIMIT, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """`summarize` of every run together: values [R, P, S] → {"mean", "sd", "runs", "low", "high", and its counts}.

    Mean and population standard deviation over runs, and the 95 % bootstrap interval over prompts; None when no run
    has anything to measure.
    """
    runs = [summarize(run, limit) for run in values]
    counts = {name: sum(run[name] for run in runs) for name in ("texts", "counted", "excluded", "undefined")}
    figures = np.array([np.nan if run["ppl"] is None else run["ppl"] for run in runs])
    if np.isnan(figures).any():
        return {**dict.fromkeys(("mean", "sd", "runs", "low", "high")), **counts}
    sums, counted = per_prompt(values, limit)
    rows = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
    with np.errstate(invalid="ignore"):
        spread = interval(rows @ sums / (rows @ counted))
    return {"mean": float(figures.mean()), "sd": float(figures.std()), "runs": figures.tolist(), **spread, **counts}


def per_prompt(values: np.ndarray, limit: float = LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of each prompt's counted perplexities over runs and samples: values [R, P, S] → [P], [P]."""
    there = values < limit
    return np.where(there, values, 0.0).sum(axis=(0, 2)), there.sum(axis=(0, 2))


def of_file(
    model: Model,
    tokenizer: Any,
    path: epath.PathLike,
    stride: int = 0,
    length: int = 0,
    batch_size: int = 256,
    label: str | None = None,
) -> dict[str, Any]:
    """`of_texts` of a text file as one stream. Raises UserError also where there is no such file, or no UTF-8 in it."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None
    return of_texts(model, tokenizer, [text], str(path), stride, length, batch_size, label)


def of_texts(
    model: Model,
    tokenizer: Any,
    texts: Sequence[str],
    where: str,
    stride: int = 0,
    length: int = 0,
    batch_size: int = 256,
    label: str | None = None,
) -> dict[str, Any]:
    """Perplexity of texts, each a stream of tokens of its own, by windows of `length` tokens that slide by `stride`.

    Every token of a text but the first is scored once, with at least length − stride tokens before it where there are
    as many. Length 0 means the model's context, but at most 2,048; stride 0 half the length. `where` is for messages.

    Returns:
      {"ppl", "nll" (nats a token), "bits_per_byte", "texts", "tokens" (scored), "bytes", "length", "stride"}.

    Raises:
      UserError: fewer than two tokens in every text.
    """
    length = length or min(model.cfg.max_position_embeddings, LONGEST_WINDOW)
    stride = stride or length // 2
    pieces = [windows(tokens, length, stride) for tokens in encode(tokenizer, texts)]
    contexts, continuations = ([piece for part in pieces for piece in part[side]] for side in (0, 1))
    scored, size = sum(map(len, continuations)), sum(len(text.encode()) for text in texts)
    if not scored:
        raise UserError(f"{where}: no text with at least 2 tokens")
    found = loglikelihood(model, contexts, continuations, batch_size, max_length=length, label=label)
    nll = -float(found.sums.sum())
    return {
        "ppl": float(np.exp(nll / scored)),
        "nll": nll / scored,
        "bits_per_byte": nll / np.log(2) / size,
        "texts": len(texts),
        "tokens": scored,
        "bytes": size,
        "length": length,
        "stride": stride,
    }


def windows(tokens: Sequence[int], length: int, stride: int) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Contexts and continuations that score every token but the first once, in inputs of at most `length` tokens."""
    contexts, continuations = [], []
    at = 1
    while at < len(tokens):
        end = min(at + (length if at == 1 else stride), len(tokens))
        start = max(0, end - 1 - length)
        contexts.append(tokens[start:at])
        continuations.append(tokens[at:end])
        at = end
    return contexts, continuations


def _common(prompt: Sequence[int], full: Sequence[int]) -> int:
    """How many tokens both begin with, at least 1 (the first is never scored)."""
    same = 0
    for left, right in zip(prompt, full, strict=False):
        if left != right:
            break
        same += 1
    return max(1, same)


def _stale(prompts: Sequence[str], owner: np.ndarray) -> np.ndarray:
    """Whose length the released code divides by: that of the prompt it tokenised last, which is only ever a new one."""
    seen: set[str] = set()
    last, result = 0, np.empty_like(owner)
    for row, index in enumerate(owner):
        if prompts[index] not in seen:
            seen.add(prompts[index])
            last = index
        result[row] = last
    return result
