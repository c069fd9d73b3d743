"""The plots of a sweep: how results depend on the settings, and what every method reaches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unidetox_jax.report.plots import COLORS, LOG_SCALE_RATIO, Plot, form_legend, form_styles, styled, subplots
from unidetox_jax.report.results import ORIGINAL

MEASURES = {"tp": ("TP", 1.0), "rise": ("perplexity, change in %", 100.0)}


@styled
def sensitivity(lines: Sequence[Mapping[str, Any]]) -> Plot | None:
    """TP and the change of perplexity over each swept number, means over targets; None without one.

    lines: of a sweep, each with "form", "settings" (field → value), "tp" and "rise".
    """
    fields = list(dict.fromkeys(field for line in lines for field in line["settings"]))
    curves_of = {field: curves for field in fields if (curves := _curves(lines, field))}
    if not curves_of:
        return None
    figure, all_axes = subplots(2 * len(curves_of), 2.2, 2)
    for index, (field, curves) in enumerate(curves_of.items()):
        for axes, (key, (title, scale)) in zip(all_axes[2 * index :], MEASURES.items(), strict=False):
            for curve in curves:
                x = sorted(curve)
                y = [scale * _mean(curve[value], key) for value in x]
                axes.plot(x, y, marker="o", ms=4, lw=1.2, color=COLORS["after"], alpha=0.8)
            values = sorted({value for curve in curves for value in curve})
            if values[0] > 0 and values[-1] >= LOG_SCALE_RATIO * values[0]:
                axes.set_xscale("log")
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
            axes.set_title(title)
            axes.set_xlabel(field.rpartition(".")[2].replace("_", " "))
    caption = "On validation prompts, means over targets; a line joins cells that differ in nothing else."
    return Plot("sensitivity", "How much the settings matter", caption, figure)


@styled
def frontier(lines: Sequence[Mapping[str, Any]]) -> Plot | None:
    """TP against the change of perplexity, a curve through each method's variants, means over targets; None for fewer
    than two methods. lines: as of `sensitivity`, with "variant" and "original_tp" as well."""
    methods: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for line in lines:
        if line["rise"] is not None:
            methods.setdefault(line["method"], {}).setdefault(line["variant"], []).append(line)
    if len(methods) < 2:
        return None
    figure, (axes,) = subplots(1, 4.2)
    styles = form_styles((ORIGINAL, *methods))
    axes.plot(0, _mean(lines, "original_tp"), **styles[ORIGINAL], ls="", ms=6)
    for method, variants in methods.items():
        curve = sorted((100 * _mean(of_variant, "rise"), _mean(of_variant, "tp")) for of_variant in variants.values())
        axes.plot(*zip(*curve, strict=True), **styles[method], ms=5, lw=0.9, alpha=0.85)
    axes.set_xscale("symlog", linthresh=20)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("perplexity of the continuations, change in % (linear up to 20)")
    axes.set_ylabel("TP")
    axes.margins(0.06)
    form_legend(figure, styles)
    caption = "On validation prompts, means over targets; a curve joins one method's settings. Down and left is better."
    return Plot("frontier", "Every method and its settings", caption, figure)


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([line[key] for line in lines]))


def _curves(lines: Sequence[Mapping[str, Any]], field: str) -> list[dict[float, list[Mapping[str, Any]]]]:
    """{value: lines} for each combination of form and other fields that has several numeric values of `field`."""
    curves: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for line in lines:
        value = line["settings"].get(field)
        if isinstance(value, int | float) and not isinstance(value, bool) and line["rise"] is not None:
            others = {key: other for key, other in line["settings"].items() if key != field}
            curves.setdefault(f"{line['form']} {others}", {}).setdefault(value, []).append(line)
    return [curve for curve in curves.values() if len(curve) > 1]
