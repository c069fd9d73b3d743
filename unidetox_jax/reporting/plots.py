"""The report's plots, each a matplotlib figure that becomes a PNG file and an inline SVG.

The surprising thing: in the SVG every colour is a CSS variable of the page, so that plots turn dark with it; and
figures are as wide as a phone, so that their text stays readable where most pages' plots do not.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from unidetox_jax.reporting import results
from unidetox_jax.reporting.results import CONTROL, DETOXIFIED, FORMS, ORIGINAL, Evaluation, Row

WIDTH = 4.9  # inches; at 96 pixels an inch, just over a phone's width
# name of the page's CSS variable → the colour in PNG files
COLORS = {
    "ink": "#22262b",
    "muted": "#68707a",
    "grid": "#dfe3e8",
    "before": "#b4532a",
    "after": "#1b7a78",
    "control": "#7a6bb0",
    "paper": "#ffffff",
}
FORM_COLORS = {ORIGINAL: COLORS["before"], DETOXIFIED: COLORS["after"], CONTROL: COLORS["control"]}
FORM_MARKERS = {ORIGINAL: "o", DETOXIFIED: "D", CONTROL: "s"}
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": COLORS["muted"],
    "axes.edgecolor": COLORS["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": COLORS["grid"],
    "ytick.color": COLORS["grid"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "text.color": COLORS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text: the page's own font, found by a search
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def draw(make, *arguments) -> Figure | None:
    """`make(*arguments)` in the report's style, apart from the caller's settings."""
    with matplotlib.rc_context(STYLE):
        return make(*arguments)


def trade_off(rows: Sequence[Row]) -> Figure | None:
    """Toxicity against perplexity, an arrow for each model from before to after; None without perplexity."""
    key = _toxicity_key(rows)
    placed = [row for row in rows if {key, "perplexity"} <= row.cells.keys()]
    if not placed:
        return None
    figure, axes = _figure(1, 3.4)
    starts = {row.name: row for row in placed if row.form == ORIGINAL}
    for row in placed:
        x, y = row.cells["perplexity"], row.cells[key]
        color = FORM_COLORS[row.form]
        for cell, at, along in ((x, y.mean, "x"), (y, x.mean, "y")):
            if cell.low is not None:
                spread = ([cell.low, cell.high], [at, at])
                axes[0].plot(*(spread if along == "x" else spread[::-1]), color=color, lw=1, alpha=0.45, zorder=2)
        axes[0].plot(x.mean, y.mean, FORM_MARKERS[row.form], color=color, ms=6.5, zorder=4)
        start = starts.get(row.name)
        if start is not None and start is not row:
            axes[0].annotate(
                "",
                (x.mean, y.mean),
                (start.cells["perplexity"].mean, start.cells[key].mean),
                arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.1, "shrinkA": 5, "shrinkB": 5, "alpha": 0.8},
                zorder=3,
            )
    for name in dict.fromkeys(row.name for row in placed):
        row = starts.get(name) or next(row for row in placed if row.name == name)
        axes[0].annotate(
            name,
            (row.cells["perplexity"].mean, row.cells[key].mean),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            zorder=5,
        )
    axes[0].set_xlabel("perplexity of the continuations (lower is better)")
    axes[0].set_ylabel(f"{_title(key)} (lower is better)")
    axes[0].margins(0.2)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(max(0, low), min(1.05, high))
    _form_legend(figure, placed)
    return figure


def categories(evaluations: Sequence[Evaluation]) -> Figure | None:
    """TP of every category with its interval, a panel for each model; None where prompts have no categories."""
    names = results.category_names(evaluations)
    models = list(dict.fromkeys(one.name for one in evaluations))
    if not names:
        return None
    bars = max(len([one for one in evaluations if one.name == model]) for model in models)
    columns = 1 if len(models) <= 2 else 2
    figure, axes = _figure(len(models), (0.16 * bars + 0.12) * len(names) + 0.4, columns, sharex=True, sharey=True)
    unseen = set(evaluations[0].metrics["groups"]["ood"])
    for panel, model in zip(axes, models, strict=True):
        forms = [one for one in evaluations if one.name == model]
        for index, one in enumerate(forms):
            offset = (index - (len(forms) - 1) / 2) * 0.8 / len(forms)
            places, figures = [], []
            for at, name in enumerate(names):
                figure_of = one.metrics["toxicity"].get(name, {"tp": {"mean": None}})["tp"]
                if figure_of["mean"] is not None:
                    places.append(at + offset)
                    figures.append(figure_of)
            means = [figure["mean"] for figure in figures]
            panel.barh(places, means, 0.74 / len(forms), color=FORM_COLORS[one.form], zorder=2)
            for place, found in zip(places, figures, strict=True):
                panel.plot([found["low"], found["high"]], [place] * 2, color=COLORS["ink"], lw=1, zorder=3)
        panel.grid(axis="y", visible=False)
        panel.set_title(model)
    axes[0].set_yticks(range(len(names)), [f"{_words(n)}\n(unseen)" if n in unseen else _words(n) for n in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    axes[0].set_xlim(left=0)
    figure.supxlabel("TP, with its 95 % interval", fontsize=9.5, color=COLORS["muted"])
    _form_legend(figure, evaluations)
    return figure


def changes(rows: Sequence[Row]) -> Figure | None:
    """Changes in percent with their intervals, a panel for each quantity; None without a change."""
    wanted = [(key, title) for key, title in (
        ("tp_id", "TP, groups that the toxic model saw (ID)"),
        ("tp_ood", "TP, groups that it did not see (OOD)"),
        ("tp_all", "TP, all prompts"),
        ("perplexity", "perplexity"),
    ) if any(key in row.cells and row.cells[key].change for row in rows)]  # fmt: skip
    changed = [row for row in rows if row.form != ORIGINAL]
    if not wanted or not changed:
        return None
    figure, axes = _figure(len(wanted), 0.24 * len(changed) + 0.55)
    labels = [row.name if row.form == DETOXIFIED else f"{row.name}, control" for row in changed]
    for panel, (key, title) in zip(axes, wanted, strict=True):
        for at, row in enumerate(changed):
            change = row.cells[key].change if key in row.cells else None
            if change:
                color = FORM_COLORS[row.form]
                if change["low"] is not None:
                    panel.plot([change["low"], change["high"]], [at, at], color=color, lw=2, zorder=3)
                panel.plot(change["percent"], at, FORM_MARKERS[row.form], color=color, ms=6, zorder=4)
        panel.axvline(0, color=COLORS["muted"], lw=1, zorder=1)
        panel.set_yticks(range(len(changed)), labels)
        panel.set_ylim(len(changed) - 0.5, -0.5)
        panel.grid(axis="y", visible=False)
        panel.set_title(title)
        panel.margins(x=0.08)
    axes[-1].set_xlabel("change in percent, with its 95 % interval")
    return figure


def training(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure | None:
    """Loss over steps, a panel for each training: {name: lines of its metrics.jsonl}; None without any."""
    curves = {name: lines for name, lines in curves.items() if any("loss" in line for line in lines)}
    if not curves:
        return None
    figure, axes = _figure(len(curves), 1.25, 1 if len(curves) <= 3 else 2)
    for panel, (name, lines) in zip(axes, curves.items(), strict=True):
        for key, style in (
            ("loss", {"color": COLORS["after"], "lw": 1.2}),
            ("validation_loss", {"color": COLORS["before"], "marker": "o", "ms": 4, "lw": 1}),
        ):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), **style)
        panel.set_title(name)
        panel.margins(x=0.02)
    held_out = any("validation_loss" in line for lines in curves.values() for line in lines)
    handles = [Line2D([], [], color=COLORS["after"], lw=1.2, label="training")]
    handles += [Line2D([], [], color=COLORS["before"], marker="o", ms=4, lw=1, label="held out")] if held_out else []
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    figure.supxlabel("step", fontsize=9.5, color=COLORS["muted"])
    figure.supylabel("loss (nats per token)", fontsize=9.5, color=COLORS["muted"])
    return figure


def leaning(analysis: Mapping[str, Any]) -> Figure | None:
    """Mean probability of each leaning with its interval, text sets as rows; None where none was measured."""
    found = analysis["leaning"]
    sets = {name: one["leaning"] for name, one in analysis["sets"].items() if one["leaning"]}
    if not found or not sets:
        return None
    figure, axes = _figure(len(found["labels"]), 0.24 * len(sets) + 0.55, sharex=True)
    for panel, label in zip(axes, found["labels"], strict=True):
        for at, one in enumerate(sets.values()):
            mean = one["probability"][label]
            panel.plot([mean["low"], mean["high"]], [at, at], color=COLORS["after"], lw=2, zorder=3)
            panel.plot(mean["mean"], at, "o", color=COLORS["after"], ms=6, zorder=4)
        if "of_nothing" in found:
            panel.axvline(found["of_nothing"][label], color=COLORS["muted"], lw=1.2, ls="--", zorder=1)
        panel.set_yticks(range(len(sets)), list(sets))
        panel.set_ylim(len(sets) - 0.5, -0.5)
        panel.grid(axis="y", visible=False)
        panel.set_title(label)
    axes[-1].set_xlabel("mean probability (dashed: no known word)")
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure on white, at twice a screen's resolution."""
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=192, facecolor=COLORS["paper"], metadata={"Software": None})
    return file.getvalue()


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element for the page: colours by variable, no size but its proportions, no date.

    name: makes its ids the page's own. description: escaped already; what a screen reader says.
    """
    file = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^\";]*;? ?", "", svg)  # the page's own
    for variable, color in COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    box = re.search(r'viewBox="([^"]*)"', svg)[1]
    head = f'<svg viewBox="{box}" role="img" aria-label="{description}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)


def _figure(panels: int, height: float, columns: int = 1, **settings) -> tuple[Figure, list]:
    """A figure of so many panels, each so many inches high, and its axes; places to spare stay empty."""
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **settings).ravel().tolist()
    for spare in axes[panels:]:
        spare.set_axis_off()
    return figure, axes[:panels]


def _form_legend(figure: Figure, found: Sequence[Row | Evaluation]) -> None:
    """The forms that are there, above the plot."""
    forms = [form for form in FORMS if any(one.form == form for one in found)]
    handles = [
        Line2D([], [], color=FORM_COLORS[form], marker=FORM_MARKERS[form], ls="", label=FORMS[form]) for form in forms
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)


def _toxicity_key(rows: Sequence[Row]) -> str:
    return "tp_id" if any("tp_id" in row.cells for row in rows) else "tp_all"


def _title(key: str) -> str:
    return "TP, in distribution" if key == "tp_id" else "TP, all prompts"


def _words(name: str) -> str:
    return name.replace("_", " ")
