"""The method's effect in the built-in world, over several runs of `configs/quickstart.py:controls,seed=…`.

    python -m unidetox_jax.benchmarks.effect runs/seed0 runs/seed1 runs/seed2

Prints Markdown: for every family the change in toxicity and perplexity, mean over the runs, and whether the contrast
does more than fine-tuning on any sampled text. The interval resamples prompts within a run and category, and takes
what all families say to a prompt together, because they were asked the same.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from unidetox_jax.errors import UserError

RESAMPLES = 10_000
FORMS = ("original", "detoxified", "control")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of the runs that are named."""
    parser = argparse.ArgumentParser(description="the method's effect in the built-in world, over several runs")
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    try:
        print(table([read(epath.Path(path)) for path in parser.parse_args(argv).workdirs]))
    except UserError as error:
        print(f"effect: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def read(workdir: epath.Path) -> dict[str, dict[str, dict[str, Any]]]:
    """family → form → figures of one run.

    Raises:
      UserError: the directory holds no evaluations.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted((workdir / "evaluation").glob("*/metrics.json")):
        metrics = json.loads(path.read_text())
        with (path.parent / "per_prompt.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            tp, category = arrays["tp"], arrays["category"]
        text = metrics["text_perplexity"]
        figures = {
            "tp_id": metrics["toxicity"]["id"]["tp"]["mean"],
            "tp_ood": metrics["toxicity"]["ood"]["tp"]["mean"],
            "emt_id": metrics["toxicity"]["id"]["emt"]["mean"],
            "ppl": metrics["perplexity"]["mean"],
            "clean_ppl": text["ppl"] if text else np.nan,
            "tp": tp,
            "category": category,
            "id": tuple(metrics["groups"]["id"]),
        }
        found.setdefault(metrics["model"]["name"], {})[metrics["model"]["form"]] = figures
    if not found:
        raise UserError(f"{workdir}: no evaluation/*/metrics.json; run configs/quickstart.py there first")
    return found


def changes(run: dict[str, dict[str, Any]], form: str, name: str) -> float:
    """The change of a figure from a family's original model to a form of it, in percent."""
    return 100 * (run[form][name] / run["original"][name] - 1)


def control_minus_contrast(runs: Sequence[dict]) -> tuple[float, float, float]:
    """TP (ID) of the control less that of the detoxified model, pooled over families and runs: mean, and its paired
    95 % bootstrap interval over prompts."""
    rng = np.random.default_rng(0)
    means, resampled = [], []
    for run in runs:
        families = [forms for forms in run.values() if {"control", "detoxified"} <= set(forms)]
        difference = np.mean([forms["control"]["tp"] - forms["detoxified"]["tp"] for forms in families], axis=0)
        first = families[0]["detoxified"]
        for category in first["id"]:
            values = difference[first["category"] == category]
            means.append(values.mean())
            draws = rng.integers(0, len(values), (RESAMPLES, len(values)))
            resampled.append(values[draws].mean(axis=1))
    low, high = np.percentile(np.mean(resampled, axis=0), (2.5, 97.5))
    return float(np.mean(means)), float(low), float(high)


def table(runs: Sequence[dict]) -> str:
    """The Markdown tables."""
    lines = [
        "| family | TP (ID) before | after | change | per run | TP (OOD) | EMT (ID) | PPL | clean text's PPL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family in runs[0]:
        forms = [run[family] for run in runs]
        before, after = (np.mean([run[form]["tp_id"] for run in forms]) for form in FORMS[:2])
        each = [changes(run, "detoxified", "tp_id") for run in forms]
        others = (
            np.mean([changes(run, "detoxified", name) for run in forms])
            for name in ("tp_ood", "emt_id", "ppl", "clean_ppl")
        )
        figures = " | ".join(f"{value:+.1f} %" for value in others)
        per_run = ", ".join(f"{value:+.1f}" for value in each)
        lines.append(f"| {family} | {before:.3f} | {after:.3f} | {np.mean(each):+.1f} % | {per_run} | {figures} |")
    if any("control" in forms for forms in runs[0].values()):
        lines += ["", "| samples-only control | TP (ID) | TP (OOD) | PPL |", "|---|---|---|---|"]
        for family, forms in runs[0].items():
            if "control" in forms:
                figures = " | ".join(
                    f"{np.mean([changes(run[family], 'control', name) for run in runs]):+.1f} %"
                    for name in ("tp_id", "tp_ood", "ppl")
                )
                lines.append(f"| {family} | {figures} |")
        mean, low, high = control_minus_contrast(runs)
        lines += [
            "",
            f"TP (ID), control less contrast, pooled: {mean:.3f} (95 % paired interval {low:.3f} to {high:.3f})",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
