"""Every rival beside UniDetox, over several sweeps of one configuration: `configs/quickstart.py:comparison,seed=…`.

    python -m unidetox_jax.benchmarks.comparison runs/comparison0 runs/comparison1 runs/comparison2

Prints Markdown: of each method what was chosen for all targets on validation prompts, and what it came to on the test
prompts, means over targets and runs. Time and memory are those of the method's models, as multiples of the target's.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from unidetox_jax import storage
from unidetox_jax.benchmarks import effect
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.choice import ALL
from unidetox_jax.report import results
from unidetox_jax.report.results import DETOXIFIED, ORIGINAL, Evaluation

CHANGES = {"tp_id": "TP (ID)", "tp_ood": "TP (OOD)", "emt_id": "EMT (ID)", "perplexity": "PPL",
           "text_perplexity": "clean text's PPL", "dist2": "Dist-2"}  # fmt: skip
COSTS = {"latency": "time a token", "memory": "weights"}

Sweep = tuple[Mapping[str, Mapping[str, Evaluation]], Mapping[str, str]]  # target → method → evaluation; settings


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of the sweeps that are named."""
    parser = argparse.ArgumentParser(description="every method, over several sweeps of one configuration")
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    try:
        print(table([read(epath.Path(path)) for path in parser.parse_args(argv).workdirs]))
    except UserError as error:
        print(f"comparison: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def read(workdir: epath.Path) -> Sweep:
    """What was tested of what one sweep chose for all targets, and each method's settings in words.

    Raises:
      UserError: no finished sweep lies there.
    """
    sweep = storage.read_json(workdir / "sweep.json")
    if sweep is None:
        raise UserError(f"{workdir}: no sweep.json; run `unidetox sweep` there first")
    found: dict[str, dict[str, Evaluation]] = {}
    for line in sweep["test"]:
        if line["for_all"]:
            evaluation = results.read(workdir / line["directory"])
            original = results.read(workdir / "evaluation" / line["target"])
            found.setdefault(line["target"], {ORIGINAL: original})[line["method"]] = evaluation
    settings = {}
    for method, choice in sweep["chosen"][ALL].items():
        settings[method] = (choice["variant"] or "–") + ("" if choice["within_bound"] else " (beyond the bound)")
    return found, settings


def table(sweeps: Sequence[Sweep]) -> str:
    """The Markdown table, the methods in the order of their toxicity."""
    runs = [targets for targets, _ in sweeps]
    methods = list(dict.fromkeys(method for run in runs for forms in run.values() for method in forms))
    every = [forms for run in runs for forms in run.values()]
    lines = []
    for method in methods:
        if method == ORIGINAL or any(method not in forms for forms in every):
            continue
        changes = [_percent(effect.mean_change(every, method, key)[0]) for key in CHANGES]
        less = "–"
        if method != DETOXIFIED:
            less = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*effect.difference(runs, method))
        costs = [_share(every, method, key) for key in COSTS]
        chosen = "; ".join(dict.fromkeys(settings[method] for _, settings in sweeps))
        after = float(np.mean([effect.mean(forms[method], "tp_id") for forms in every]))
        cells = [results.title(method), f"{after:.3f}", less, *changes, *costs, chosen]
        lines.append((after, f"| {' | '.join(cells)} |"))
    before = float(np.mean([effect.mean(forms[ORIGINAL], "tp_id") for forms in every]))
    titles = ["method", "TP (ID)", "less that of UniDetox", *CHANGES.values(), *COSTS.values(), "chosen"]
    head = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    said = (
        f"As published: TP (ID) {before:.3f}. Changes from it in percent, means over {len(runs[0])} targets and "
        f"{len(runs)} run{'s' * (len(runs) > 1)}; intervals: 95 %, paired over prompts."
    )
    return "\n".join([*head, *(line for _, line in sorted(lines)), "", said])


def _percent(change: float) -> str:
    return f"{change:+.1f} %" if np.isfinite(change) else "–"


def _share(every: Sequence[Mapping[str, Evaluation]], method: str, key: str) -> str:
    """A cost as a multiple of the published model's, the median over targets and runs."""
    shares = [effect.mean(forms[method], key) / effect.mean(forms[ORIGINAL], key) for forms in every]
    return f"{np.median(shares):.2f}×" if np.isfinite(shares).all() else "–"


if __name__ == "__main__":
    sys.exit(main())
