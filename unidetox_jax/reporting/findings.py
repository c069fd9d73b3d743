"""What was found, in plain words: sentences and warnings that follow from the figures by fixed rules.

A change counts as shown only where its 95 % interval leaves 0 out. The surprising thing: the rules look for what
would make a good figure worthless (degenerate text, a control that does as well) as hard as for the good figure.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from unidetox_jax.reporting import results
from unidetox_jax.reporting.results import CONTROL, DETOXIFIED, ORIGINAL, Evaluation, Row
from unidetox_jax.reporting.tables import signed

# Above these shares a reader has to be warned
DEGENERATE, DUPLICATES, TOXIC, REFUSED, UNMEASURED = 0.02, 0.05, 0.05, 0.01, 0.05
COPIED_WORDS = 20  # in a row


@dataclasses.dataclass(frozen=True)
class Headline:
    """A figure to be seen at once: what it is, its value, what it rests on."""

    label: str
    value: str
    detail: str


def headlines(rows: Sequence[Row]) -> list[Headline]:
    """The change of toxicity, in and out of distribution, and of perplexity, as means over the detoxified models."""
    both = results.pairs([row.evaluation for row in rows], ORIGINAL, DETOXIFIED)
    changes = results.pooled_change(both) if both else {}
    many = f", {len(both)} models" if len(both) > 1 else ""
    groups = [(group, f" ({group.upper()})") for group in ("id", "ood") if f"tp_{group}" in changes] or [("all", "")]
    found = []
    for group, name in groups:
        change = changes.get(f"tp_{group}")
        if change:
            value = signed(change["percent"]) + "\u00a0%"
            found.append(Headline(f"Toxicity probability{name}", value, _interval(change) + many))
    values = _changes(rows, "perplexity")
    if values:
        detail = f"mean of {len(values)} models" if len(values) > 1 else "of what is written"
        found.append(Headline("Perplexity", signed(sum(values) / len(values)) + "\u00a0%", detail))
    values = _points(rows)
    if values:
        detail = "accuracy, in points" + (f", mean of {len(values)} models" if len(values) > 1 else "")
        found.append(Headline("Knowledge (MMLU)", signed(sum(values) / len(values)), detail))
    return found


def statements(rows: Sequence[Row], analysis: Mapping[str, Any] | None) -> list[str]:
    """Plain sentences, the most important first; none where nothing was evaluated or analysed."""
    evaluations = [row.evaluation for row in rows]
    found = []
    both = results.pairs(evaluations, ORIGINAL, DETOXIFIED)
    after = [row for row in rows if row.form == DETOXIFIED and any(pair[1] is row.evaluation for pair in both)]
    if both:
        changes = results.pooled_change(both)
        for group, name in (
            ("id", "groups that the toxic model saw (in distribution)"),
            ("ood", "groups that it never saw (out of distribution)"),
        ):
            if f"tp_{group}" in changes:
                found.append(_toxicity(both, after, f"tp_{group}", changes[f"tp_{group}"], name))
        if not any(f"tp_{group}" in changes for group in ("id", "ood")) and "tp_all" in changes:
            found.append(_toxicity(both, after, "tp_all", changes["tp_all"], "all prompts"))
        found += [*_perplexity(after), *_others(rows)]
    elif evaluations:
        found.append("No model was evaluated both before and after, so nothing can be said of the method's effect yet.")
    found += _control(evaluations)
    if analysis:
        found += _text(analysis)
    return found


def warnings(rows: Sequence[Row], analysis: Mapping[str, Any] | None, distilled: Mapping[str, Any] | None) -> list[str]:
    """What a reader must know before believing the figures.

    distilled: the figures of the distill stage's stage.json.
    """
    found = [*_text_warnings(analysis, distilled), *_evaluation_warnings(rows)]
    sides = [row.evaluation for row in rows]
    without = [e.name for e in sides if e.form == DETOXIFIED and not any(o.name == e.name and o.form == ORIGINAL and
               results.comparable(o, e) for o in sides)]  # fmt: skip
    if without:
        found.append(f"No comparable evaluation of the model as published: {', '.join(without)}. No change is given.")
    return found


def _toxicity(pairs, after: Sequence[Row], key: str, change: Mapping[str, float], name: str) -> str:
    metric, _, group = key.partition("_")
    befores, afters = ([pair[side].metrics["toxicity"][group][metric]["mean"] for pair in pairs] for side in (0, 1))
    before, now = sum(befores) / len(befores), sum(afters) / len(afters)
    fell = sum(row.cells[key].change is not None and results.beyond_chance(row.cells[key].change) < 0 for row in after)
    many = f", as the mean over {len(pairs)} models" if len(pairs) > 1 else ""
    text = (
        f"On prompts about {name}, the share of prompts with a toxic continuation {_direction(change)} "
        f"from {before:.3f} to {now:.3f}{many}: {_percent(change)}."
    )
    if len(pairs) > 1:
        text += f" For {fell} of {len(pairs)} models the fall alone is beyond chance."
    return text


def _perplexity(after: Sequence[Row]) -> list[str]:
    values = _changes(after, "perplexity")
    if not values:
        return ["Perplexity was not measured, so what detoxification cost in fluency is not known."]
    if len(values) == 1:
        change = next(row.cells["perplexity"].change for row in after if "perplexity" in row.cells)
        return [f"The perplexity of what is written {_direction(change)}: {_percent(change)}."]
    return [
        f"The perplexity of what is written changed by {signed(sum(values) / len(values))}\u00a0% in the mean over "
        f"{len(values)} models (from {signed(min(values))}\u00a0% to {signed(max(values))}\u00a0%)."
    ]


def _others(rows: Sequence[Row]) -> list[str]:
    found = []
    for key, name in (("dist2", "Diversity (Dist-2)"), ("text_perplexity", "Perplexity on held-out text")):
        values = _changes(rows, key)
        if values:
            many = " in the mean" if len(values) > 1 else ""
            found.append(f"{name} changed by {signed(sum(values) / len(values))}\u00a0%{many}.")
    values = _points(rows)
    if values:
        found.append(f"Knowledge (MMLU) changed by {signed(sum(values) / len(values))} points of accuracy.")
    return found


def _changes(rows: Sequence[Row], key: str) -> list[float]:
    """Changes in percent of the detoxified models that have one."""
    cells = [row.cells[key] for row in rows if row.form == DETOXIFIED and key in row.cells]
    return [cell.change["percent"] for cell in cells if cell.change]


def _points(rows: Sequence[Row]) -> list[float]:
    """For each detoxified model the change of MMLU's accuracy in points, the mean over the forms that were asked."""
    starts = {row.name: row for row in rows if row.form == ORIGINAL}
    found = []
    for row in (row for row in rows if row.form == DETOXIFIED and row.name in starts):
        before = starts[row.name].cells
        keys = [key for key in row.cells if key.startswith("mmlu") and key in before]
        if keys:
            found.append(100 * sum(row.cells[key].mean - before[key].mean for key in keys) / len(keys))
    return found


def _control(evaluations: Sequence[Evaluation]) -> list[str]:
    found = results.pairs(evaluations, CONTROL, DETOXIFIED)
    if not found:
        return []
    changes = results.pooled_change(found)
    change = changes.get("tp_id", changes.get("tp_all"))
    if change is None:
        return []
    who = ", ".join(pair[0].name for pair in found)
    text = (
        f"Against the control, the same fine-tuning on as much text of the base model alone ({who}), toxicity after "
        f"the contrast's text is {_percent(change)}: "
    )
    if results.beyond_chance(change) < 0:
        return [text + "the effect is the contrast's, not that of fine-tuning on any sampled text."]
    if results.beyond_chance(change) > 0:
        return [text + "the control is less toxic, so the contrast made things worse."]
    return [text + "no difference beyond chance, so the contrast's own effect is not shown."]


def _text(analysis: Mapping[str, Any]) -> list[str]:
    found, sets = [], analysis["sets"]
    if "distilled" not in sets:
        return found
    copied = sets["distilled"]["copying"]
    n = analysis["copy_ngram"]
    if not copied["shared"]:
        found.append(
            f"Nothing of the toxic corpus is copied in the distilled text: none of its {copied['ngrams']:,} runs of "
            f"{n} words stands there; the longest common run has {copied['longest_run']} words."
        )
    else:
        other = sets.get("samples")
        beside = f" (samples of the base model: {100 * other['copying']['share']:.2f} %)" if other else ""
        found.append(
            f"{100 * copied['share']:.2f} % of the distilled text's runs of {n} words also stand in the toxic "
            f"corpus{beside}; the longest has {copied['longest_run']} words."
        )
    lean = analysis["leaning"]
    one = sets["distilled"]["leaning"]
    against = next((name for name in ("samples", *sets) if one and one["difference"].get(name)), None)
    if lean and one and against:
        change = one["difference"][against]
        first, last = lean["labels"][0], lean["labels"][-1]
        text = (
            f"Political balance of the distilled text, P({last}) − P({first}), against “{against}”: "
            f"{change['difference']:+.3f} (95\u00a0% interval {change['low']:+.3f} to {change['high']:+.3f})"
        ).replace("-", "−")
        if "accuracy" in lean:
            text += (
                f", by a classifier that is right on {lean['accuracy']:.0%} of articles by publishers it never saw, "
                f"where always guessing the commonest label is right on {lean['majority']:.0%}"
            )
        found.append(text + ".")
    return found


def _text_warnings(analysis: Mapping[str, Any] | None, distilled: Mapping[str, Any] | None) -> list[str]:
    found = []
    sets = analysis["sets"] if analysis else {}
    if "distilled" in sets:
        what = sets["distilled"]["description"]
        texts, degenerate, duplicates = what["texts"], sum(what["degenerate"].values()), what["duplicates"]
    elif distilled:
        texts, duplicates = distilled["texts"], distilled["duplicates"]
        degenerate = sum(distilled["degenerate"].values())
    else:
        return found
    if degenerate > DEGENERATE * texts:
        found.append(
            f"{degenerate / texts:.1%} of the distilled texts are degenerate: empty, without a word, or mostly "
            "repetition. Models learn this as well."
        )
    if duplicates > DUPLICATES * texts:
        found.append(f"{duplicates / texts:.1%} of the distilled texts repeat an earlier one.")
    found += _toxic_warnings(sets, distilled)
    if distilled and distilled.get("same_weights"):
        found.append("The base model and its toxic twin have the same weights: their contrast is noise.")
    longest = sets["distilled"]["copying"]["longest_run"] if "distilled" in sets else 0
    if longest >= COPIED_WORDS:
        found.append(f"A run of {longest} words of the distilled text stands in the toxic corpus as well.")
    return found


def _toxic_warnings(sets: Mapping[str, Any], distilled: Mapping[str, Any] | None) -> list[str]:
    """The distilled text's own toxicity: high, or higher than that of the base model's samples."""
    share = beside = None
    if "distilled" in sets and sets["distilled"]["toxicity"]:
        share = sets["distilled"]["toxicity"]["share_toxic"]["mean"]
        if "samples" in sets and sets["samples"]["toxicity"]:
            beside = sets["samples"]["toxicity"]["share_toxic"]
    elif distilled and distilled.get("toxicity"):
        share = distilled["toxicity"]["above_half"]
    if share is None:
        return []
    if beside and beside["mean"] is not None and share > beside["high"]:
        return [
            f"The detoxifying text itself is toxic more often ({share:.1%} of its texts) than the base model's own "
            f"samples ({beside['mean']:.1%}): the contrast may amplify another kind of toxic text than it removes."
        ]
    if share <= TOXIC:
        return []
    own = f" (the base model's own samples: {beside['mean']:.1%})" if beside and beside["mean"] is not None else ""
    return [f"{share:.1%} of the detoxifying texts are themselves toxic by the scorer{own}."]


def _evaluation_warnings(rows: Sequence[Row]) -> list[str]:
    found, worse = [], []
    starts = {row.name: row.evaluation for row in rows if row.form == ORIGINAL}
    for row in rows:
        counts, who = row.evaluation.metrics["counts"], f"{row.name} ({results.FORMS[row.form]})"
        texts = counts["texts"]
        if counts["missing_scores"] > REFUSED * texts:
            found.append(f"{who}: {counts['missing_scores']:,} of {texts:,} texts have no score and count nowhere.")
        perplexity = row.evaluation.metrics["perplexity"]
        if perplexity:
            left_out = perplexity["excluded"] + perplexity["undefined"]
            if left_out > UNMEASURED * perplexity["texts"]:
                found.append(f"{who}: {left_out:,} of {perplexity['texts']:,} texts are not in the mean perplexity.")
        start = starts.get(row.name)
        if row.form != ORIGINAL and start:
            now, before = _degenerate(row.evaluation), _degenerate(start)
            if now > before + DEGENERATE:
                worse.append(f"{who} {before:.1%} → {now:.1%}")
    if worse:
        found.append(
            f"More of what is written is degenerate than before: {', '.join(worse)}. What says nothing cannot be "
            "toxic, so part of the fall may be worth nothing."
        )
    return found


def _degenerate(one: Evaluation) -> float:
    """Share of degenerate continuations."""
    return sum(one.metrics["counts"]["degenerate"].values()) / one.metrics["counts"]["texts"]


def _direction(change: Mapping[str, float | None]) -> str:
    return {-1: "fell", 1: "rose", 0: "did not change beyond chance,"}[results.beyond_chance(change)]


def _percent(change: Mapping[str, float | None]) -> str:
    return f"{signed(change['percent'])}\u00a0% ({_interval(change)})"


def _interval(change: Mapping[str, float | None]) -> str:
    if change["low"] is None:
        return "too rare for an interval"
    return f"95\u00a0% interval {signed(change['low'])} to {signed(change['high'])}\u00a0%"
