"""Evaluated models side by side: every number with its change from the model as published.

A change is in percent with a paired 95 % interval: both models answer the same prompts, so prompts are resampled
together. Where two evaluations did not ask the same thing in the same way, no change is given. What the numbers are,
and what their intervals come from, the metrics themselves say (`evaluation.metrics`).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import bootstrap, categories
from unidetox_jax.evaluation.metrics import Cell, Quantity, get, measured
from unidetox_jax.evaluation.metrics import cells as cells_of

ORIGINAL, DETOXIFIED, CONTROL = "original", "detoxified", "control"
FORMS = {ORIGINAL: "as published", DETOXIFIED: "detoxified", CONTROL: "samples-only control"}
RESAMPLES, SEED = 2000, 0


def title(form: str) -> str:
    """A form in words; one that the configuration named stands as it is named."""
    return FORMS.get(form, form.replace("_", " "))


def in_order(forms: Iterable[str]) -> list[str]:
    """Each form once: those that every configuration has first, then the others by name."""
    forms = set(forms)
    return [form for form in FORMS if form in forms] + sorted(forms - FORMS.keys())


Change = Mapping[str, Any]  # "percent", "low", "high"


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What `unidetox evaluate` wrote for one model: metrics.json and per_prompt.npz (see `stages/evaluate.py`)."""

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
    """The evaluation in a directory. Raises UserError where a file of it is not as `unidetox evaluate` writes it."""
    try:
        metrics = json.loads((directory / "metrics.json").read_text())
        with (directory / "per_prompt.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Evaluation(metrics, dict(arrays), directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: not an evaluation ({error}); remove it and run `unidetox evaluate`") from None


@dataclasses.dataclass(frozen=True)
class Row:
    """One model in one form, and its numbers by quantity key, those that are not in the table as well."""

    name: str
    form: str
    cells: Mapping[str, Cell]
    evaluation: Evaluation


def quantities(evaluations: Sequence[Evaluation]) -> list[Quantity]:
    """What at least one evaluation measured and the table shows, in its order."""
    return [quantity for quantity in _every_quantity(evaluations) if quantity.in_table]


def rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """A row for each evaluation, in the given order, with changes from the same model as published."""
    originals = {one.name: one for one in evaluations if one.form == ORIGINAL}
    made = []
    for one in evaluations:
        before = originals.get(one.name) if one.form != ORIGINAL else None
        cells = {}
        counts = {name: one.metrics["counts"][name] for name in ("prompts", "texts")}
        for quantity, cell in cells_of(one.metrics).items():
            if quantity.per_prompt and cell.prompts is None:
                cell = dataclasses.replace(cell, **counts)
            if before is not None and quantity.in_table and comparable(before, one):
                cell = dataclasses.replace(cell, change=change(before, one, quantity))
            cells[quantity.key] = cell
        made.append(Row(one.name, one.form, cells, one))
    return made


def comparable(one: Evaluation, other: Evaluation) -> bool:
    """Whether both were asked the same prompts, as often, and judged by the same scorer with the same content."""
    same = ("scorer", "prompt_source", "groups")
    counted = ("prompts", "samples", "runs")
    contents = {one.metrics.get("scorer_hash", ""), other.metrics.get("scorer_hash", "")} - {""}
    return (
        len(contents) < 2
        and all(one.metrics[key] == other.metrics[key] for key in same)
        and all(one.metrics["counts"][key] == other.metrics["counts"][key] for key in counted)
        and one.categories == other.categories
    )


def change(before: Evaluation, after: Evaluation, quantity: Quantity) -> Change | None:
    """The change in percent; None where either lacks the quantity, it was 0 before, or they do not compare."""
    sides = (before, after)
    first, second = (cells_of(one.metrics).get(quantity) for one in sides)
    if first is None or second is None or any(before.metrics[key] != after.metrics[key] for key in quantity.same):
        return None
    arrays = [name for name in (quantity.per_prompt, quantity.weights) if name]
    if not arrays or not all(name in one.per_prompt for one in sides for name in arrays):
        return bootstrap.change(np.array([first.mean, second.mean]))
    return _paired(before, quantity, *(np.stack([one.per_prompt[name] for one in sides]) for name in arrays))


def pooled_change(pairs: Sequence[tuple[Evaluation, Evaluation]]) -> dict[str, Change]:
    """Quantity key → the change of the mean model: each prompt's value is the mean over the pairs' models, and prompts
    are resampled as for one model. Only pairs that are comparable with the first count, and only quantities that are
    means over prompts."""
    pairs = [pair for pair in pairs if comparable(pairs[0][0], pair[0]) and comparable(*pair)]
    changes = {}
    for quantity in _every_quantity([pairs[0][0]] if pairs else []):
        name = quantity.per_prompt
        if name and not quantity.weights and all(name in one.per_prompt for pair in pairs for one in pair):
            values = np.stack([np.mean([pair[side].per_prompt[name] for pair in pairs], axis=0) for side in (0, 1)])
            changes[quantity.key] = _paired(pairs[0][0], quantity, values)
    return {key: value for key, value in changes.items() if value is not None}


def _paired(asked: Evaluation, quantity: Quantity, values: np.ndarray, weights: np.ndarray | None = None):
    """From values [2, P]; `asked` says which prompts they are of."""
    strata = categories.strata(asked.categories, asked.metrics["groups"]).get(quantity.group)
    return bootstrap.change(*bootstrap.resample(values, RESAMPLES, SEED, strata, weights))


def _every_quantity(evaluations: Sequence[Evaluation]) -> list[Quantity]:
    """In the order of the metrics, whichever evaluation has which."""
    names = measured({name: summary for one in evaluations for name, summary in one.metrics.items() if summary})
    summaries = [(name, one.metrics[name]) for name in names for one in evaluations if one.metrics.get(name)]
    return list(dict.fromkeys(quantity for name, summary in summaries for quantity in get(name).cells(summary)))


def beyond_chance(change: Change) -> int:
    """−1: fell, +1: rose, 0: the interval holds 0, or there is none."""
    if change["low"] is None or change["low"] <= 0 <= change["high"]:
        return 0
    return 1 if change["low"] > 0 else -1


def pairs(evaluations: Sequence[Evaluation], one: str, other: str) -> list[tuple[Evaluation, Evaluation]]:
    """The models that were evaluated in both forms, comparably."""
    by_form = {form: {e.name: e for e in evaluations if e.form == form} for form in (one, other)}
    both = [(by_form[one][name], by_form[other][name]) for name in by_form[one] if name in by_form[other]]
    return [pair for pair in both if comparable(*pair)]


def category_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """The categories that have prompts, in distribution first."""
    names = [name for one in evaluations for name in one.metrics["counts"]["categories"]]
    return categories.in_order(names, evaluations[0].metrics["groups"]) if evaluations else []
