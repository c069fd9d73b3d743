"""Evaluated models side by side: every figure with its change from the model as published.

A change is in percent with a paired 95 % interval: both models answer the same prompts, so prompts are resampled
together. Where two evaluations did not ask the same thing in the same way, no change is given.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unidetox_jax.evaluation import toxicity

ORIGINAL, DETOXIFIED, CONTROL = "original", "detoxified", "control"
FORMS = {ORIGINAL: "as published", DETOXIFIED: "detoxified", CONTROL: "samples-only control"}
RESAMPLES, SEED = 2000, 0
EXPLANATIONS = {
    "tp": "TP: share of prompts with at least one continuation that the scorer calls toxic.",
    "emt": "EMT: mean over prompts of the highest score of a continuation.",
    "perplexity": "Perplexity: of the continuations, under the scorer model.",
    "text": "Perplexity of text: of held-out text, under the model itself.",
    "dist": "Dist-n: share of distinct n-grams among a prompt's continuations.",
    "mmlu": "MMLU: accuracy on questions of knowledge.",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What `unidetox evaluate` wrote for one model: metrics.json and per_prompt.npz (see `stages/evaluate.py`)."""

    metrics: Mapping[str, Any]
    per_prompt: Mapping[str, np.ndarray]

    @property
    def name(self) -> str:
        return self.metrics["model"]["name"]

    @property
    def form(self) -> str:
        return self.metrics["model"]["form"]

    @property
    def categories(self) -> list[str]:
        return self.per_prompt["category"].tolist()


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A column of the table.

    key: its name in results.csv. less_is_better: None where neither is. primary: in every table, not only in the whole
    one. explanation: a sentence for readers who do not know it.
    """

    key: str
    title: str
    less_is_better: bool | None
    digits: int = 3
    primary: bool = True
    explanation: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure of one model. mean, sd (over runs), low, high (95 %): None where they were not measured.

    change: {"percent", "low", "high"} from the model as published; None for that model itself and where it cannot be
    had. low and high are None where the change has no interval.
    """

    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    change: Mapping[str, float | None] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One model in one form, and its figures by quantity key."""

    name: str
    form: str
    cells: Mapping[str, Cell]
    evaluation: Evaluation


def quantities(evaluations: Sequence[Evaluation]) -> list[Quantity]:
    """What at least one evaluation measured, in the table's order."""
    parts = {part for one in evaluations for part in one.metrics["toxicity"]}
    groups = [(group, title) for group, title in (("id", "ID"), ("ood", "OOD")) if group in parts] or [("all", "all")]
    found = [
        Quantity(f"{metric}_{group}", f"{metric.upper()} ({title})", True, 3, metric == "tp", EXPLANATIONS[metric])
        for group, title in groups
        for metric in toxicity.METRICS
    ]
    if any((one.metrics["perplexity"] or {}).get("mean") is not None for one in evaluations):
        found.append(Quantity("perplexity", "Perplexity", True, 2, explanation=EXPLANATIONS["perplexity"]))
    if any(one.metrics["text_perplexity"] for one in evaluations):
        found.append(Quantity("text_perplexity", "Perplexity of text", True, 2, explanation=EXPLANATIONS["text"]))
    orders = dict.fromkeys(order for one in evaluations for order in one.metrics["diversity"] if order[:4] == "dist")
    found += [Quantity(order, f"Dist-{order[4:]}", False, 3, False, EXPLANATIONS["dist"]) for order in orders]
    specs = dict.fromkeys(spec for one in evaluations for spec in one.metrics["mmlu"])
    found += [
        Quantity(f"mmlu_{spec}", f"MMLU {spec.replace(':', ' ')}-shot", False, explanation=EXPLANATIONS["mmlu"])
        for spec in specs
    ]
    return found


def rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """A row for each evaluation, in the given order, with changes from the same model as published."""
    originals = {one.name: one for one in evaluations if one.form == ORIGINAL}
    keys = [quantity.key for quantity in quantities(evaluations)]
    found = []
    for one in evaluations:
        before = originals.get(one.name) if one.form != ORIGINAL else None
        changes = change(before, one) if before is not None and comparable(before, one) else {}
        cells = {}
        for key in keys:
            figure = _figure(one.metrics, key)
            if figure is not None and figure.get("mean") is not None:
                numbers = {field: figure.get(field) for field in ("mean", "sd", "low", "high")}
                cells[key] = Cell(**numbers, change=changes.get(key))
        found.append(Row(one.name, one.form, cells, one))
    return found


def comparable(one: Evaluation, other: Evaluation) -> bool:
    """Whether both were asked the same prompts, as often, and judged by the same scorer."""
    same = ("scorer", "prompt_source", "groups")
    counted = ("prompts", "samples", "runs")
    return (
        all(one.metrics[key] == other.metrics[key] for key in same)
        and all(one.metrics["counts"][key] == other.metrics["counts"][key] for key in counted)
        and one.categories == other.categories
    )


def change(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float | None]]:
    """Quantity key → the change in percent; quantities that either lacks, or that were 0 before, are left out."""
    sides = [{metric: one.per_prompt[metric] for metric in toxicity.METRICS} for one in (before, after)]
    result = _toxicity_change(*sides, before)
    if before.metrics["perplexity_scorer"] == after.metrics["perplexity_scorer"] and all(
        "perplexity_sum" in one.per_prompt for one in (before, after)
    ):
        sums, counts = (
            np.stack([one.per_prompt[f"perplexity_{part}"] for one in (before, after)]) for part in ("sum", "count")
        )
        result["perplexity"] = ratio_change(sums, counts)
    for order in (key for key in before.per_prompt if key[:4] == "dist" and key in after.per_prompt):
        values = np.stack([one.per_prompt[order] for one in (before, after)])
        there = np.isfinite(values)
        result[order] = ratio_change(np.where(there, values, 0.0), there)
    for key in ("text_perplexity", *(f"mmlu_{spec}" for spec in before.metrics["mmlu"])):
        figures = [_figure(one.metrics, key) for one in (before, after)]
        if all(figures) and figures[0]["mean"]:
            percent = 100 * (figures[1]["mean"] / figures[0]["mean"] - 1)
            result[key] = {"percent": percent, "low": None, "high": None}
    return _finite(result)


def beyond_chance(change: Mapping[str, float | None]) -> int:
    """−1: fell, +1: rose, 0: the interval holds 0, or there is none."""
    if change["low"] is None or change["low"] <= 0 <= change["high"]:
        return 0
    return 1 if change["low"] > 0 else -1


def _finite(changes: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Without changes from 0, and without intervals that reach one (a rare thing is absent from some resamples)."""
    found = {}
    for key, value in changes.items():
        bounded = value["low"] is not None and np.isfinite([value["low"], value["high"]]).all()
        if np.isfinite(value["percent"]):
            found[key] = {**value} if bounded else {"percent": value["percent"], "low": None, "high": None}
    return found


def ratio_change(sums: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """The change in percent of Σ sums / Σ counts from the first row to the second, both [2, P], over P prompts that
    are resampled together: {"percent", "low", "high"}."""
    prompts = sums.shape[1]
    generator = np.random.default_rng(SEED)
    drawn = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        before, after = sums.sum(axis=1) / counts.sum(axis=1)
        many = (drawn @ sums.T) / (drawn @ counts.T)
        spread = 100 * (many[:, 1] / many[:, 0] - 1)
        percent = float(100 * (after / before - 1))
    if not np.isfinite(spread).all():
        return {"percent": percent, "low": None, "high": None}
    return {"percent": percent, **toxicity.interval(spread)}


def pooled_change(pairs: Sequence[tuple[Evaluation, Evaluation]]) -> dict[str, dict[str, float]]:
    """The change of TP and EMT of the mean model: each prompt's value is the mean over the pairs' models, and prompts
    are resampled as for one model. Only pairs that are comparable with the first count."""
    pairs = [pair for pair in pairs if comparable(pairs[0][0], pair[0]) and comparable(*pair)]
    if not pairs:
        return {}
    sides = [
        {metric: np.mean([pair[side].per_prompt[metric] for pair in pairs], axis=0) for metric in toxicity.METRICS}
        for side in (0, 1)
    ]
    return _finite(_toxicity_change(*sides, pairs[0][0]))


def _toxicity_change(before, after, asked: Evaluation) -> dict[str, dict[str, float]]:
    """`toxicity.change` by quantity key; `asked` says which prompts they are."""
    with np.errstate(invalid="ignore"):  # resamples without a toxic text before: infinite, and sorted out after
        found = toxicity.change(before, after, asked.categories, asked.metrics["groups"], RESAMPLES, SEED)
    return {f"{metric}_{group}": value for group, of in found.items() for metric, value in of.items()}


def pairs(evaluations: Sequence[Evaluation], one: str, other: str) -> list[tuple[Evaluation, Evaluation]]:
    """The models that were evaluated in both forms, comparably."""
    by_form = {form: {e.name: e for e in evaluations if e.form == form} for form in (one, other)}
    found = [(by_form[one][name], by_form[other][name]) for name in by_form[one] if name in by_form[other]]
    return [pair for pair in found if comparable(*pair)]


def category_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """The categories that have prompts, in distribution first."""
    groups = [evaluations[0].metrics["groups"][group] for group in ("id", "ood")]
    named = [name for group in groups for name in group]
    present = dict.fromkeys(name for one in evaluations for name in one.metrics["counts"]["categories"] if name)
    return [name for name in named if name in present] + [name for name in present if name not in named]


def _figure(metrics: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The figure behind a quantity's key; None where it was not measured."""
    kind, _, rest = key.partition("_")
    if kind in toxicity.METRICS:
        return metrics["toxicity"].get(rest, {}).get(kind)
    if key == "text_perplexity":
        return {"mean": metrics[key]["ppl"]} if metrics[key] else None
    if kind == "mmlu":
        found = metrics["mmlu"].get(rest)
        return {"mean": found["accuracy"], **_normal(found)} if found else None
    return metrics["diversity"].get(key) if kind[:4] == "dist" else metrics[key]


def _normal(found: Mapping[str, Any]) -> dict[str, float]:
    """A 95 % interval from a standard error."""
    return {"low": found["accuracy"] - 1.96 * found["stderr"], "high": found["accuracy"] + 1.96 * found["stderr"]}
