"""What a setting of distillation does to the text, and the text to the models, over sweeps of such settings.

    python -m unidetox_jax.benchmarks.distilled_text WORKDIR

Reads the texts of WORKDIR (its samples of the base model, its distilled text) and of WORKDIR/cells, scores them with
every classifier of WORKDIR/scorer, and adds the evaluations on validation prompts that lie beside each text. Prints
Markdown, a line for each text. Sweeps of one working directory share its samples and what they have in common.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from unidetox_jax import data, storage, text_statistics
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation import scorers
from unidetox_jax.report import results
from unidetox_jax.report.results import CONTROL, DETOXIFIED, Change
from unidetox_jax.stages.analyze import DISTILLED, SAMPLES
from unidetox_jax.stages.sweep import VALIDATION

TOXIC = 0.5  # a score above this counts as toxic
MOSTLY_SYMBOLS = 0.4  # a share that code, tables and mathematics exceed; prose has 0.1 to 0.35
CHANGES = {"tp_id": "TP (ID)", "tp_ood": "TP (OOD)", "perplexity": "PPL"}


class TextSet(NamedTuple):
    """A directory's texts, and the directory and the form in which models trained on them were evaluated."""

    name: str
    directory: epath.Path
    evaluations: epath.Path
    form: str


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of a working directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdir", metavar="WORKDIR", type=epath.Path)
    try:
        print(table(parser.parse_args(argv).workdir))
    except UserError as error:
        print(f"distilled_text: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def text_sets(workdir: epath.Path) -> Iterator[TextSet]:
    """The samples, the distilled text and that of every cell, where they exist."""
    yield TextSet("samples of the base model", workdir / SAMPLES, workdir, CONTROL)
    yield TextSet("as configured", workdir / DISTILLED, workdir, DETOXIFIED)
    for cell in sorted((workdir / "cells").glob("*")):
        yield TextSet(f"`{cell.name}`", cell / DISTILLED, cell, DETOXIFIED)


def table(workdir: epath.Path) -> str:
    """The Markdown table. Raises UserError if there is no text."""
    sets = [one for one in text_sets(workdir) if (one.directory / "stage.json").exists()]
    if not sets:
        raise UserError(f"{workdir}: no distilled text; run `unidetox sweep` there first")
    files = [*(workdir / "scorer").glob("linear.json"), *sorted((workdir / "scorer").glob("*/linear.json"))]
    judges = {file.parent.name: scorers.get(f"linear:{file.parent}") for file in files}
    head = ["text", *(f"toxic by {name}" for name in judges), "mostly symbols", "repeated 4-grams", "sampled a text"]
    head += [f"{title} of models" for title in CHANGES.values()]
    lines = [head, ["---"] * len(head)]
    for one in sets:
        texts = list(data.texts(f"distilled:{one.directory / 'texts.jsonl'}"))
        made = storage.read_json(one.directory / "stage.json")["figures"].get("made", len(texts))
        cells = [f"{np.mean(judge(texts) > TOXIC):.1%}" for judge in judges.values()]
        symbols = np.mean([text_statistics.symbol_share(text) > MOSTLY_SYMBOLS for text in texts])
        repeated = np.mean([text_statistics.repeated_share(text) for text in texts])
        cells += [f"{symbols:.0%}", f"{repeated:.1%}", f"{made / len(texts):.2f}"]
        lines.append([one.name, *cells, *_changes(workdir, one)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _changes(workdir: epath.Path, text_set: TextSet) -> list[str]:
    """The changes of the models that were trained on a text, with their intervals, a target after the other."""
    lines = []
    for path in sorted((text_set.evaluations / VALIDATION).glob(f"*.{text_set.form}/metrics.json")):
        after = results.read(path.parent)
        _, row = results.rows([results.read(workdir / VALIDATION / after.name), after])
        lines.append([_in_words(row.cells[key].change if key in row.cells else None) for key in CHANGES])
    return [" / ".join(column) for column in zip(*lines, strict=True)] or ["–"] * len(CHANGES)


def _in_words(change: Change | None) -> str:
    return "–" if change is None else f"{change['percent']:+.1f} % [{change['low']:+.1f}, {change['high']:+.1f}]"


if __name__ == "__main__":
    sys.exit(main())
