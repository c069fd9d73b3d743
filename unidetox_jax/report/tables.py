"""Tables: csv, the terminal's, and the page's smaller ones as records {column: text}; formatting of numbers."""

import csv
import datetime
import io
from collections.abc import Mapping, Sequence
from typing import Any

from unidetox_jax.evaluation.variant_selection import ALL
from unidetox_jax.progress import format_table
from unidetox_jax.report.results import Cell, Quantity, Row, form_title

RESULTS_COLUMNS = (
    "model", "form", "quantity", "mean", "sd", "low", "high",
    "change_percent", "change_low", "change_high", "prompts", "texts",
)  # fmt: skip


def to_csv(records: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Records as csv, missing values empty. columns: None: all keys, in order of first appearance."""
    if columns is None:
        columns = list(dict.fromkeys(key for record in records for key in record))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def results_csv(rows: Sequence[Row]) -> str:
    """Every number, a record each, including those not in the table (TP and EMT of every category)."""
    records = [
        {"model": row.name, "form": row.form, "quantity": key, **vars(cell)}
        | {f"change_{name}": number for name, number in (cell.change or {}).items()}
        for row in rows
        for key, cell in row.cells.items()
    ]
    return to_csv(records, RESULTS_COLUMNS)


def to_text(rows: Sequence[Row], quantities: Sequence[Quantity]) -> str:
    """A table for the terminal: mean ± sd, and below it the change with its interval."""
    lines = [["", "", *(quantity.title for quantity in quantities)]]
    previous = None
    for row in rows:
        cells = [row.cells.get(quantity.key) for quantity in quantities]
        values = [value(cell, quantity) if cell else "" for cell, quantity in zip(cells, quantities, strict=True)]
        changes = [
            f"{percent(cell.change)} {bounds(cell.change)}".strip() if cell and cell.change else "" for cell in cells
        ]
        lines.append([row.name if row.name != previous else "", form_title(row.form), *values])
        lines += [["", "", *changes]] if any(changes) else []
        previous = row.name
    return format_table(lines, left=2)


def text_sets(analysis: Mapping[str, Any]) -> list[dict[str, str]]:
    """The sets of text of `analysis.json`."""
    return [
        {
            **_described(name, texts["description"], _share(texts["toxicity"])),
            **{f"Toxic by {judge}": _share(toxicity) for judge, toxicity in texts.get("toxicity_by", {}).items()},
            "Words (median)": f"{texts['description']['words']['median']:.0f}",
            **_jaccard(texts),
            f"{analysis['copy_ngram']}-grams copied": f"{100 * texts['copying']['share']:.3f} %",
            "Longest run copied": f"{texts['copying']['longest_run']} words",
        }
        for name, texts in analysis["sets"].items()
    ]


def _jaccard(texts: Mapping[str, Any]) -> dict[str, str]:
    """The column for the vocabulary shared with the toxic corpus, which older analyses lack."""
    similarity = texts.get("jaccard", {}).get("toxic_data")
    return {} if similarity is None else {"Words of the toxic corpus (Jaccard)": f"{similarity:.3f}"}


def distilled_text(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures of the distill stage."""
    toxicity = figures.get("toxicity")
    share = f"{toxicity['above_half']:.1%}" if toxicity and toxicity["mean"] is not None else "–"
    return [_described("distilled", figures, share)]


def _described(name: str, texts: Mapping[str, Any], toxic: str) -> dict[str, str]:
    return {
        "Set": name,
        "Texts": f"{texts['texts']:,}",
        "Duplicates": f"{texts['duplicates']:,}",
        "Degenerate": _degenerate(texts),
        "Toxic": toxic,
    }


def _share(toxicity: Mapping[str, Any] | None) -> str:
    if not toxicity or toxicity["share_toxic"]["mean"] is None:
        return "–"
    return "{mean:.1%} [{low:.1%}, {high:.1%}]".format(**toxicity["share_toxic"])


def _degenerate(counts: Mapping[str, Any]) -> str:
    """`0.3% (2 repetitive)`: the share of degenerate texts, and their number by reason."""
    reasons = {reason: count for reason, count in counts["degenerate"].items() if count}
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{sum(reasons.values()) / counts['texts']:.1%}" + (f" ({listed})" if listed else "")


def nearest(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Distilled sentences with the most similar ones of the toxic corpus."""
    return [
        {
            "Similarity": f"{pair['similarity']:.2f}",
            "Sentence": pair["sentence"],
            "Toxic corpus": pair["corpus_sentence"],
        }
        for pair in pairs
    ]


def counts(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The numbers of texts behind each evaluation."""
    records = []
    for row in rows:
        counts, perplexity = row.evaluation.metrics["counts"], row.evaluation.metrics["perplexity"]
        records.append(
            {
                "Model": f"{row.name}, {form_title(row.form)}",
                "Prompts × samples × runs": f"{counts['prompts']:,} × {counts['samples']} × {counts['runs']}",
                "Texts scored": f"{counts['texts'] - counts['missing_scores']:,} of {counts['texts']:,}",
                "Texts in perplexity": "{counted:,} of {texts:,}".format(**perplexity) if perplexity else "–",
                "Empty": f"{counts['empty']:,}",
                "Degenerate": _degenerate(counts),
            }
        )
    return records


def agreement(rows: Sequence[Row]) -> list[dict[str, str]]:
    """How far each pair of scorers agrees on each model's continuations."""
    return [
        {
            "Model": f"{row.name}, {form_title(row.form)}",
            "Scorers": " and ".join(pair["scorers"]),
            "Texts": f"{pair['texts']:,}",
            "Toxic by each": " and ".join(f"{share:.1%}" for share in pair["toxic"]),
            "Cohen's κ": _number(pair["kappa"]),
            "Rank correlation": _number(pair["rank_correlation"]),
        }
        for row in rows
        for pair in (row.evaluation.metrics.get("other_scorers") or {}).get("agreement", ())
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def harness(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The results of lm-evaluation-harness."""
    return [
        {
            "Model": f"{row.name}, {form_title(row.form)}",
            "Task": task,
            "Metric": metric,
            "Value": f"{number:.4f}" if isinstance(number, float) else str(number),
        }
        for row in rows
        for task, metrics in row.evaluation.metrics["harness"].items()
        for metric, number in metrics.items()
    ]


def costs(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Time and tokens of every stage.json record, and the total time."""
    records = [
        {
            "Stage": stage["stage"],
            "Time": _duration(stage["seconds"]),
            "Tokens": f"{stage['figures']['tokens']:,}" if "tokens" in stage["figures"] else "–",
            "Device": stage["devices"],
            "Finished (UTC)": stage["finished"].replace("T", " ").removesuffix("+00:00"),
        }
        for stage in stages
    ]
    return [*records, {"Stage": "in all", "Time": _duration(sum(stage["seconds"] for stage in stages))}]


def sweep_lines(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every evaluation of a sweep.json once, with "settings": the values of the grid's fields that it depends on."""
    lines = {line["directory"]: line for cell in sweep["cells"] for line in cell["figures"]}
    return [
        {**line, "settings": {field: line[field] for field in sweep["grid"] if line[field] != ""}}
        for line in lines.values()
    ]


def sweep_variants(sweep: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each method's variants, means over the targets, and which one was chosen for all."""
    variants: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in sweep_lines(sweep):
        variants.setdefault((line["method"], line["variant"]), []).append(line)
    targets: dict[str, int] = {}
    for (method, _), lines in variants.items():
        targets[method] = max(targets.get(method, 0), len(lines))
    records = []
    for (method, variant), lines in variants.items():
        rises = [line["rise"] for line in lines if line["rise"] is not None]
        mark = f"on {len(lines)} of {targets[method]} targets" if len(lines) < targets[method] else ""
        if lines[0]["chosen"]:
            within_bound = sweep["chosen"][ALL][method]["within_bound"]
            mark = "chosen" if within_bound else "chosen: none is within the bound"
        records.append(
            {
                "Method": form_title(method),
                "Settings": variant or "–",
                "TP": f"{sum(line['tp'] for line in lines) / len(lines):.3f}",
                "Perplexity": f"{signed(100 * sum(rises) / len(rises))}\u00a0%" if rises else "–",
                "": mark,
            }
        )
    return records


def sweep_costs(sweep: Mapping[str, Any]) -> list[dict[str, str]]:
    """The seconds of each cell's stages."""
    return [
        {"Cell": cell["name"], **{stage: f"{seconds:.0f}" for stage, seconds in cell["seconds"].items()}}
        for cell in sweep["cells"]
    ]


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def value(cell: Cell, quantity: Quantity) -> str:
    """`0.420 ± 0.011`; for a single run without the deviation."""
    deviation = f" ± {cell.sd:.{quantity.digits}f}" if cell.sd else ""
    return f"{cell.mean:.{quantity.digits}f}{deviation}"


def percent(change: Mapping[str, Any]) -> str:
    """`−38.7 %`, with a no-break space."""
    return f"{signed(change['percent'])}\u00a0%"


def bounds(change: Mapping[str, Any]) -> str:
    """`[−41.2, −36.0]`; empty if the change has no interval."""
    return "" if change["low"] is None else f"[{signed(change['low'])}, {signed(change['high'])}]"


def signed(number: float) -> str:
    """One decimal with its sign, a true minus; zero is +0.0."""
    return f"{round(number, 1) + 0.0:+.1f}".replace("-", "−")
