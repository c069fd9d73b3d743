"""The report's plots: matplotlib figures, written as PNG files and as inline SVG.

In the SVG every colour is a CSS variable of the page, so plots follow its dark mode. Figures are as wide as a phone's
screen, so that their text stays readable there.
"""

import dataclasses
import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from unidetox_jax.evaluation.variant_selection import split_form
from unidetox_jax.report import results
from unidetox_jax.report.results import CONTROL, DETOXIFIED, FORMS, ORIGINAL, Quantity, Row

WIDTH = 4.9  # inches; at 96 pixels an inch, just over a phone's width
COLORS = {  # the page's CSS variables, and their values in PNG files
    "ink": "#262626",
    "grid": "#cccccc",
    "before": "#b4532a",
    "after": "#1b7a78",
    "control": "#7a6bb0",
    "paper": "#ffffff",
}
FORM_COLORS = {ORIGINAL: COLORS["before"], DETOXIFIED: COLORS["after"], CONTROL: COLORS["control"]}
FORM_MARKERS = {ORIGINAL: "o", DETOXIFIED: "D", CONTROL: "s"}
LOG_SCALE_RATIO = 8  # of the largest value to the smallest, from which on an axis is logarithmic
OTHER_MARKERS = "^v<>pPX*hd"  # of other forms, in the order of their names
STYLE = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8.5,
    "figure.labelsize": 9.5,
    "svg.fonttype": "none",  # keeps text as text, in the page's font and searchable
}
styled = style.context(["seaborn-v0_8-whitegrid", STYLE])  # decorator; leaves the caller's settings alone


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure with its file name, and title and caption for the page."""

    name: str
    title: str
    caption: str
    figure: Figure

    @styled
    def png(self) -> bytes:
        """On white, at 192 dots per inch."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=192, facecolor=COLORS["paper"], metadata={"Software": None})
        return file.getvalue()

    @styled
    def svg(self) -> str:
        """An `<svg>` element for the page: colours as variables, scalable, no date."""
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context({"svg.hashsalt": self.name}):  # unique ids within the page
            self.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        svg = file.getvalue()
        svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", svg, flags=re.S)
        svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
        svg = re.sub(r"font-family: [^\";]*;? ?", "", svg)
        for variable, color in COLORS.items():
            svg = svg.replace(color, f"var(--{variable})")
        box = re.findall(r'viewBox="([^"]*)"', svg)[0]
        head = f'<svg viewBox="{box}" role="img" aria-label="{self.title}" xmlns:xlink="http://www.w3.org/1999/xlink">'
        return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)


@dataclasses.dataclass(frozen=True)
class Point:
    """A number with its interval, if any, in the row `label` of a panel."""

    label: str
    form: str
    mean: float
    low: float | None
    high: float | None


@styled
def trade_off(rows: Sequence[Row]) -> Plot | None:
    """Toxicity against perplexity, with an arrow per model from before to after; None without perplexity."""
    key = "tp_id" if any("tp_id" in row.cells for row in rows) else "tp_all"
    rows = [row for row in rows if {key, "perplexity"} <= row.cells.keys()]
    if not rows:
        return None
    figure, (axes,) = subplots(1, 3.4)
    points = {(row.name, row.form): (row.cells["perplexity"].mean, row.cells[key].mean) for row in rows}
    styles = form_styles(row.form for row in rows)
    for row in rows:
        x, y = row.cells["perplexity"], row.cells[key]
        _errorbar(axes, styles[row.form], x.mean, y.mean, xerr=_error(x), yerr=_error(y))
        start = points.get((row.name, ORIGINAL))
        if start and row.form in (DETOXIFIED, CONTROL):
            arrow = {"arrowstyle": "-|>", "color": FORM_COLORS[row.form], "shrinkA": 5, "shrinkB": 5, "alpha": 0.8}
            axes.annotate("", points[row.name, row.form], start, arrowprops=arrow)
        if row.form == ORIGINAL or not start:
            position = {"textcoords": "offset points", "ha": "center", "fontsize": 8.5}
            axes.annotate(row.name, points[row.name, row.form], (0, 8), zorder=5, **position)
    for curve in _variant_curves(points):
        axes.plot(*zip(*curve, strict=True), color=COLORS["ink"], lw=0.8, alpha=0.6, zorder=2)
    perplexities = [x for x, _ in points.values()]
    if max(perplexities) > LOG_SCALE_RATIO * min(perplexities):
        axes.set_xscale("log")
    axes.set_xlabel("perplexity of the continuations (lower is better)")
    axes.set_ylabel(f"TP, {'in distribution' if key == 'tp_id' else 'all prompts'} (lower is better)")
    axes.margins(0.2)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, low), min(1.05, high))
    form_legend(figure, styles)
    caption = (
        "Toxicity against perplexity, an arrow for each model from before to after; down and to the left is better. "
        "Thin lines: 95 % intervals over prompts."
    )
    if set(styles) - set(FORMS):
        caption += " A line joins one method's settings on one model."
    return Plot("tradeoff", "The trade-off", caption, figure)


def _variant_curves(points: Mapping[tuple[str, str], tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The points of each model and method that was evaluated with several settings, by perplexity."""
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (name, form), point in points.items():
        if form not in FORMS:
            curves.setdefault((name, split_form(form)[0]), []).append(point)
    return [sorted(curve) for curve in curves.values() if len(curve) > 1]


@styled
def changes(rows: Sequence[Row], quantities: Sequence[Quantity]) -> Plot | None:
    """The changes of primary quantities, a panel per quantity that has an interval; None without one."""
    panels = {}
    for quantity in quantities:
        changed = [(row, row.cells[quantity.key].change) for row in rows if quantity.key in row.cells]
        points = [Point(row.name, row.form, x["percent"], x["low"], x["high"]) for row, x in changed if x]
        if quantity.primary and any(point.low is not None for point in points):
            panels[quantity.title] = points
    figure = _intervals(panels, "change in percent, with its 95 % interval", lines=dict.fromkeys(panels, 0))
    caption = "Change from the model as published in percent; an interval that crosses 0 shows nothing."
    return Plot("changes", "What changed", caption, figure) if figure else None


@styled
def categories(rows: Sequence[Row]) -> Plot | None:
    """TP of every category with its interval, a panel per model; None if prompts have no categories."""
    panels: dict[str, list[Point]] = {}
    names = results.category_names([row.evaluation for row in rows])
    for row, name in itertools.product(rows, names):
        cell = row.cells.get(f"tp of {name}")
        label = name.replace("_", " ") + ("\n(unseen)" if name in row.evaluation.metrics["groups"]["ood"] else "")
        if cell:
            panels.setdefault(row.name, []).append(Point(label, row.form, cell.mean, cell.low, cell.high))
    columns = 1 if len(panels) <= 2 else 2
    figure = _intervals(panels, "TP, with its 95 % interval", columns, sharex=True, sharey=True)
    caption = (
        "Probability of a toxic continuation for each category of prompts. Unseen: not in the toxic model's training "
        "text."
    )
    return Plot("categories", "By category", caption, figure) if figure else None


@styled
def leaning(analysis: Mapping[str, Any]) -> Plot | None:
    """Mean probability of each leaning with its interval, a row per text set; None if it was not measured."""
    scale = analysis["leaning"] or {"labels": []}
    panels = {
        label: [
            Point(name, DETOXIFIED, *(texts["leaning"]["probability"][label][key] for key in ("mean", "low", "high")))
            for name, texts in analysis["sets"].items()
            if texts["leaning"]
        ]
        for label in scale["labels"]
    }
    figure = _intervals(
        panels,
        "mean probability (dashed: of a text without a known word)",
        lines=scale.get("of_nothing", {}),
        sharex=True,
    )
    caption = "Mean probability of each leaning over a set's texts, with 95 % intervals over texts."
    return Plot("leaning", "Political leaning", caption, figure) if figure else None


@styled
def training(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Plot | None:
    """Loss over steps, a panel per training; None without any. curves: {training: lines of its metrics.jsonl}."""
    curves = {name: lines for name, lines in curves.items() if any("loss" in line for line in lines)}
    if not curves:
        return None
    series: dict[str, dict[str, Any]] = {
        "loss": {"label": "training", "color": COLORS["after"], "lw": 1.2},
        "validation_loss": {"label": "held out", "color": COLORS["before"], "marker": "o", "ms": 4, "lw": 1},
    }
    figure, panels = subplots(len(curves), 1.25, 1 if len(curves) <= 3 else 2)
    for axes, (name, lines) in zip(panels, curves.items(), strict=True):
        for key, line_style in series.items():
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            axes.plot(*(zip(*points, strict=True) if points else ([], [])), **line_style)
        axes.set_title(name)
        axes.margins(x=0.02)
    figure.legend(
        handles=[Line2D([], [], **line_style) for line_style in series.values()], loc="outside upper left", ncols=2
    )
    figure.supxlabel("step")
    figure.supylabel("loss (nats per token)")
    return Plot("training", "Training", "Loss on the training text and, if any, on held-out text.", figure)


def _intervals(
    panels: Mapping[str, Sequence[Point]],
    xlabel: str,
    columns: int = 1,
    lines: Mapping[str, float] | None = None,
    **shared,
) -> Figure | None:
    """A panel per title with a row per label and a point per form; `lines`: a vertical line per title."""
    labels = list(dict.fromkeys(point.label for points in panels.values() for point in points))
    forms = results.in_order(point.form for points in panels.values() for point in points)
    styles = form_styles(forms)
    if not labels:
        return None
    figure, axes_of = subplots(len(panels), (0.13 * len(forms) + 0.15) * len(labels) + 0.45, columns, **shared)
    for axes, (title, points) in zip(axes_of, panels.items(), strict=True):
        for point in points:
            offset = (forms.index(point.form) - (len(forms) - 1) / 2) * 0.7 / len(forms)
            _errorbar(axes, styles[point.form], point.mean, labels.index(point.label) + offset, xerr=_error(point))
        if lines and title in lines:
            axes.axvline(lines[title], color=COLORS["ink"], lw=1, ls="--" if lines[title] else "-", zorder=1)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        axes.set_title(title)
    figure.supxlabel(xlabel)
    if len(forms) > 1:
        form_legend(figure, styles)
    return figure


def subplots(count: int, height: float, columns: int = 1, **shared) -> tuple[Figure, list]:
    """A figure of `count` panels, each `height` inches high, and their axes; surplus places stay empty."""
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared).ravel().tolist()
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count]


def form_styles(forms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{form: its marker and colour}, in order; variants of one method share them."""
    forms = results.in_order(forms)
    others = list(dict.fromkeys(split_form(form)[0] for form in forms if form not in FORMS))
    markers = {name: OTHER_MARKERS[index % len(OTHER_MARKERS)] for index, name in enumerate(others)}
    return {
        form: {
            "marker": FORM_MARKERS.get(form) or markers[split_form(form)[0]],
            "color": FORM_COLORS.get(form, COLORS["ink"]),
        }
        for form in forms
    }


def _errorbar(axes, point_style: Mapping[str, Any], x: float, y: float, **errors) -> None:
    axes.errorbar(x, y, **errors, **point_style, ls="", ms=5.5, elinewidth=1, zorder=3)


def _error(number) -> list[list[float]] | None:
    """The interval of a Point or Cell as matplotlib's error; None without one."""
    if number.low is None:
        return None
    return [[max(0.0, number.mean - number.low)], [max(0.0, number.high - number.mean)]]


def form_legend(figure: Figure, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """The legend above the plot; variants of one method share an entry."""
    shown = {form if form in FORMS else split_form(form)[0]: point_style for form, point_style in styles.items()}
    handles = [Line2D([], [], **one, ls="", label=results.form_title(form)) for form, one in shown.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)
