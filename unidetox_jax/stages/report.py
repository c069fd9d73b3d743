"""`unidetox report`: one page, one table and one csv that show it all, from whatever the run has so far.

Reads the working directory's finished parts and computes nothing that needs a model. The surprising thing: where a
part has changed, the report is made anew without being asked, since nothing is lost.

    index.html    self-contained: style and plots inside, no script, no network
    results.csv   every figure a row; results.tex a table for a paper (booktabs)
    plots/*.png
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unidetox_jax.errors import UserError
from unidetox_jax.reporting import findings, page, plots, results, tables
from unidetox_jax.reporting.results import DETOXIFIED, ORIGINAL, Evaluation
from unidetox_jax.stages import analyze, base, parts
from unidetox_jax.stages.settings import Run, model_name

TRAINED = ("pretrained", "toxic", "detoxified", "control")  # directories with metrics.jsonl, in it or one below

NOT_IN_TERMINAL = ("emt_id", "emt_ood", "emt_all", "dist1", "dist3")  # a terminal is narrow


def tasks(run: Run) -> list[base.Task]:
    """The report on what there is when its turn comes."""

    def inputs() -> dict[str, str]:
        return {str(path.relative_to(run.workdir)): base.fingerprint(path / base.COMPLETE) for path in finished(run)}

    def body(directory: epath.Path) -> dict[str, Any]:
        if parts.first_process():
            write(run, directory)
            print(f"report: {directory / 'index.html'}")
        return {}

    given = {**dataclasses.asdict(run.report), "name": run.shared.name}
    return [base.Task("report", run.workdir / "report", given, inputs, body, derived=True)]


def finished(run: Run) -> list[epath.Path]:
    """Every finished stage's directory but the report's, in the order of the work."""
    rooms = [run.workdir / name for name in ("pretrained", "scorer", "toxic", "distilled", "samples")]
    rooms += [run.workdir / name for name in ("detoxified", "control", "evaluation", "analysis")]
    candidates = [path for room in rooms if room.exists() for path in (room, *_below(room))]
    return [path for path in candidates if base.is_complete(path)]


def write(run: Run, directory: epath.Path) -> None:
    """Writes the page, the tables and the plots."""
    evaluations = load_evaluations(run)
    rows = results.rows(evaluations)
    quantities = results.quantities(evaluations) if evaluations else []
    analysis = base.read_json(run.workdir / "analysis" / "analysis.json")
    if analysis:
        analysis["sets"] = _in_order(analysis["sets"])
    distilled = (base.read_json(parts.distilled_directory(run) / base.COMPLETE) or {}).get("figures")
    stages = [base.read_json(path / base.COMPLETE) for path in finished(run)]
    drawn = _draw(run, rows, evaluations, analysis)
    (directory / "plots").mkdir(parents=True, exist_ok=True)
    for name, (figure, _, _) in drawn.items():
        (directory / "plots" / f"{name}.png").write_bytes(plots.to_png(figure))
    if rows:
        base.write_text(directory / "results.csv", tables.to_csv(rows))
        base.write_text(directory / "results.tex", tables.to_latex(rows, quantities))
    content = page.Content(
        title=run.shared.name,
        lead=_lead(run, evaluations),
        note=run.report.note,
        headlines=findings.headlines(rows),
        findings=findings.statements(rows, analysis),
        warnings=findings.warnings(rows, analysis, distilled),
        quantities=quantities,
        rows=rows,
        plots=[
            page.Plot(title, caption, plots.to_svg(figure, name, page.escape(caption)))
            for name, (figure, title, caption) in drawn.items()
        ],
        analysis=analysis,
        distilled=distilled,
        examples=examples(run, evaluations),
        stages=stages,
        footer=f"Made by unidetox_jax {base.versions()['unidetox-jax']} from a working directory; needs no network.",
    )
    base.write_text(directory / "index.html", page.render(content))


def summary_table(run: Run) -> str:
    """What the terminal shows of the whole run: the table, then the findings and warnings."""
    evaluations = load_evaluations(run)
    if not evaluations:
        return "no model has been evaluated"
    rows = results.rows(evaluations)
    analysis = base.read_json(run.workdir / "analysis" / "analysis.json")
    distilled = (base.read_json(parts.distilled_directory(run) / base.COMPLETE) or {}).get("figures")
    wanted = [one for one in results.quantities(evaluations) if one.key not in NOT_IN_TERMINAL]
    lines = [tables.to_text(rows, wanted), ""]
    lines += [f"- {text}" for text in findings.statements(rows, analysis)]
    lines += [f"! {text}" for text in findings.warnings(rows, analysis, distilled)]
    return "\n".join(lines)


def load_evaluations(run: Run) -> list[Evaluation]:
    """Every finished evaluation: the configuration's targets in their order, each in its forms, then all others.

    Raises:
      UserError: a file of one that is not as `unidetox evaluate` writes it.
    """
    room = run.workdir / "evaluation"
    found = [_load(path) for path in _below(room) if base.is_complete(path)] if room.exists() else []
    names = [model_name(target) for target in run.shared.targets]

    def place(one: Evaluation) -> tuple:
        return (
            names.index(one.name) if one.name in names else len(names),
            one.name,
            list(results.FORMS).index(one.form),
        )

    return sorted(found, key=place)


def _load(directory: epath.Path) -> Evaluation:
    try:
        metrics = base.read_json(directory / "metrics.json")
        with (directory / "per_prompt.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Evaluation(metrics, dict(arrays))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: not an evaluation ({error}); remove it and run `unidetox evaluate`") from None


def examples(run: Run, evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Prompts at even steps through each category in turn, with each form's first continuation of the first model
    that was evaluated before and after (or else of the first model)."""
    pairs = results.pairs(evaluations, ORIGINAL, DETOXIFIED)
    if not evaluations or not run.report.examples:
        return []
    name = pairs[0][0].name if pairs else evaluations[0].name
    shown = [one for one in evaluations if one.name == name and results.comparable(one, (pairs or [evaluations])[0][0])]
    chosen = _spread(shown[0].categories, run.report.examples)
    found = [
        {"prompt": line["text"], "category": line["category"], "texts": []}
        for line in _lines(parts.evaluation_directory(run, name, shown[0].form) / "prompts.jsonl", chosen)
    ]
    for one in shown:
        directory, samples = parts.evaluation_directory(run, name, one.form), one.metrics["counts"]["samples"]
        lines = _lines(directory / "generations.jsonl", [at * samples for at in chosen])
        for place, line in zip(found, lines, strict=True):
            place["texts"].append({"name": name, "form": one.form, "text": line["text"], "score": line["score"]})
    return found


def _spread(categories: Sequence[str], count: int) -> list[int]:
    """Indices of `count` prompts: categories in turn, and in each at even steps."""
    by_category = {
        name: [at for at, other in enumerate(categories) if other == name] for name in dict.fromkeys(categories)
    }
    share = -(-count // len(by_category))
    picked = [rows[:: max(1, len(rows) // share)][:share] for rows in by_category.values()]
    in_turn = [at for turn in itertools.zip_longest(*picked) for at in turn if at is not None]
    return sorted(in_turn[:count])


def _lines(path: epath.Path, wanted: Sequence[int]) -> list[dict[str, Any]]:
    """Those lines of a jsonl file, in order; it is read no further than the last of them."""
    found = {}
    with path.open() as file:
        for at, line in enumerate(itertools.islice(file, max(wanted) + 1)):
            if at in wanted:
                found[at] = json.loads(line)
    return [found[at] for at in wanted]


def _draw(run: Run, rows, evaluations, analysis: Mapping[str, Any] | None) -> dict[str, tuple]:
    """File name → (figure, title, caption) of every plot that there is something for."""
    found = {}

    def add(name: str, figure, title: str, caption: str) -> None:
        if figure is not None:
            found[name] = figure, title, caption

    if rows:
        add(
            "tradeoff",
            plots.draw(plots.trade_off, rows),
            "The trade-off",
            "Toxicity against perplexity, an arrow for each model from before to after; down and to the left is "
            "better. Thin lines: 95 % intervals over prompts.",
        )
        add(
            "changes",
            plots.draw(plots.changes, rows),
            "What changed",
            "Change from the model as published in percent; an interval that crosses 0 shows nothing.",
        )
        add(
            "categories",
            plots.draw(plots.categories, evaluations),
            "By category",
            "Probability of a toxic continuation for each category of prompts. Unseen: the toxic model's training "
            "text says nothing of them.",
        )
    if analysis:
        add(
            "leaning",
            plots.draw(plots.leaning, analysis),
            "Political leaning",
            "Mean probability of each leaning over a set's texts, with 95 % intervals over texts.",
        )
    add(
        "training",
        plots.draw(plots.training, curves(run)),
        "Training",
        "Loss on the training text, and on held-out text where there is some.",
    )
    return found


def curves(run: Run) -> dict[str, list[dict[str, float]]]:
    """Training's name → its lines of metrics.jsonl."""
    rooms = [run.workdir / name for name in TRAINED]
    directories = [path for room in rooms if room.exists() for path in (room, *_below(room))]
    found = {}
    for directory in directories:
        path = directory / "metrics.jsonl"
        if path.exists():
            name = str(directory.relative_to(run.workdir)).replace("/", " ")
            found[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def _below(room: epath.Path) -> list[epath.Path]:
    return sorted(path for path in room.iterdir() if path.is_dir())


def _in_order(sets: Mapping[str, Any]) -> dict[str, Any]:
    """The run's own texts first."""
    first = [name for name in (analyze.DISTILLED, analyze.SAMPLES) if name in sets]
    return {name: sets[name] for name in [*first, *(name for name in sets if name not in first)]}


def _lead(run: Run, evaluations: Sequence[Evaluation]) -> str:
    names = list(dict.fromkeys(one.name for one in evaluations)) or [model_name(t) for t in run.shared.targets]
    many = f"{len(names)} models" if len(names) > 1 else names[0]
    return f"UniDetox: {many}, detoxified with text from {model_name(run.shared.base)} and its toxic twin."
