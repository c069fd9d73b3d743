"""The results as text: csv (a figure a row), LaTeX, and lines for a terminal."""

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from unidetox_jax.reporting import results
from unidetox_jax.reporting.results import Cell, Quantity, Row

CSV_FIELDS = (
    "model", "form", "quantity", "mean", "sd", "low", "high",
    "change_percent", "change_low", "change_high", "prompts", "texts",
)  # fmt: skip
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
    "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def to_csv(rows: Sequence[Row]) -> str:
    """Every figure of the table, and TP and EMT of every category, a row each; empty where there is nothing."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        counts = row.evaluation.metrics["counts"]
        for key, cell in row.cells.items():
            change = {f"change_{name}": value for name, value in (cell.change or {}).items()}
            rests = {"prompts": counts["prompts"], "texts": counts["texts"]} if key[:4] != "mmlu" else {}
            toxic = row.evaluation.metrics["toxicity"].get(key.partition("_")[2])
            if toxic and key.partition("_")[0] in ("tp", "emt"):
                rests = {"prompts": toxic["prompts"], "texts": toxic["texts"]}
            figure = {name: getattr(cell, name) for name in ("mean", "sd", "low", "high")}
            writer.writerow({"model": row.name, "form": row.form, "quantity": key, **figure, **change, **rests})
        for category in results.category_names([row.evaluation]):
            found = row.evaluation.metrics["toxicity"].get(category)
            for metric in ("tp", "emt") if found else ():
                figure = {name: found[metric][name] for name in ("mean", "sd", "low", "high")}
                rests = {"prompts": found["prompts"], "texts": found["texts"]}
                writer.writerow(
                    {"model": row.name, "form": row.form, "quantity": f"{metric} of {category}", **figure, **rests}
                )
    return file.getvalue()


def to_latex(rows: Sequence[Row], quantities: Sequence[Quantity]) -> str:
    """A table for a paper; needs the package booktabs."""
    arrows = {True: r" $\downarrow$", False: r" $\uparrow$", None: ""}
    header = " & ".join(["Model", ""] + [escape_latex(q.title) + arrows[q.less_is_better] for q in quantities])
    lines = [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{ll{'r' * len(quantities)}}}",
        r"\toprule",
        header + r" \\",
    ]
    last = None
    for row in rows:
        if row.name != last:
            lines.append(r"\midrule")
        name = escape_latex(row.name) if row.name != last else ""
        cells = [_latex_cell(row.cells.get(q.key), q) for q in quantities]
        lines.append(" & ".join([name, escape_latex(results.FORMS[row.form]), *cells]) + r" \\")
        last = row.name
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def to_text(rows: Sequence[Row], quantities: Sequence[Quantity]) -> str:
    """A table for a terminal: mean ± sd, and under it the change with its interval."""
    table = [["", ""] + [q.title for q in quantities]]
    last = None
    for row in rows:
        cells = [row.cells.get(q.key) for q in quantities]
        table.append(
            [row.name if row.name != last else "", results.FORMS[row.form]]
            + [value(cell, q) if cell else "" for cell, q in zip(cells, quantities, strict=True)]
        )
        if any(cell and cell.change for cell in cells):
            table.append(["", ""] + [percent(cell.change) if cell and cell.change else "" for cell in cells])
        last = row.name
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if at < 2 else text.rjust(width)
            for at, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    return "\n".join(line.rstrip() for line in lines)


def value(cell: Cell, quantity: Quantity) -> str:
    """`0.420 ± 0.011`; without the deviation where there was one run."""
    deviation = f" ± {cell.sd:.{quantity.digits}f}" if cell.sd else ""
    return f"{cell.mean:.{quantity.digits}f}{deviation}"


def percent(change: dict[str, Any]) -> str:
    """`−38.7 % [−41.2, −36.0]`, the space before the sign one that does not break."""
    low, high, middle = (None if change[k] is None else signed(change[k]) for k in ("low", "high", "percent"))
    return f"{middle}\u00a0%" + (f" [{low}, {high}]" if low else "")


def signed(number: float) -> str:
    """One decimal with its sign, a true minus; no sign speaks of a zero's side."""
    return f"{round(number, 1) + 0.0:+.1f}".replace("-", "−")


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it."""
    return re.sub(r"[\\&%$#_{}~^]", lambda found: _LATEX[found[0]], text)


def _latex_cell(cell: Cell | None, quantity: Quantity) -> str:
    if cell is None:
        return "--"
    text = value(cell, quantity).replace(" ± ", r" $\pm$ ")
    if cell.change:
        text += f" ({cell.change['percent']:+.1f}\\%)".replace("-", "$-$")
    return text
