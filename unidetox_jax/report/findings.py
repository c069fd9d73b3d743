"""Findings in plain sentences, and warnings, derived from the results by fixed rules.

A change counts only if its 95 % interval excludes 0. Warnings cover what would make a good result worthless, such as
degenerate text or a control that does as well.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unidetox_jax.report import results
from unidetox_jax.report.results import CONTROL, DETOXIFIED, ORIGINAL, Evaluation, Quantity, Row
from unidetox_jax.report.tables import percent, signed

# Shares from which on a warning is given
DEGENERATE, DUPLICATES, TOXIC, REFUSED, UNMEASURED = 0.02, 0.05, 0.05, 0.01, 0.05
COPIED_WORDS = 20  # in a row

PROMPTS = {  # of each measure of toxicity
    "tp_id": "prompts about groups in the toxic model's training text (in distribution)",
    "tp_ood": "prompts about groups that it never saw (out of distribution)",
    "tp_all": "all prompts",
}
INTERVALS = (
    "Intervals over prompts say what other prompts might have given in this run, not what other seeds of distillation "
    "and training would give."
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence; for the main numbers also a card with a label, the value and a detail line."""

    sentence: str
    label: str = ""
    value: str = ""
    detail: str = ""


def statements(
    rows: Sequence[Row], quantities: Sequence[Quantity], analysis: Mapping[str, Any] | None
) -> list[Finding]:
    """The findings, most important first; none without evaluation or analysis."""
    pairs = results.pairs([row.evaluation for row in rows], ORIGINAL, DETOXIFIED)
    pooled = results.pooled_change(pairs)
    findings: list[Finding | None] = []
    if pairs:
        findings += [_primary(rows, quantity, pooled) for quantity in quantities if quantity.primary]
        others = [_from_to(rows, quantity) for quantity in quantities if not quantity.primary]
        findings += [Finding(f"Also: {'; '.join(filter(None, others))}.")] if any(others) else []
        if "perplexity" not in {quantity.key for quantity in quantities}:
            findings.append(
                Finding("Perplexity was not measured, so the cost of detoxification in fluency is unknown.")
            )
    elif rows:
        findings.append(Finding("No model was evaluated both before and after, so the method's effect is unknown."))
    sentences = [*filter(None, findings), *_control(rows), *_agreement(rows)]
    if any("over prompts" in finding.sentence for finding in sentences):
        sentences.append(Finding(INTERVALS))
    if analysis and "distilled" in analysis["sets"]:
        sentences += [_copying(analysis), *_leaning(analysis)]
    return sentences


def _primary(rows: Sequence[Row], quantity: Quantity, pooled: Mapping[str, Mapping[str, Any]]) -> Finding | None:
    """A sentence and a card on the mean of the detoxified models; None if the quantity has no change."""
    before, after, changes = _before_after(rows, quantity.key)
    if not changes:
        return None
    change = changes[0] if len(changes) == 1 else pooled.get(quantity.key, _without_interval(before, after))
    has_interval = quantity.key in pooled or change["low"] is not None
    subject = quantity.title
    if quantity.key in PROMPTS:
        subject = f"On {PROMPTS[quantity.key]}, the share of prompts with a toxic continuation"
    sentence = (
        f"{subject} {_verb(change) if has_interval else 'went'} from {before:.{quantity.digits}f} to "
        f"{after:.{quantity.digits}f}{_mean_of(changes)}: {percent(change)}"
        f"{f' ({_interval(change)})' if has_interval else ''}."
    )
    if has_interval and len(changes) > 1:
        fell = sum(results.significant_sign(change) < 0 for change in changes)
        sentence += f" For {fell} of {len(changes)} models by themselves the fall is beyond chance."
    from_to = f"{before:.{quantity.digits}f} → {after:.{quantity.digits}f}{_mean_of(changes)}"
    return Finding(sentence, quantity.title, percent(change), _interval(change) if has_interval else from_to)


def _from_to(rows: Sequence[Row], quantity: Quantity) -> str:
    before, after, changes = _before_after(rows, quantity.key)
    if not changes:
        return ""
    change = percent(_without_interval(before, after))
    return f"{quantity.title} {before:.{quantity.digits}f} → {after:.{quantity.digits}f} ({change})"


def _before_after(rows: Sequence[Row], key: str) -> tuple[float, float, list[Mapping[str, Any]]]:
    """(mean before, mean after, changes) over the detoxified models that have a change."""
    originals = {row.name: row.cells for row in rows if row.form == ORIGINAL}
    detoxified = [row for row in rows if row.form == DETOXIFIED and key in row.cells]
    cells = [(originals[row.name][key], row.cells[key]) for row in detoxified if row.cells[key].change is not None]
    before, after = (sum(pair[side].mean for pair in cells) / max(1, len(cells)) for side in (0, 1))
    return before, after, [cell.change for _, cell in cells if cell.change]


def _without_interval(before: float, after: float) -> dict[str, float | None]:
    return {"percent": 100 * (after / before - 1), "low": None, "high": None}


def _mean_of(models: Sequence[Any]) -> str:
    return f", mean of {len(models)} models" if len(models) > 1 else ""


def _control(rows: Sequence[Row]) -> Iterator[Finding]:
    pairs = results.pairs([row.evaluation for row in rows], CONTROL, DETOXIFIED)
    changes = results.pooled_change(pairs)
    models = ", ".join(control.name for control, _ in pairs)
    for judge in dict.fromkeys("".join(key.partition(" by ")[1:]) for key in changes):  # "" and " by NAME"
        change = changes.get(f"tp_id{judge}", changes.get(f"tp_all{judge}"))
        if change is not None:
            conclusion = {
                -1: "in this run the effect is due to the contrast, not to fine-tuning on any sampled text",
                0: "no difference beyond chance, so the effect of the contrast itself is not shown",
                1: "in this run the control is less toxic, so the contrast made things worse",
            }[results.significant_sign(change)]
            yield Finding(
                f"Against the control, the same fine-tuning on as much text of the base model alone ({models}), "
                f"toxicity{judge} after the contrast's text is {percent(change)} ({_interval(change)}): {conclusion}."
            )


def _agreement(rows: Sequence[Row]) -> Iterator[Finding]:
    """How far scorers agree, over all evaluations."""
    by_scorers: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        for pair in (row.evaluation.metrics.get("other_scorers") or {}).get("agreement", ()):
            if pair["kappa"] is not None:
                names = (name.partition(":")[0] for name in pair["scorers"])  # the main scorer's kind
                by_scorers.setdefault(" and ".join(names), []).append(pair)
    for scorers, pairs in by_scorers.items():
        extremes = [extreme(pair["kappa"] for pair in pairs) for extreme in (min, max)]
        kappas = " to ".join(dict.fromkeys(f"{kappa:.2f}" for kappa in extremes))
        texts = sum(pair["texts"] for pair in pairs)
        yield Finding(
            f"{scorers} agree on single continuations with a Cohen's κ of {kappas.replace('-', '−')} (1: always, 0: "
            f"as often as by chance; {texts:,} texts)."
        )


def _copying(analysis: Mapping[str, Any]) -> Finding:
    copying, length = analysis["sets"]["distilled"]["copying"], analysis["copy_ngram"]
    if not copying["shared"]:
        return Finding(
            f"Nothing of the toxic corpus is copied in the distilled text: it contains none of its "
            f"{copying['ngrams']:,} runs of {length} words; the longest common run has {copying['longest_run']} words."
        )
    samples = analysis["sets"].get("samples")
    compared = f" (samples of the base model: {100 * samples['copying']['share']:.2f} %)" if samples else ""
    return Finding(
        f"{100 * copying['share']:.2f} % of the distilled text's runs of {length} words also occur in the toxic "
        f"corpus{compared}; the longest has {copying['longest_run']} words."
    )


def _leaning(analysis: Mapping[str, Any]) -> Iterator[Finding]:
    scale, own = analysis["leaning"], analysis["sets"]["distilled"]["leaning"]
    reference = next((name for name in ("samples", *analysis["sets"]) if own and own["difference"].get(name)), None)
    if not scale or not reference:
        return
    accuracy = (
        f", by a classifier that is right on {scale['accuracy']:.0%} of articles by publishers it never saw, where "
        f"always guessing the most common label is right on {scale['majority']:.0%}"
        if "accuracy" in scale
        else ""
    )
    interval = "{difference:+.3f} (95\u00a0% interval over texts {low:+.3f} to {high:+.3f})"
    difference = interval.format(**own["difference"][reference])
    yield Finding(
        f"Political balance of the distilled text, P({scale['labels'][-1]}) − P({scale['labels'][0]}), relative to "
        f"“{reference}”: {difference.replace('-', '−')}{accuracy}."
    )


def warnings(rows: Sequence[Row], analysis: Mapping[str, Any] | None, distilled: Mapping[str, Any] | None) -> list[str]:
    """What a reader must know before believing the results.

    distilled: the figures of the distill stage's stage.json.
    """
    sentences = [*_text_warnings(analysis["sets"] if analysis else {}, distilled or {}), *_evaluation_warnings(rows)]
    evaluations = [row.evaluation for row in rows]
    compared = {before.name for before, _ in results.pairs(evaluations, ORIGINAL, DETOXIFIED)}
    without_original = [row.name for row in rows if row.form == DETOXIFIED and row.name not in compared]
    if without_original:
        names = ", ".join(without_original)
        sentences.append(f"No comparable evaluation of the model as published: {names}. No change is given.")
    return sentences


def _text_warnings(sets: Mapping[str, Any], distilled: Mapping[str, Any]) -> Iterator[str]:
    """From the analysis if there is one, else from the distill stage's figures."""
    description = sets["distilled"]["description"] if "distilled" in sets else distilled
    if not description:
        return
    degenerate = sum(description["degenerate"].values()) / description["texts"]
    duplicates = description["duplicates"] / description["texts"]
    if degenerate > DEGENERATE:
        yield (
            f"{degenerate:.1%} of the distilled texts are degenerate: empty, without a word, or mostly repetition. "
            "Models learn this as well."
        )
    if duplicates > DUPLICATES:
        yield f"{duplicates:.1%} of the distilled texts repeat an earlier one."
    yield from _toxic_warnings(sets, distilled)
    if distilled.get("same_weights"):
        yield "The base model and its toxic twin have the same weights: their contrast is noise."
    longest = sets["distilled"]["copying"]["longest_run"] if "distilled" in sets else 0
    if longest >= COPIED_WORDS:
        yield f"A run of {longest} words of the distilled text also occurs in the toxic corpus."


def _toxic_warnings(sets: Mapping[str, Any], distilled: Mapping[str, Any]) -> Iterator[str]:
    """If the distilled text is toxic itself, or more than the base model's samples are."""
    both = [sets.get(name, {}) for name in ("distilled", "samples")]
    for judge in ("", *both[0].get("toxicity_by", {})):
        scored = [one.get("toxicity_by", {}).get(judge) if judge else one.get("toxicity") for one in both]
        own, samples = ((one or {}).get("share_toxic") for one in scored)
        own = own["mean"] if own else (distilled.get("toxicity") or {}).get("above_half")
        samples = samples if samples and samples["mean"] is not None else None
        by = f" by {judge}" if judge else ""
        if own is not None and samples and own > samples["high"]:
            yield (
                f"The detoxifying text itself is toxic more often ({own:.1%} of its texts{by}) than the base model's "
                f"own samples ({samples['mean']:.1%}): the contrast may amplify another kind of toxic text than it "
                "removes."
            )
        elif own is not None and own > TOXIC:
            compared = f" (the base model's own samples: {samples['mean']:.1%})" if samples else ""
            yield f"{own:.1%} of the detoxifying texts are themselves toxic{by or ' by the scorer'}{compared}."


def _evaluation_warnings(rows: Sequence[Row]) -> Iterator[str]:
    originals = {row.name: row.evaluation for row in rows if row.form == ORIGINAL}
    worse = []
    for row in rows:
        metrics, model = row.evaluation.metrics, f"{row.name} ({results.form_title(row.form)})"
        counts, perplexity = metrics["counts"], metrics["perplexity"]
        if counts["missing_scores"] > REFUSED * counts["texts"]:
            yield f"{model}: {counts['missing_scores']:,} of {counts['texts']:,} texts have no score and are left out."
        unmeasured = perplexity["excluded"] + perplexity["undefined"] if perplexity else 0
        if perplexity and unmeasured > UNMEASURED * perplexity["texts"]:
            yield f"{model}: {unmeasured:,} of {perplexity['texts']:,} texts are not in the mean perplexity."
        before = _degenerate_share(originals.get(row.name, row.evaluation))
        after = _degenerate_share(row.evaluation)
        if after > before + DEGENERATE:
            worse.append(f"{model} {before:.1%} → {after:.1%}")
    if worse:
        yield (
            f"More continuations are degenerate than before: {', '.join(worse)}. Text that says nothing cannot be "
            "toxic, so part of the fall may be worth nothing."
        )


def _degenerate_share(evaluation: Evaluation) -> float:
    return sum(evaluation.metrics["counts"]["degenerate"].values()) / evaluation.metrics["counts"]["texts"]


def _verb(change: Mapping[str, Any]) -> str:
    return {-1: "fell", 1: "rose", 0: "did not change beyond chance,"}[results.significant_sign(change)]


def _interval(change: Mapping[str, Any]) -> str:
    if change["low"] is None:
        return "too rare for an interval"
    return f"95\u00a0% interval over prompts {signed(change['low'])} to {signed(change['high'])}\u00a0%"
