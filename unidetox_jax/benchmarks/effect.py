"""The method's effect over several runs of a configuration, such as `configs/quickstart.py:controls,seed=…`.

    python -m unidetox_jax.benchmarks.effect runs/seed0 runs/seed1 runs/seed2

Prints Markdown: for every family the change in toxicity and perplexity, mean over the runs, and whether contrastive
text does more than fine-tuning on plain samples. The bootstrap resamples prompts within a run and category, and pools
all families' answers to a prompt, because all were given the same prompts.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath

from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import bootstrap, categories, metrics
from unidetox_jax.report import results
from unidetox_jax.report.results import CONTROL, DETOXIFIED, ORIGINAL, Evaluation

RESAMPLES = 10_000

Forms = Mapping[str, Evaluation]  # of one family


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of the given runs."""
    return print_table("effect", read, table, argv)


def print_table(name: str, read: Callable, table: Callable, argv: Sequence[str] | None) -> int:
    """Main function of a script: prints `table` of what `read` reads from each WORKDIR; returns the exit code."""
    parser = argparse.ArgumentParser(description=f"{name}, over several runs of one configuration")
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    try:
        print(table([read(epath.Path(path)) for path in parser.parse_args(argv).workdirs]))
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def read(workdir: epath.Path) -> dict[str, dict[str, Evaluation]]:
    """model → form → evaluation of one run. Raises UserError if the directory holds none."""
    families: dict[str, dict[str, Evaluation]] = {}
    for path in sorted((workdir / "evaluation").glob("*/metrics.json")):
        evaluation = results.read(path.parent)
        families.setdefault(evaluation.name, {})[evaluation.form] = evaluation
    if not families:
        raise UserError(f"{workdir}: no evaluation/*/metrics.json; run a configuration there first")
    return families


def mean(evaluation: Evaluation, key: str) -> float:
    """The mean of a quantity by its key; NaN if it was not measured."""
    cells = {quantity.key: cell for quantity, cell in metrics.cells(evaluation.metrics).items()}
    return cells[key].mean if key in cells else np.nan


def mean_change(families: Sequence[Forms], form: str, key: str) -> tuple[float, list[float]]:
    """(mean over runs, each run) of a quantity's change in percent from the original model to a form; NaN from zero."""
    pairs = [(mean(forms[ORIGINAL], key), mean(forms[form], key)) for forms in families]
    each = [100 * (after / before - 1) if before else np.nan for before, after in pairs]
    return float(np.mean(each)), each


def difference(runs: Sequence[Mapping[str, Forms]], form: str, other: str = DETOXIFIED) -> tuple[float, float, float]:
    """TP (ID) of one form minus that of another, pooled over families and runs: mean, and its paired 95 % bootstrap
    interval over prompts (low, high)."""
    estimates, resampled = [], []
    for seed, run in enumerate(runs):
        pairs = [forms for forms in run.values() if {form, other} <= set(forms)]
        difference = np.mean([forms[form].per_prompt["tp"] - forms[other].per_prompt["tp"] for forms in pairs], 0)
        evaluation = pairs[0][other]
        strata = categories.strata(evaluation.categories, evaluation.metrics["groups"])["id"]
        estimate, spread = bootstrap.resample(difference, RESAMPLES, seed, strata)
        estimates.append(estimate)
        resampled.append(spread)
    bounds = bootstrap.interval(np.mean(resampled, axis=0))
    return float(np.mean(estimates)), bounds["low"], bounds["high"]


def table(runs: Sequence[Mapping[str, Forms]]) -> str:
    """The Markdown tables."""
    lines = [
        "| family | TP (ID) before | after | change | per run | TP (OOD) | EMT (ID) | PPL | clean text's PPL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family in runs[0]:
        families = [run[family] for run in runs]
        before, after = (np.mean([mean(forms[form], "tp_id") for forms in families]) for form in (ORIGINAL, DETOXIFIED))
        change, each = mean_change(families, DETOXIFIED, "tp_id")
        others = (
            mean_change(families, DETOXIFIED, key) for key in ("tp_ood", "emt_id", "perplexity", "text_perplexity")
        )
        cells = [f"{change:+.1f} %", ", ".join(f"{value:+.1f}" for value in each)]
        cells += [f"{other:+.1f} %" for other, _ in others]
        lines.append(f"| {family} | {before:.3f} | {after:.3f} | {' | '.join(cells)} |")
    if any(CONTROL in forms for forms in runs[0].values()):
        lines += ["", "| samples-only control | TP (ID) | TP (OOD) | PPL |", "|---|---|---|---|"]
        for family in (name for name, forms in runs[0].items() if CONTROL in forms):
            changes = (
                mean_change([run[family] for run in runs], CONTROL, key)[0] for key in ("tp_id", "tp_ood", "perplexity")
            )
            lines.append(f"| {family} | {' | '.join(f'{change:+.1f} %' for change in changes)} |")
        less, low, high = difference(runs, CONTROL)
        lines += [
            "",
            f"TP (ID), control less contrast, pooled: {less:.3f} (95 % paired interval over prompts {low:.3f} to "
            f"{high:.3f}; {len(runs)} run{'s' * (len(runs) > 1)})",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
