"""What an evaluation writes once all its parts are there; the files are described in `stages/evaluate.py`.

The surprising thing: `metrics.json` comes last, and says that all is there.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unidetox_jax import storage, text_statistics
from unidetox_jax.evaluation import diversity, perplexity, toxicity
from unidetox_jax.evaluation.generations import Continuations
from unidetox_jax.evaluation.prompts import Prompts
from unidetox_jax.stages.settings import EvaluateSettings

METRICS, PER_PROMPT, GENERATIONS, PROMPTS = "metrics.json", "per_prompt.npz", "generations.jsonl", "prompts.jsonl"


def write(
    directory: epath.Path,
    settings: EvaluateSettings,
    model: Mapping[str, str],
    asked: Prompts,
    made: Sequence[Continuations],
    scores: np.ndarray,
    perplexities: np.ndarray | None,
    truncated: int,
    alone: Mapping[str, Any],
) -> None:
    """Summarises and writes.

    Args:
      model: name, form, source.
      made: of each run. scores [R, P, S], NaN where the scorer refused. perplexities [R, P, S], or None.
      truncated: texts that lost context under the perplexity scorer.
      alone: results of the model without continuations: "mmlu.SPEC", "text", "harness".
    """
    ratios = np.stack([diversity.per_prompt(_for_diversity(asked.texts, run.texts, settings.official)) for run in made])
    metrics = {
        "model": dict(model),
        "scorer": settings.scorer,
        "perplexity_scorer": settings.perplexity_scorer,
        "prompt_source": settings.prompts,
        "groups": {"id": list(settings.id_categories), "ood": list(settings.ood_categories)},
        "counts": _counts(asked, made, scores),
        "toxicity": toxicity.summarize_runs(
            scores,
            asked.categories,
            settings.threshold,
            {"id": settings.id_categories, "ood": settings.ood_categories},
            settings.resamples,
            settings.seed,
            missing=True,
        ),
        "perplexity": None,
        "diversity": diversity.summarize_runs(ratios, settings.resamples, settings.seed),
        "mmlu": {name.partition(".")[2]: found for name, found in alone.items() if name.startswith("mmlu.")},
        "text_perplexity": alone.get("text"),
        "harness": alone.get("harness", {}),
    }
    arrays = toxicity.per_prompt(scores, settings.threshold, missing=True)
    arrays |= {f"dist{order}": ratios[:, :, i].mean(axis=0) for i, order in enumerate(diversity.ORDERS)}
    arrays["category"] = np.array(asked.categories, np.str_)
    if perplexities is not None:
        limit = settings.perplexity_limit
        found = perplexity.summarize_runs(perplexities, limit, settings.resamples, settings.seed)
        metrics["perplexity"] = {**found, "truncated": truncated}
        arrays["perplexity_sum"], arrays["perplexity_count"] = perplexity.per_prompt(perplexities, limit)
    storage.write_lines(
        directory / PROMPTS,
        (
            {"prompt": index, "category": category, "text": text}
            for index, (text, category) in enumerate(zip(asked.texts, asked.categories, strict=True))
        ),
    )
    storage.write_lines(directory / GENERATIONS, _rows(made, scores, perplexities))
    storage.write_arrays(directory / PER_PROMPT, arrays)
    storage.write_json(directory / METRICS, _finite(metrics))


def _for_diversity(prompts: Sequence[str], texts: Sequence[Sequence[str]], official: bool) -> list[list[str]]:
    if not official:
        return [list(own) for own in texts]
    return [[prompt + text for text in own] for prompt, own in zip(prompts, texts, strict=True)]


def _counts(asked: Prompts, made: Sequence[Continuations], scores: np.ndarray) -> dict[str, Any]:
    texts = [text for run in made for own in run.texts for text in own]
    return {
        "prompts": len(asked.texts),
        "categories": asked.counts(),
        "runs": scores.shape[0],
        "samples": scores.shape[2],
        "texts": len(texts),
        "empty": texts.count(""),
        "ended": int(sum(run.ended.sum() for run in made)),
        "missing_scores": int(np.isnan(scores).sum()),
        "degenerate": text_statistics.degenerate_counts(texts),
    }


def _rows(made: Sequence[Continuations], scores: np.ndarray, perplexities: np.ndarray | None):
    for run, prompt, sample in itertools.product(*map(range, scores.shape)):
        value = math.nan if perplexities is None else perplexities[run, prompt, sample]
        yield {
            "run": run,
            "prompt": prompt,
            "sample": sample,
            "text": made[run].texts[prompt][sample],
            "ended": bool(made[run].ended[prompt, sample]),
            "score": _finite(round(float(scores[run, prompt, sample]), 6)),
            "perplexity": _finite(round(float(value), 4) if math.isfinite(value) else value),
        }


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that one looks at first: means over runs."""
    figures = {
        f"{metric}_{group}": metrics["toxicity"][group][metric]["mean"]
        for group in ("id", "ood", "all")
        if group in metrics["toxicity"]
        for metric in toxicity.METRICS
    }
    if metrics["perplexity"]:
        figures["perplexity"] = metrics["perplexity"]["mean"]
    figures |= {name: found["mean"] for name, found in metrics["diversity"].items()}
    figures |= {f"mmlu {name}": found["accuracy"] for name, found in metrics["mmlu"].items()}
    if metrics["text_perplexity"]:
        figures["text_perplexity"] = metrics["text_perplexity"]["ppl"]
    return {**figures, "texts": metrics["counts"]["texts"]}


def describe(metrics: Mapping[str, Any]) -> str:
    """The headline in a few lines, with what it rests on."""
    model, counts = metrics["model"], metrics["counts"]
    figures = headline(metrics)
    del figures["texts"]
    name = model["name"] if model["form"] == "original" else f"{model['name']} {model['form']}"
    categories = ", ".join(f"{name or 'none'} {count}" for name, count in counts["categories"].items())
    left_out = counts["missing_scores"]
    lines = [
        f"{name}: {counts['texts']} texts, {counts['runs']} runs x {counts['samples']} samples x "
        f"{counts['prompts']} prompts ({categories}); {counts['empty']} empty"
        + (f"; {left_out} without a score, left out" if left_out else ""),
        "  " + "  ".join(f"{key} {'none' if value is None else f'{value:.4g}'}" for key, value in figures.items()),
    ]
    if metrics["perplexity"] and metrics["perplexity"]["excluded"] + metrics["perplexity"]["undefined"]:
        found = metrics["perplexity"]
        lines.append(
            f"  perplexity rests on {found['counted']} texts: {found['excluded']} are above the limit, "
            f"{found['undefined']} add no token"
        )
    lines += [f"  {task}: {_inline(found)}" for task, found in metrics["harness"].items()]
    return "\n".join(lines)


def _inline(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, int | float))
