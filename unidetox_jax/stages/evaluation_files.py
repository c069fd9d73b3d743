"""The files of an evaluation, described in `stages/evaluate.py`, and its summary for the terminal."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unidetox_jax import storage, text_statistics
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import categories
from unidetox_jax.evaluation.continuations import Continuations
from unidetox_jax.evaluation.metrics import METRICS as KNOWN
from unidetox_jax.evaluation.metrics import PerText, Result, Subject, cells, get, measured
from unidetox_jax.evaluation.prompts import Prompts
from unidetox_jax.evaluation.scorers import content_hash

METRICS, PER_PROMPT, GENERATIONS, PROMPTS = "metrics.json", "per_prompt.npz", "generations.jsonl", "prompts.jsonl"


def write(
    directory: epath.Path, subject: Subject, prompt_source: str, model: Mapping[str, str], results: Mapping[str, Result]
) -> None:
    """Writes all files, metrics.json last as it marks the evaluation as complete.

    prompt_source: as configured. model: name, form, source. results: {metric: its result}.

    Raises:
      UserError: two metrics share a name of a column or array.
    """
    settings, prompts = subject.settings, subject.prompts
    per_text = _merged({name: result.per_text for name, result in results.items()})
    metrics = {
        **{name: get(name).nothing for name in KNOWN},
        **{name: result.summary for name, result in results.items()},
        "model": dict(model),
        "scorer": settings.scorer,
        "scorer_hash": content_hash(subject.path(settings.scorer)) if settings.scorer else "",
        "perplexity_scorer": settings.perplexity_scorer,
        "prompt_source": prompt_source,
        "groups": categories.groups(settings),
        "counts": _counts(prompts, subject.runs, per_text),
    }
    arrays = _merged({name: result.per_prompt for name, result in results.items()})
    numbered = enumerate(zip(prompts.texts, prompts.categories, strict=True))
    storage.write_lines(
        directory / PROMPTS,
        ({"prompt": index, "category": category, "text": text} for index, (text, category) in numbered),
    )
    storage.write_lines(directory / GENERATIONS, _lines(subject.runs, per_text))
    storage.write_arrays(directory / PER_PROMPT, {**arrays, "category": np.array(prompts.categories, np.str_)})
    storage.write_json(directory / METRICS, _finite(metrics))


def _merged(by_metric: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for metric, values in by_metric.items():
        for name in sorted(values.keys() & merged.keys()):
            raise UserError(f"metric {metric!r}: another metric has {name!r} too; rename it")
        merged |= values
    return merged


def _counts(prompts: Prompts, runs: Sequence[Continuations], per_text: Mapping[str, PerText]) -> dict[str, Any]:
    texts = [text for run in runs for samples in run.texts for text in samples]
    return {
        "prompts": len(prompts.texts),
        "categories": prompts.counts(),
        "runs": len(runs),
        "samples": runs[0].ended.shape[1],
        "texts": len(texts),
        "empty": texts.count(""),
        "ended": int(sum(run.ended.sum() for run in runs)),
        "missing_scores": int(np.isnan(per_text["score"].values).sum()) if "score" in per_text else 0,
        "degenerate": text_statistics.degenerate_counts(texts),
    }


def _lines(runs: Sequence[Continuations], per_text: Mapping[str, PerText]) -> Iterator[dict[str, Any]]:
    for run, prompt, sample in itertools.product(range(len(runs)), *map(range, runs[0].ended.shape)):
        numbers = {
            name: _finite(round(float(column.values[run, prompt, sample]), column.digits))
            for name, column in per_text.items()
        }
        yield {
            "run": run,
            "prompt": prompt,
            "sample": sample,
            "text": runs[run].texts[prompt][sample],
            "ended": bool(runs[run].ended[prompt, sample]),
            "score": None,
            "perplexity": None,
            **numbers,
        }


def _finite(value: Any) -> Any:
    """The value with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The main numbers: means over runs."""
    means = {
        quantity.key: cell.mean
        for quantity, cell in cells(metrics).items()
        if quantity.in_table or quantity.group == categories.EVERYTHING
    }
    return {**means, "texts": metrics["counts"]["texts"]}


def describe(metrics: Mapping[str, Any]) -> str:
    """The headline in a few lines, with the counts behind it."""
    model, counts, numbers = metrics["model"], metrics["counts"], headline(metrics)
    name = model["name"] if model["form"] == "original" else f"{model['name']} {model['form']}"
    by_category = ", ".join(f"{category or 'none'} {count}" for category, count in counts["categories"].items())
    left_out = f"; {counts['missing_scores']} without a score, left out" if counts["missing_scores"] else ""
    lines = [
        f"{name}: {counts['texts']} texts, {counts['runs']} runs x {counts['samples']} samples x "
        f"{counts['prompts']} prompts ({by_category}); {counts['empty']} empty{left_out}",
        "  " + "  ".join(f"{key} {value:.4g}" for key, value in numbers.items() if key != "texts"),
    ]
    lines += [f"  {note}" for name in measured(metrics) for note in get(name).notes(metrics[name])]
    return "\n".join(lines)
