"""How much a method's result depends on its settings: the plot of a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unidetox_jax.report.plots import COLORS, Plot, styled, subplots

SHOWN = {"tp": ("TP", 1.0), "rise": ("perplexity, change in %", 100.0)}
WIDE = 8  # times the smallest value: from there on an axis is logarithmic


@styled
def sensitivity(lines: Sequence[Mapping[str, Any]]) -> Plot | None:
    """TP and the change of perplexity over each swept number, means over targets; None where nothing numeric changed.

    lines: of a sweep, each with "method", "settings" (field → value), "tp" and "rise". What differs in one field alone
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
                y = [scale * float(np.mean([line[key] for line in points[value]])) for value in x]
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


def _curves(lines: Sequence[Mapping[str, Any]], field: str) -> list[dict[float, list[Mapping[str, Any]]]]:
    """Value → lines of each combination of the other fields and the method, where there are several numbers."""
    found: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for line in lines:
        value = line["settings"].get(field)
        if isinstance(value, int | float) and not isinstance(value, bool) and line["rise"] is not None:
            others = {key: other for key, other in line["settings"].items() if key != field}
            found.setdefault(f"{line['method']} {others}", {}).setdefault(value, []).append(line)
    return [points for points in found.values() if len(points) > 1]
