"""The plots of a sweep: how much a result depends on the settings, and what every method can reach."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unidetox_jax.report.plots import COLORS, WIDE, Plot, form_legend, looks_of, styled, subplots
from unidetox_jax.report.results import ORIGINAL

SHOWN = {"tp": ("TP", 1.0), "rise": ("perplexity, change in %", 100.0)}


@styled
def sensitivity(lines: Sequence[Mapping[str, Any]]) -> Plot | None:
    """TP and the change of perplexity over each swept number, means over targets; None where nothing numeric changed.

    lines: of a sweep, each with "form", "settings" (field → value), "tp" and "rise". What differs in one field alone
    is joined.
    """
    fields = list(dict.fromkeys(field for line in lines for field in line["settings"]))
    curves = {field: found for field in fields if (found := _curves(lines, field))}
    if not curves:
        return None
    figure, axes_of = subplots(2 * len(curves), 2.2, 2)
    for index, (field, found) in enumerate(curves.items()):
        for axes, (key, (title, scale)) in zip(axes_of[2 * index :], SHOWN.items(), strict=False):
            for points in found:
                x = sorted(points)
                y = [scale * _mean(points[value], key) for value in x]
                axes.plot(x, y, marker="o", ms=4, lw=1.2, color=COLORS["after"], alpha=0.8)
            values = sorted({value for points in found for value in points})
            if values[0] > 0 and values[-1] >= WIDE * values[0]:
                axes.set_xscale("log")
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
            axes.set_title(title)
            axes.set_xlabel(field.rpartition(".")[2].replace("_", " "))
    caption = "On validation prompts, means over targets; a line joins cells that differ in nothing else."
    return Plot("sensitivity", "How much the settings matter", caption, figure)


@styled
def frontier(lines: Sequence[Mapping[str, Any]]) -> Plot | None:
    """TP against the change of perplexity, a curve through each method's variants, means over targets; None where fewer
    than two methods were tried. lines: as of `sensitivity`, with "variant" and "original_tp" as well."""
    points: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for line in lines:
        if line["rise"] is not None:
            points.setdefault(line["method"], {}).setdefault(line["variant"], []).append(line)
    if len(points) < 2:
        return None
    figure, (axes,) = subplots(1, 4.2)
    look = looks_of((ORIGINAL, *points))
    axes.plot(0, _mean(lines, "original_tp"), **look[ORIGINAL], ls="", ms=6)
    for method, variants in points.items():
        curve = sorted((100 * _mean(own, "rise"), _mean(own, "tp")) for own in variants.values())
        axes.plot(*zip(*curve, strict=True), **look[method], ms=5, lw=0.9, alpha=0.85)
    axes.set_xscale("symlog", linthresh=20)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("perplexity of the continuations, change in % (linear up to 20)")
    axes.set_ylabel("TP")
    axes.margins(0.06)
    form_legend(figure, look)
    caption = "On validation prompts, means over targets; a curve joins one method's settings. Down and left is better."
    return Plot("frontier", "Every method and its settings", caption, figure)


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([line[key] for line in lines]))


def _curves(lines: Sequence[Mapping[str, Any]], field: str) -> list[dict[float, list[Mapping[str, Any]]]]:
    """Value → lines of each combination of the other fields and the method, where there are several numbers."""
    found: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for line in lines:
        value = line["settings"].get(field)
        if isinstance(value, int | float) and not isinstance(value, bool) and line["rise"] is not None:
            others = {key: other for key, other in line["settings"].items() if key != field}
            found.setdefault(f"{line['form']} {others}", {}).setdefault(value, []).append(line)
    return [points for points in found.values() if len(points) > 1]
