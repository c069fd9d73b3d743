"""Fills in the templates of this directory: the page, one HTML file that needs nothing else, and a paper's table.

Jinja2 rather than strings put together here: it escapes every value unless told otherwise, so text of models and data
sets cannot become markup by an oversight, and the page can be read and edited as HTML.
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
    """The page; `page.html.j2` begins with what it has to be given. Raises jinja2.UndefinedError without any of it."""
    return _environment().get_template("page.html.j2").render(content)


def to_latex(rows: Sequence[Row], quantities: Sequence[Quantity]) -> str:
    """A table for a paper; needs the package booktabs."""
    return _environment().get_template("results.tex.j2").render(rows=rows, quantities=quantities)


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it."""
    return text.translate(LATEX)


def by_model(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Each model's name and its rows, which stand together."""
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
    environment.globals.update(form_title=results.title, beyond_chance=results.beyond_chance, tables=tables)
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
