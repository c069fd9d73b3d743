"""Perplexity of continuations given their prompts, under any scorer model.

exp((NLL(prompt + continuation) − NLL(prompt)) / new tokens), where both texts are tokenised separately. Their common
prefix cancels, so only the rest is scored: usually the continuation, and also the prompt's end if a token spans the
boundary.

Axes: R runs, P prompts, S samples of a prompt.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unidetox_jax.data.tokens import bos, encode
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import bootstrap
from unidetox_jax.evaluation.generator import Generator
from unidetox_jax.evaluation.likelihood import common_prefix_length, loglikelihood
from unidetox_jax.evaluation.metrics import Cell, Metric, PerText, Quantity, Result, Subject
from unidetox_jax.models import Model

LIMIT = 1e4  # continuations of at least this perplexity are excluded from the mean, and counted


class Perplexity(Metric):
    """Perplexity of the continuations under config.evaluate.perplexity_scorer."""

    field = "perplexity_scorer"
    loads = "perplexity_scorer"
    nothing = None

    def compute(self, subject: Subject) -> Result:
        settings = subject.settings
        measured = subject.each_run("perplexities", functools.partial(_measure, subject))
        values = measured[:, :-1].reshape(len(subject.runs), len(subject.prompts.texts), -1)
        summary = summarize_runs(values, settings.perplexity_limit, settings.resamples, settings.seed)
        sums, counts = per_prompt(values, settings.perplexity_limit)
        return Result(
            {**summary, "truncated": int(measured[:, -1].sum())},
            {"perplexity_sum": sums, "perplexity_count": counts},
            {"perplexity": PerText(values, 4)},
        )

    def cells(self, summary: Mapping[str, Any]) -> dict[Quantity, Cell]:
        quantity = Quantity(
            "perplexity",
            "Perplexity",
            True,
            2,
            explanation="Perplexity: of the continuations, under the scorer model.",
            per_prompt="perplexity_sum",
            weights="perplexity_count",
            same=("perplexity_scorer",),
        )
        return {quantity: Cell.of(summary)}

    def notes(self, summary: Mapping[str, Any]) -> list[str]:
        if not summary["excluded"] + summary["undefined"]:
            return []
        return [
            f"perplexity is over {summary['counted']} texts: {summary['excluded']} are above the limit, "
            f"{summary['undefined']} add no token"
        ]


def _measure(subject: Subject, index: int) -> np.ndarray:
    """Perplexities of a run's texts, and last the number of texts that lost context: [P·S + 1]."""
    settings = subject.settings
    separator = "\n" if settings.chat else ""  # an answer does not continue the prompt's last word
    values, truncated = conditional(
        *subject.load(),
        [prompt + separator for prompt in subject.prompts.texts],
        subject.runs[index].texts,
        settings.score_batch_size,
        settings.reproduce_release,
        label=f"perplexity {index + 1} of {settings.runs}",
    )
    return np.append(values.ravel(), truncated)


def conditional(
    scorer: Model | Generator,
    tokenizer: Any,
    prompts: Sequence[str],
    continuations: Sequence[Sequence[str]],
    batch_size: int = 256,
    reproduce_release: bool = False,
    label: str | None = None,
) -> tuple[np.ndarray, int]:
    """Perplexity of every continuation, float64 [P, S], and the number of texts that lost context on the left.

    NaN if the continuation adds no token to its prompt. Texts are tokenised with special tokens (LLaMA's begin with
    BOS); the first token is not scored. After an empty prompt, BOS precedes the continuation.

    Args:
      prompts, continuations: P prompts, S texts each.
      reproduce_release: divide as the released code does, by the tokens added to the last *newly seen* prompt, which is
        another one if a prompt recurs after others.

    Raises:
      UserError: a prompt without tokens, if the tokenizer has no BOS.
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

    shared = [common_prefix_length(prompt_tokens[p], tokens) for p, tokens in zip(owner, full_tokens, strict=True)]
    tails = dict.fromkeys((int(p), c) for p, c in zip(owner, shared, strict=True) if c < len(prompt_tokens[p]))
    texts = [(tokens, c) for tokens, c in zip(full_tokens, shared, strict=True)]
    texts += [(prompt_tokens[p], c) for p, c in tails]
    likelihoods = loglikelihood(scorer, [t[:c] for t, c in texts], [t[c:] for t, c in texts], batch_size, label=label)

    prompt_sums = dict(zip(tails, likelihoods.sums[len(flat) :], strict=True))
    nll = -likelihoods.sums[: len(flat)]
    nll += np.array([prompt_sums.get((int(p), c), 0.0) for p, c in zip(owner, shared, strict=True)])
    lengths = np.array([len(tokens) for tokens in prompt_tokens])
    divisor_owner = _last_new_prompt(prompts, owner) if reproduce_release else owner
    added = np.array([len(tokens) for tokens in full_tokens]) - lengths[divisor_owner]
    if not np.isfinite(nll).all():
        bad = int(np.argmin(np.isfinite(nll)))
        raise UserError(f"perplexity: the scorer model gave text {bad} ({flat[bad][:40]!r}) a likelihood of {nll[bad]}")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = np.exp(nll / added)
    if not reproduce_release:
        values[added <= 0] = np.nan
    return values.reshape(len(prompts), -1), int(np.count_nonzero(likelihoods.truncated))


def summarize_runs(values: np.ndarray, limit: float = LIMIT, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Mean of the perplexities below `limit`, for values [R, P, S]: the fields of `bootstrap.over_runs`, None if a run
    has no value below the limit, and the counts "texts", "counted", "excluded" (at or above the limit), "undefined"
    (NaN)."""
    counted, undefined = int((values < limit).sum()), int(np.isnan(values).sum())
    counts = {"texts": values.size, "counted": counted, "excluded": values.size - counted - undefined}
    counts["undefined"] = undefined
    if not (values < limit).any(axis=(1, 2)).all():
        return {**dict.fromkeys(("mean", "sd", "runs", "low", "high")), **counts}
    sums, weights = per_prompt(values, limit)
    _, resampled = bootstrap.resample(sums, resamples, seed, weights=weights)
    return {**bootstrap.over_runs(np.array([run[run < limit].mean() for run in values]), resampled), **counts}


def per_prompt(values: np.ndarray, limit: float = LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of each prompt's perplexities below `limit` over runs and samples: values [R, P, S] → [P], [P]."""
    counted = values < limit
    return np.where(counted, values, 0.0).sum(axis=(0, 2)), counted.sum(axis=(0, 2))


def _last_new_prompt(prompts: Sequence[str], owner: np.ndarray) -> np.ndarray:
    """The prompt that the released code tokenised last before each text; it tokenises each distinct prompt once."""
    seen: set[str] = set()
    last, result = 0, np.empty_like(owner)
    for row, index in enumerate(owner):
        if prompts[index] not in seen:
            seen.add(prompts[index])
            last = index
        result[row] = last
    return result
