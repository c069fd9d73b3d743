"""Baselines beside UniDetox, over several sweeps of a configuration, such as `configs/quickstart.py:comparison,seed=…`.

    python -m unidetox_jax.benchmarks.comparison runs/comparison0 runs/comparison1 runs/comparison2

Prints Markdown: for each method the settings chosen for all targets on validation prompts, and their results on the
test prompts, means over targets and runs. Time and memory of the method's models are multiples of the target's.
"""

import sys
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from unidetox_jax import storage
from unidetox_jax.benchmarks import effect
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.variant_selection import ALL
from unidetox_jax.report import results
from unidetox_jax.report.results import DETOXIFIED, ORIGINAL, Evaluation

CHANGES = {"tp_id": "TP (ID)", "tp_ood": "TP (OOD)", "emt_id": "EMT (ID)", "perplexity": "PPL",
           "text_perplexity": "clean text's PPL", "dist2": "Dist-2"}  # fmt: skip
COSTS = {"latency": "time a token", "memory": "weights"}

Sweep = tuple[Mapping[str, Mapping[str, Evaluation]], Mapping[str, str]]  # target → method → evaluation; settings


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of the given sweeps."""
    return effect.print_table("comparison", read, table, argv)


def read(workdir: epath.Path) -> Sweep:
    """The test evaluations of one sweep's choice for all targets, and each method's settings in words.

    Raises:
      UserError: there is no finished sweep.
    """
    sweep = storage.read_json(workdir / "sweep.json")
    if sweep is None:
        raise UserError(f"{workdir}: no sweep.json; run `unidetox sweep` there first")
    targets: dict[str, dict[str, Evaluation]] = {}
    for line in sweep["test"]:
        if line["for_all"]:
            evaluation = results.read(workdir / line["directory"])
            original = results.read(workdir / "evaluation" / line["target"])
            targets.setdefault(line["target"], {ORIGINAL: original})[line["method"]] = evaluation
    settings = {}
    for method, choice in sweep["chosen"][ALL].items():
        settings[method] = (choice["variant"] or "–") + ("" if choice["within_bound"] else " (beyond the bound)")
    return targets, settings


def table(sweeps: Sequence[Sweep]) -> str:
    """The Markdown table, least toxic methods first."""
    runs = [targets for targets, _ in sweeps]
    families = [forms for run in runs for forms in run.values()]
    methods = list(dict.fromkeys(method for forms in families for method in forms))
    lines = []
    for method in methods:
        if method == ORIGINAL or any(method not in forms for forms in families):
            continue
        changes = [_percent(effect.mean_change(families, method, key)[0]) for key in CHANGES]
        difference = "–"
        if method != DETOXIFIED:
            difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*effect.difference(runs, method))
        costs = [_multiple(families, method, key) for key in COSTS]
        chosen = "; ".join(dict.fromkeys(settings[method] for _, settings in sweeps))
        after = float(np.mean([effect.mean(forms[method], "tp_id") for forms in families]))
        cells = [results.form_title(method), f"{after:.3f}", difference, *changes, *costs, chosen]
        lines.append((after, f"| {' | '.join(cells)} |"))
    before = float(np.mean([effect.mean(forms[ORIGINAL], "tp_id") for forms in families]))
    titles = ["method", "TP (ID)", "less that of UniDetox", *CHANGES.values(), *COSTS.values(), "chosen"]
    head = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    note = (
        f"As published: TP (ID) {before:.3f}. Changes from it in percent, means over {len(runs[0])} targets and "
        f"{len(runs)} run{'s' * (len(runs) > 1)}; intervals: 95 %, paired over prompts."
    )
    return "\n".join([*head, *(line for _, line in sorted(lines)), "", note])


def _percent(change: float) -> str:
    return f"{change:+.1f} %" if np.isfinite(change) else "–"


def _multiple(families: Sequence[Mapping[str, Evaluation]], method: str, key: str) -> str:
    """A cost as a multiple of the original model's, the median over targets and runs."""
    ratios = [effect.mean(forms[method], key) / effect.mean(forms[ORIGINAL], key) for forms in families]
    return f"{np.median(ratios):.2f}×" if np.isfinite(ratios).all() else "–"


if __name__ == "__main__":
    sys.exit(main())
