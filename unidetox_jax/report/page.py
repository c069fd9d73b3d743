"""The templates of this directory: the report's self-contained page, and a table for a paper.

Jinja2 escapes every value by default, so text of models and data sets cannot become markup.
"""

import itertools
import json
from collections.abc import Sequence

import jinja2

from unidetox_jax.report import results, tables
from unidetox_jax.report.results import Quantity, Row

LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "−": "$-$",
        "±": r"$\pm$",
        "\u00a0": "~",
    }
)


def render(**content) -> str:
    """The page; `page.html.j2` lists its content. Raises jinja2.UndefinedError if any of it is missing."""
    return _environment().get_template("page.html.j2").render(content)


def to_latex(rows: Sequence[Row], quantities: Sequence[Quantity]) -> str:
    """A LaTeX table; needs the package booktabs."""
    return _environment().get_template("results.tex.j2").render(rows=rows, quantities=quantities)


def escape_latex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return text.translate(LATEX)


def by_model(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """[(model's name, its rows)]; a model's rows must be adjacent."""
    return [(name, list(group)) for name, group in itertools.groupby(rows, lambda row: row.name)]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unidetox_jax.report", "."),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(form_title=results.form_title, significant_sign=results.significant_sign, tables=tables)
    environment.filters.update(
        by_model=by_model,
        bounds=tables.bounds,
        json=lambda record: json.dumps(record, indent=1, ensure_ascii=False),
        latex=escape_latex,
        percent=tables.percent,
        share="{:.1%}".format,
        value=tables.value,
        words=lambda name: name.replace("_", " "),
    )
    return environment
