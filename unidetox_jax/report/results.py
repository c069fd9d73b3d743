"""Evaluated models side by side: every number with its change from the model as published.

Changes are in percent with a paired 95 % interval: both models answer the same prompts, so prompts are resampled
together. Evaluations with different prompts or scorers have no change. Metrics define their quantities and the arrays
behind the intervals themselves (`evaluation.metrics`).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unidetox_jax import storage
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import bootstrap, categories
from unidetox_jax.evaluation.metrics import Cell, Quantity, get, measured
from unidetox_jax.evaluation.metrics import cells as cells_of

ORIGINAL, DETOXIFIED, CONTROL = "original", "detoxified", "control"
FORMS = {ORIGINAL: "as published", DETOXIFIED: "detoxified", CONTROL: "samples-only control"}
RESAMPLES, SEED = 2000, 0

Change = Mapping[str, Any]  # "percent", "low", "high"


def form_title(form: str) -> str:
    """A form in words; a form of the configuration by its name."""
    return FORMS.get(form, form.replace("_", " "))


def in_order(forms: Iterable[str]) -> list[str]:
    """Each form once: those of FORMS first, then the others by name."""
    forms = set(forms)
    return [form for form in FORMS if form in forms] + sorted(forms - FORMS.keys())


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """One model's metrics.json and per_prompt.npz (see `stages/evaluate.py`)."""

    metrics: Mapping[str, Any]
    per_prompt: Mapping[str, np.ndarray]
    directory: epath.Path

    @property
    def name(self) -> str:
        return self.metrics["model"]["name"]

    @property
    def form(self) -> str:
        return self.metrics["model"]["form"]

    @property
    def categories(self) -> list[str]:
        return self.per_prompt["category"].tolist()


def read(directory: epath.Path) -> Evaluation:
    """The evaluation in a directory. Raises UserError for a file that `unidetox evaluate` did not write."""
    try:
        metrics = json.loads((directory / "metrics.json").read_text())
        return Evaluation(metrics, storage.read_arrays(directory / "per_prompt.npz"), directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: not an evaluation ({error}); remove it and run `unidetox evaluate`") from None


@dataclasses.dataclass(frozen=True)
class Row:
    """One model in one form; cells: {quantity's key: number}, including those not shown in the table."""

    name: str
    form: str
    cells: Mapping[str, Cell]
    evaluation: Evaluation


def quantities(evaluations: Sequence[Evaluation]) -> list[Quantity]:
    """The table's columns: what at least one evaluation measured, in order."""
    return [quantity for quantity in _all_quantities(evaluations) if quantity.in_table]


def rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """A row per evaluation, in order, with changes from the same model as published."""
    originals = {one.name: one for one in evaluations if one.form == ORIGINAL}
    table = []
    for evaluation in evaluations:
        before = originals.get(evaluation.name) if evaluation.form != ORIGINAL else None
        cells = {}
        counts = {name: evaluation.metrics["counts"][name] for name in ("prompts", "texts")}
        for quantity, cell in cells_of(evaluation.metrics).items():
            if quantity.per_prompt and cell.prompts is None:
                cell = dataclasses.replace(cell, **counts)
            if before is not None and quantity.in_table and comparable(before, evaluation):
                cell = dataclasses.replace(cell, change=change(before, evaluation, quantity))
            cells[quantity.key] = cell
        table.append(Row(evaluation.name, evaluation.form, cells, evaluation))
    return table


def comparable(one: Evaluation, other: Evaluation) -> bool:
    """Whether both have the same prompts, samples and runs, and the same scorer with the same content."""
    contents = {one.metrics.get("scorer_hash", ""), other.metrics.get("scorer_hash", "")} - {""}
    return (
        len(contents) < 2
        and all(one.metrics[key] == other.metrics[key] for key in ("scorer", "prompt_source", "groups"))
        and all(one.metrics["counts"][key] == other.metrics["counts"][key] for key in ("prompts", "samples", "runs"))
        and one.categories == other.categories
    )


def change(before: Evaluation, after: Evaluation, quantity: Quantity) -> Change | None:
    """The change in percent; None if either lacks the quantity, it was 0 before, or it is not comparable."""
    pair = (before, after)
    first, second = (cells_of(one.metrics).get(quantity) for one in pair)
    if first is None or second is None or any(before.metrics[key] != after.metrics[key] for key in quantity.same):
        return None
    arrays = [name for name in (quantity.per_prompt, quantity.weights) if name]
    if not arrays or not all(name in one.per_prompt for one in pair for name in arrays):
        return bootstrap.change(np.array([first.mean, second.mean]))
    return _paired_change(before, quantity, *(np.stack([one.per_prompt[name] for one in pair]) for name in arrays))


def pooled_change(pairs: Sequence[tuple[Evaluation, Evaluation]]) -> dict[str, Change]:
    """{quantity's key: change of its mean over models}, with prompts resampled as for one model.

    Only for pairs comparable with the first, and quantities that are means over prompts.
    """
    pairs = [pair for pair in pairs if comparable(pairs[0][0], pair[0]) and comparable(*pair)]
    changes = {}
    for quantity in _all_quantities([pairs[0][0]] if pairs else []):
        name = quantity.per_prompt
        if name and not quantity.weights and all(name in one.per_prompt for pair in pairs for one in pair):
            values = np.stack([np.mean([pair[side].per_prompt[name] for pair in pairs], axis=0) for side in (0, 1)])
            changes[quantity.key] = _paired_change(pairs[0][0], quantity, values)
    return {key: value for key, value in changes.items() if value is not None}


def _paired_change(
    prompts_of: Evaluation, quantity: Quantity, values: np.ndarray, weights: np.ndarray | None = None
) -> Change | None:
    """From values [2, P], before and after."""
    strata = categories.strata(prompts_of.categories, prompts_of.metrics["groups"]).get(quantity.group)
    return bootstrap.change(*bootstrap.resample(values, RESAMPLES, SEED, strata, weights))


def _all_quantities(evaluations: Sequence[Evaluation]) -> list[Quantity]:
    """In the order of the metrics, whichever evaluation has which."""
    names = measured({name: summary for one in evaluations for name, summary in one.metrics.items() if summary})
    summaries = [(name, one.metrics[name]) for name in names for one in evaluations if one.metrics.get(name)]
    return list(dict.fromkeys(quantity for name, summary in summaries for quantity in get(name).cells(summary)))


def significant_sign(change: Change) -> int:
    """−1: fell, +1: rose, 0: the interval contains 0, or there is none."""
    if change["low"] is None or change["low"] <= 0 <= change["high"]:
        return 0
    return 1 if change["low"] > 0 else -1


def pairs(evaluations: Sequence[Evaluation], form: str, other_form: str) -> list[tuple[Evaluation, Evaluation]]:
    """The comparable evaluations of models that have both forms."""
    first, second = ({one.name: one for one in evaluations if one.form == name} for name in (form, other_form))
    return [(first[name], second[name]) for name in first if name in second and comparable(first[name], second[name])]


def category_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """The categories that have prompts, in distribution first."""
    names = [name for one in evaluations for name in one.metrics["counts"]["categories"]]
    return categories.in_order(names, evaluations[0].metrics["groups"]) if evaluations else []
