"""Tables: results.csv, the terminal's, the page's smaller ones as records (column → text); how numbers are written."""

import csv
import datetime
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unidetox_jax.evaluation.choice import ALL
from unidetox_jax.progress import format_table
from unidetox_jax.report import results
from unidetox_jax.report.results import Cell, Quantity, Row

CSV_FIELDS = (
    "model", "form", "quantity", "mean", "sd", "low", "high",
    "change_percent", "change_low", "change_high", "prompts", "texts",
)  # fmt: skip


def to_csv(rows: Sequence[Row]) -> str:
    """Every cell of the table, and those beside it (TP and EMT of every category), a row each; empty where there is
    nothing."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerows({"model": row.name, "form": row.form, **record} for record in _records(row))
    return file.getvalue()


def _records(row: Row) -> Iterator[dict[str, Any]]:
    """A row's numbers, and how many prompts and texts each rests on."""
    for key, cell in row.cells.items():
        change = {f"change_{name}": number for name, number in (cell.change or {}).items()}
        yield {"quantity": key, **vars(cell), **change}


def to_text(rows: Sequence[Row], quantities: Sequence[Quantity]) -> str:
    """A table for a terminal: mean ± sd, and under it the change with its interval."""
    lines = [["", "", *(quantity.title for quantity in quantities)]]
    last = None
    for row in rows:
        cells = [row.cells.get(quantity.key) for quantity in quantities]
        values = [value(cell, quantity) if cell else "" for cell, quantity in zip(cells, quantities, strict=True)]
        changes = [
            f"{percent(cell.change)} {bounds(cell.change)}".strip() if cell and cell.change else "" for cell in cells
        ]
        lines.append([row.name if row.name != last else "", results.title(row.form), *values])
        lines += [["", "", *changes]] if any(changes) else []
        last = row.name
    return format_table(lines, left=2)


def text_sets(analysis: Mapping[str, Any]) -> list[dict[str, str]]:
    """What `analysis.json` counted in each set of text."""
    return [
        {
            **_described(name, texts["description"], _share(texts["toxicity"])),
            **{f"Toxic by {judge}": _share(found) for judge, found in texts.get("toxicity_by", {}).items()},
            "Words (median)": f"{texts['description']['words']['median']:.0f}",
            **_shared_words(texts),
            f"{analysis['copy_ngram']}-grams copied": f"{100 * texts['copying']['share']:.3f} %",
            "Longest run copied": f"{texts['copying']['longest_run']} words",
        }
        for name, texts in analysis["sets"].items()
    ]


def _shared_words(texts: Mapping[str, Any]) -> dict[str, str]:
    """How much of its vocabulary a set of texts shares with the toxic corpus; nothing in an analysis of old."""
    shared = texts.get("jaccard", {}).get("toxic_data")
    return {} if shared is None else {"Words of the toxic corpus (Jaccard)": f"{shared:.3f}"}


def distilled_text(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the distill stage itself counted."""
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
    """`0.3% (2 repetitive)`: the share of texts that are degenerate, and how many for which reason."""
    reasons = {reason: count for reason, count in counts["degenerate"].items() if count}
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{sum(reasons.values()) / counts['texts']:.1%}" + (f" ({listed})" if listed else "")


def nearest(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Distilled sentences beside those of the toxic corpus that are most like them."""
    return [
        {"Likeness": f"{pair['similarity']:.2f}", "Sentence": pair["sentence"], "Toxic corpus": pair["corpus_sentence"]}
        for pair in pairs
    ]


def counts(rows: Sequence[Row]) -> list[dict[str, str]]:
    """How many texts each evaluation rests on."""
    records = []
    for row in rows:
        counts, perplexity = row.evaluation.metrics["counts"], row.evaluation.metrics["perplexity"]
        records.append(
            {
                "Model": f"{row.name}, {results.title(row.form)}",
                "Prompts × samples × runs": f"{counts['prompts']:,} × {counts['samples']} × {counts['runs']}",
                "Texts scored": f"{counts['texts'] - counts['missing_scores']:,} of {counts['texts']:,}",
                "Texts in perplexity": "{counted:,} of {texts:,}".format(**perplexity) if perplexity else "–",
                "Empty": f"{counts['empty']:,}",
                "Degenerate": _degenerate(counts),
            }
        )
    return records


def agreement(rows: Sequence[Row]) -> list[dict[str, str]]:
    """How far each two scorers agree on what each model wrote."""
    return [
        {
            "Model": f"{row.name}, {results.title(row.form)}",
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
    """What lm-evaluation-harness measured."""
    return [
        {
            "Model": f"{row.name}, {results.title(row.form)}",
            "Task": task,
            "Metric": metric,
            "Value": f"{number:.4f}" if isinstance(number, float) else str(number),
        }
        for row in rows
        for task, metrics in row.evaluation.metrics["harness"].items()
        for metric, number in metrics.items()
    ]


def costs(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Time and tokens of every stage.json record, and the time of all."""
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
    """Every evaluation of a sweep.json once, with the values of the grid's fields that it depends on."""
    lines = {line["directory"]: line for cell in sweep["cells"] for line in cell["figures"]}
    grid = sweep["grid"]
    return [
        {**line, "settings": {field: line[field] for field in grid if line[field] != ""}} for line in lines.values()
    ]


def sweep_variants(sweep: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each method's variants, means over the targets, and which one was chosen for all."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in sweep_lines(sweep):
        found.setdefault((line["method"], line["variant"]), []).append(line)
    records = []
    for (method, variant), lines in found.items():
        rises = [line["rise"] for line in lines if line["rise"] is not None]
        chosen = sweep["chosen"][ALL][method]
        mark = (
            ("chosen" if chosen["within_bound"] else "chosen: none is within the bound") if lines[0]["chosen"] else ""
        )
        records.append(
            {
                "Method": results.title(method),
                "Settings": variant or "–",
                "TP": f"{sum(line['tp'] for line in lines) / len(lines):.3f}",
                "Perplexity": f"{signed(100 * sum(rises) / len(rises))}\u00a0%" if rises else "–",
                "": mark if lines[0]["chosen"] else "",
            }
        )
    return records


def sweep_costs(sweep: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each cell's stages and how long they took."""
    return [
        {"Cell": cell["name"], **{stage: f"{seconds:.0f}" for stage, seconds in cell["seconds"].items()}}
        for cell in sweep["cells"]
    ]


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def value(cell: Cell, quantity: Quantity) -> str:
    """`0.420 ± 0.011`; without the deviation where there was one run."""
    deviation = f" ± {cell.sd:.{quantity.digits}f}" if cell.sd else ""
    return f"{cell.mean:.{quantity.digits}f}{deviation}"


def percent(change: Mapping[str, Any]) -> str:
    """`−38.7 %`; the space does not break."""
    return f"{signed(change['percent'])}\u00a0%"


def bounds(change: Mapping[str, Any]) -> str:
    """`[−41.2, −36.0]`; empty where the change has no interval."""
    return "" if change["low"] is None else f"[{signed(change['low'])}, {signed(change['high'])}]"


def signed(number: float) -> str:
    """One decimal with its sign, a true minus; a number that rounds to zero is +0.0."""
    return f"{round(number, 1) + 0.0:+.1f}".replace("-", "−")
