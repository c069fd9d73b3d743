"""The page: one HTML file that needs nothing else, with whatever sections there is something to say in.

All text that comes from data passes through `escape`. What models wrote, and what the toxic corpus holds, is shown
behind a content warning only.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from unidetox_jax.reporting import results, tables
from unidetox_jax.reporting.findings import Headline
from unidetox_jax.reporting.results import FORMS, Quantity, Row
from unidetox_jax.reporting.style import CSS

TITLES = {
    "found": "What was found",
    "results": "Results",
    "plots": "Plots",
    "text": "The detoxifying text",
    "examples": "Examples",
    "counts": "What the numbers rest on",
    "costs": "Settings and costs",
}
WARNING = "Content warning: text that models wrote, or of a toxic corpus; it may be hateful"


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot of the page: its title, what it shows, and the `<svg>` element."""

    title: str
    caption: str
    svg: str


@dataclasses.dataclass(frozen=True)
class Content:
    """All that the page shows.

    lead: a line under the title. examples: {"prompt", "category", "texts": [{"name", "form", "text", "score"}, …]}.
    stages: stage.json records. distilled: the distill stage's figures.
    """

    title: str
    lead: str
    note: str
    headlines: Sequence[Headline]
    findings: Sequence[str]
    warnings: Sequence[str]
    quantities: Sequence[Quantity]
    rows: Sequence[Row]
    plots: Sequence[Plot]
    analysis: Mapping[str, Any] | None
    distilled: Mapping[str, Any] | None
    examples: Sequence[Mapping[str, Any]]
    stages: Sequence[Mapping[str, Any]]
    footer: str


def render(content: Content) -> str:
    """The page as one string."""
    sections = {
        "found": _found(content),
        "results": _results(content),
        "plots": _plots(content.plots),
        "text": _text(content),
        "examples": _examples(content.examples),
        "counts": _counts(content.rows),
        "costs": _costs(content.stages),
    }
    sections = {name: body for name, body in sections.items() if body}
    links = "".join(f'<a href="#{name}">{TITLES[name]}</a>' for name in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{TITLES[name]}</h2>{text}</section>'
        for name, text in sections.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(content.title)}: detoxification report</title><style>{CSS}</style></head>\n<body>"
        f'<header><div><h1>{escape(content.title)}</h1><p class="lead">{escape(content.lead)}</p></div></header>'
        f'<nav aria-label="Sections"><div>{links}</div></nav>\n<main>{body}</main>'
        f"<footer>{escape(content.footer)}</footer></body></html>\n"
    )


def _found(content: Content) -> str:
    note = f'<p class="note">{escape(content.note)}</p>' if content.note else ""
    listed = "".join(f"<li>{escape(text)}</li>" for text in content.findings)
    found = f'<ul class="findings">{listed}</ul>' if listed else "<p>Nothing has been evaluated or analysed yet.</p>"
    cards = "".join(
        f'<div class="card"><dt>{escape(one.label)}</dt>'
        f"<dd>{escape(one.value)}<small>{escape(one.detail)}</small></dd></div>"
        for one in content.headlines
    )
    cards = f'<dl class="cards">{cards}</dl>' if cards else ""
    return note + cards + _warnings(content.warnings) + found


def _warnings(texts: Sequence[str]) -> str:
    if not texts:
        return ""
    listed = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<div class="warning" role="note"><strong>Read this before the figures</strong><ul>{listed}</ul></div>'


def _results(content: Content) -> str:
    if not content.rows:
        return ""
    heads = "".join(f'<th scope="col">{escape(q.title)}{_arrow(q)}</th>' for q in content.quantities)
    bodies = []
    for name in dict.fromkeys(row.name for row in content.rows):
        lines = [
            f'<tr><th scope="row">{"" if at else escape(name)}'
            f'<small class="form {row.form}">{FORMS[row.form]}</small></th>'
            + "".join(_cell(row, quantity) for quantity in content.quantities)
            + "</tr>"
            for at, row in enumerate(row for row in content.rows if row.name == name)
        ]
        bodies.append(f'<tbody class="model">{"".join(lines)}</tbody>')
    caption = (
        "Mean ± standard deviation over runs; under it the change from the model as published in percent, with its "
        "95 % interval (paired bootstrap over prompts); bold where it leaves 0 out."
    )
    table = f'<thead><tr><th scope="col">Model</th>{heads}</tr></thead>{"".join(bodies)}'
    return _explained(content.quantities) + _scroll(caption, table, "results-table")


def _explained(quantities: Sequence[Quantity]) -> str:
    """What the columns mean."""
    keys = " ".join(quantity.key for quantity in quantities)
    parts = [
        "<b>TP</b> is the share of prompts with at least one continuation that the scorer calls toxic, <b>EMT</b> the "
        "mean over prompts of the highest score."
    ]
    if "_id" in keys:
        parts.append("<b>ID</b>: prompts about groups that the toxic model saw; <b>OOD</b>: about others.")
    if "perplexity" in keys:
        parts.append("<b>Perplexity</b> is that of the continuations under the scorer model.")
    if "dist" in keys:
        parts.append("<b>Dist-n</b> is the share of distinct n-grams.")
    return f"<p>{' '.join(parts)}</p>"


def _cell(row: Row, quantity: Quantity) -> str:
    cell = row.cells.get(quantity.key)
    if cell is None:
        return "<td>–</td>"
    change = ""
    if cell.change:
        shown = results.beyond_chance(cell.change) != 0
        percent, _, interval = tables.percent(cell.change).partition(" [")
        change = f"<small{' class=shown' if shown else ''}>{escape(percent)}</small>"
        change += f"<small>[{escape(interval)}</small>" if interval else ""
    return f"<td>{escape(tables.value(cell, quantity))}{change}</td>"


def _arrow(quantity: Quantity) -> str:
    if quantity.less_is_better is None:
        return ""
    mark, word = ("↓", "lower is better") if quantity.less_is_better else ("↑", "higher is better")
    return f' <span title="{word}" aria-label="{word}">{mark}</span>'


def _plots(plots: Sequence[Plot]) -> str:
    if not plots:
        return ""
    figures = "".join(
        f"<figure><h3>{escape(plot.title)}</h3>{plot.svg}<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot in plots
    )
    return f'<div class="plots">{figures}</div>'


# ------------------------------------------------------------------------------------------------- the text


def _text(content: Content) -> str:
    if not content.analysis:
        return _distilled_alone(content.distilled) if content.distilled else ""
    analysis = content.analysis
    sets = analysis["sets"]
    heads = ["Texts", "Words (median)", "Duplicates", "Degenerate", "Toxic", f"{analysis['copy_ngram']}-grams copied"]
    heads += ["Longest run copied"]
    rows = [
        [
            name,
            f"{one['description']['texts']:,}",
            f"{one['description']['words']['median']:.0f}",
            f"{one['description']['duplicates']:,}",
            _degenerate(one["description"]["degenerate"], one["description"]["texts"]),
            _toxic(one["toxicity"]),
            f"{100 * one['copying']['share']:.3f} %",
            f"{one['copying']['longest_run']} words",
        ]
        for name, one in sets.items()
    ]
    caption = (
        f"Sets of text side by side. Copied: word n-grams that also stand in the toxic corpus "
        f"({analysis['toxic_data']}, {analysis['toxic_texts']:,} texts)."
    )
    scorer = next((one["toxicity"]["scorer"] for one in sets.values() if one["toxicity"]), "")
    if scorer:
        caption += f" Toxic: scored above the threshold by {scorer}."
    found = _table(caption, ["Set", *heads], rows)
    found += _leaning(analysis)
    found += "<h3>Keywords</h3><p class=small>By mean TF-IDF weight: what sets each set of text apart from the others"
    found += ", or where it stands alone, what it is about.</p>"
    for name, one in sets.items():
        words = one["keywords"]["distinctive"] or one["keywords"]["frequent"]
        chips = "".join(f"<li>{escape(entry['word'])}</li>" for entry in words)
        found += f"<p class=small>{escape(name)}</p><ul class=chips>{chips}</ul>"
    return found + "".join(_nearest(name, one["nearest"]) for name, one in sets.items() if one["nearest"])


def _distilled_alone(figures: Mapping[str, Any]) -> str:
    """What the distill stage itself counted, where there is no analysis."""
    toxicity = figures.get("toxicity")
    rows = [
        ["texts", f"{figures['texts']:,}"],
        ["duplicates", f"{figures['duplicates']:,}"],
        ["degenerate", _degenerate(figures["degenerate"], figures["texts"])],
    ]
    if toxicity and toxicity["mean"] is not None:
        rows.append(["toxic, by the scorer", f"{toxicity['above_half']:.1%} (mean score {toxicity['mean']:.3f})"])
    return _table("What the distill stage counted; `unidetox analyze` would say more.", ["", ""], rows)


def _leaning(analysis: Mapping[str, Any]) -> str:
    found = analysis["leaning"]
    if not found:
        return ""
    labels = found["labels"]
    rows = [
        [name]
        + [_interval(one["leaning"]["probability"][label]) for label in labels]
        + [_interval(one["leaning"]["balance"])]
        for name, one in analysis["sets"].items()
        if one["leaning"]
    ]
    if "accuracy" in found:
        rows.append(["(a text of no known word)", *(f"{found['of_nothing'][label]:.3f}" for label in labels), ""])
        said = (
            f"By linear classifiers fitted on {found['articles']:,} labelled news articles of {found['publishers']} "
            f"publishers. On articles by publishers that they never saw they are right {found['accuracy']:.1%} of "
            f"the time ({found['accuracy_short']:.1%} on the articles' first {found['words']} words, the length of "
            f"these texts); always guessing the commonest label is right {found['majority']:.1%} of the time. With "
            "such an instrument a difference between two sets means more than the level of either."
        )
    else:
        said = f"By the classifier {found['classifier']}; its accuracy is for its makers to tell."
    caption = f"Mean probability with its 95 % interval; balance: P({labels[-1]}) − P({labels[0]})."
    return f"<h3>Political leaning</h3><p>{escape(said)}</p>" + _table(caption, ["Set", *labels, "Balance"], rows)


def _nearest(name: str, pairs: Sequence[Mapping[str, Any]]) -> str:
    rows = [[f"{pair['similarity']:.2f}", pair["sentence"], pair["corpus_sentence"]] for pair in pairs]
    table = _table("Likeness: cosine of TF-IDF vectors.", ["Likeness", "Sentence", "Toxic corpus"], rows, prose=True)
    return _behind_warning(f"Nearest sentences of the toxic corpus: {name}", table)


def _degenerate(counts: Mapping[str, int], texts: int) -> str:
    total = sum(counts.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    return f"{total / texts:.1%}" + (f" ({reasons})" if reasons else "")


def _toxic(found: Mapping[str, Any] | None) -> str:
    if not found or found["share_toxic"]["mean"] is None:
        return "–"
    share = found["share_toxic"]
    return f"{share['mean']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"


def _interval(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]".replace("-", "−")


# ---------------------------------------------------------------------------------- examples, counts, costs


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    if not examples:
        return ""
    blocks = []
    for one in examples:
        about = f' <span class="small">({escape(one["category"].replace("_", " "))})</span>' if one["category"] else ""
        texts = "".join(
            f'<p class="small"><span class="form {text["form"]}">{escape(text["name"])}, {FORMS[text["form"]]}</span>'
            f"{_score(text['score'])}</p>"
            f'<blockquote class="{text["form"]}">{escape(text["text"]) or "<em>(empty)</em>"}</blockquote>'
            for text in one["texts"]
        )
        blocks.append(f"<h3>{escape(one['prompt'])} …{about}</h3>{texts}")
    intro = (
        "<p>The first continuation of the first run, before and after, of prompts taken at even steps through each "
        "category: chosen by their place, not by what they say.</p>"
    )
    return intro + _behind_warning("Continuations before and after", "".join(blocks))


def _score(score: float | None) -> str:
    return f" · score {score:.3f}" if score is not None else " · not scored"


def _counts(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = []
    for row in rows:
        counts, perplexity = row.evaluation.metrics["counts"], row.evaluation.metrics["perplexity"]
        measured = f"{perplexity['counted']:,} of {perplexity['texts']:,}" if perplexity else "–"
        lines.append(
            [
                f"{row.name}, {FORMS[row.form]}",
                f"{counts['prompts']:,} × {counts['samples']} × {counts['runs']}",
                f"{counts['texts'] - counts['missing_scores']:,} of {counts['texts']:,}",
                measured,
                f"{counts['empty']:,}",
                _degenerate(counts["degenerate"], counts["texts"]),
            ]
        )
    first = rows[0].evaluation.metrics
    scorers = [f"Toxicity by {first['scorer']}"]
    if first["perplexity_scorer"]:
        scorers.append(f"perplexity under {first['perplexity_scorer']}")
    caption = f"{', '.join(scorers)}; prompts: {first['prompt_source']}."
    heads = ["Model", "Prompts × samples × runs", "Texts scored", "Texts in perplexity", "Empty", "Degenerate"]
    found = _table(caption, heads, lines)
    categories = results.category_names([row.evaluation for row in rows])
    if categories:
        counted = first["counts"]["categories"]
        per = ", ".join(f"{name.replace('_', ' ')} {counted.get(name, 0)}" for name in categories)
        found += f"<p class=small>Prompts of each category: {escape(per)}; of none: {counted.get('', 0)}.</p>"
    return found + _harness(rows)


def _harness(rows: Sequence[Row]) -> str:
    lines = [
        [f"{row.name}, {FORMS[row.form]}", task, metric, f"{value:.4f}" if isinstance(value, float) else str(value)]
        for row in rows
        for task, found in row.evaluation.metrics["harness"].items()
        for metric, value in found.items()
    ]
    heads = ["Model", "Task", "Metric", "Value"]
    return _table("lm-evaluation-harness", heads, lines) if lines else ""


def _costs(stages: Sequence[Mapping[str, Any]]) -> str:
    if not stages:
        return ""
    rows = [
        [
            stage["stage"],
            _duration(stage["seconds"]),
            f"{stage['figures']['tokens']:,}" if "tokens" in stage["figures"] else "–",
            stage["devices"],
            stage["finished"].replace("T", " ").removesuffix("+00:00"),
        ]
        for stage in stages
    ]
    total = sum(stage["seconds"] for stage in stages)
    caption = f"{_duration(total)} in all, of each stage's last sitting. Tokens: trained on, or generated."
    found = _table(caption, ["Stage", "Time", "Tokens", "Device", "Finished (UTC)"], rows)
    for stage in stages:
        shown = {key: stage[key] for key in ("settings", "figures", "inputs", "versions")}
        text = escape(json.dumps(shown, indent=1, ensure_ascii=False))
        found += (
            f'<details><summary>{escape(stage["stage"])}</summary><div class="inside"><pre>{text}</pre></div></details>'
        )
    return found


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ----------------------------------------------------------------------------------------------- small parts


def _behind_warning(title: str, body: str) -> str:
    return (
        f'<details class="content"><summary>{escape(title)} <span class="small">— {WARNING}</span></summary>'
        f'<div class="inside">{body}</div></details>'
    )


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], prose: bool = False) -> str:
    """A table whose first column names the rows; all text is escaped here. prose: columns of sentences."""
    head = "".join(f'<th scope="col"{" class=words" if prose else ""}>{escape(text)}</th>' for text in heads)
    cell = '<td class="prose">' if prose else "<td>"
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"{cell}{escape(text)}</td>" for text in row[1:])}</tr>'
        for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(heads) else ""
    return _scroll(escape(caption), f"{head}<tbody>{lines}</tbody>")


def _scroll(caption: str, table: str, name: str = "") -> str:
    """A table in a frame that scrolls by itself, by keyboard as well; its caption stays where it is."""
    identity = f' id="{name}"' if name else ""
    frame = f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
    return f'<p class="small caption">{caption}</p>{frame}<table{identity}>{table}</table></div>'
