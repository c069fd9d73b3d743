"""`unidetox report`: one page, one table and one csv that show it all, from whatever the run has so far.

Reads the working directory's finished stages and computes nothing that needs a model. Where a stage has changed, the
report is made anew without being asked, since nothing is lost.

    index.html    self-contained: style and plots inside, no script, no network
    results.csv   every number a row; results.tex a table for a paper (booktabs)
    plots/*.png
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unidetox_jax import distributed, storage
from unidetox_jax.report import findings, page, plots, results, sweep_plots, tables
from unidetox_jax.report.results import DETOXIFIED, ORIGINAL, Evaluation
from unidetox_jax.stages import analyze, base, common, settings
from unidetox_jax.stages.settings import Run, model_name

TRAINED = ("pretrained", "toxic", "detoxified", "control")  # directories with metrics.jsonl, in it or one below
STAGES = (
    "pretrained", "scorer", "toxic", "distilled", "samples", "detoxified", "control", "baselines/*", "evaluation",
    "analysis",
)  # fmt: skip


def tasks(run: Run) -> list[base.Task]:
    """The report on what there is when its turn comes."""

    def inputs() -> dict[str, str]:
        files = [path / base.COMPLETE for path in finished(run)]
        files += [_sweep_file(run)] if _sweep_file(run).exists() else []
        return {_inside(run, file): base.fingerprint(file) for file in files}

    def body(directory: epath.Path) -> dict[str, Any]:
        if distributed.is_main_process():
            write(run, directory)
            print(f"report: {directory / 'index.html'}")
        return {}

    given = {**dataclasses.asdict(run.report), "name": run.shared.name}
    return [base.Task("report", run.workdir / "report", given, inputs, body, derived=True)]


def finished(run: Run) -> list[epath.Path]:
    """Every finished stage's directory but the report's, in the order of the work, and what a sweep tested."""
    return list(dict.fromkeys(path for path in (*_directories(run, STAGES), *_tested(run)) if base.is_complete(path)))


def _sweep(run: Run) -> dict[str, Any]:
    """What `unidetox sweep` found; empty where there was none."""
    return storage.read_json(_sweep_file(run)) or {}


def _sweep_file(run: Run) -> epath.Path:
    return run.workdir / "sweep.json"


def _inside(run: Run, file: epath.Path) -> str:
    """A file's name among the report's inputs: a stage's is its directory's."""
    return str((file.parent if file.name == base.COMPLETE else file).relative_to(run.workdir))


def _tested(run: Run) -> list[epath.Path]:
    """The evaluations of what a sweep chose for all targets."""
    return [run.workdir / line["directory"] for line in _sweep(run).get("test", ()) if line["for_all"]]


def write(run: Run, directory: epath.Path) -> None:
    """Writes the page, the tables and the plots."""
    evaluations = load_evaluations(run)
    rows, quantities = results.rows(evaluations), results.quantities(evaluations) if evaluations else []
    analysis, distilled = _texts(run)
    stages = [storage.read_json(path / base.COMPLETE) for path in finished(run)]
    sweep = _sweep(run)
    shown = [plots.trade_off(rows), plots.categories(rows), plots.changes(rows, quantities)]
    tried = tables.sweep_lines(sweep) if sweep else []
    shown += [sweep_plots.frontier(tried), sweep_plots.sensitivity(tried)]
    leaning, training = plots.leaning(analysis) if analysis else None, plots.training(training_curves(run))
    for plot in filter(None, (*shown, leaning, training)):
        storage.write_bytes(directory / "plots" / f"{plot.name}.png", plot.png())
    if rows:
        storage.write_text(directory / "results.csv", tables.to_csv(rows))
        storage.write_text(directory / "results.tex", page.to_latex(rows, quantities))
    text = page.render(
        title=run.shared.name,
        lead=_lead(run, evaluations),
        note=run.report.note,
        findings=findings.statements(rows, quantities, analysis),
        warnings=findings.warnings(rows, analysis, distilled),
        rows=rows,
        quantities=quantities,
        plots=[plot for plot in shown if plot],
        leaning=leaning,
        training=training,
        analysis=analysis,
        distilled=distilled,
        examples=examples(run, evaluations),
        sweep=sweep,
        stages=stages,
        changed_settings=changed_settings([stage for stage in stages if "method" not in stage["settings"]]),
        footer=f"Made by unidetox_jax {base.versions()['unidetox-jax']} from a working directory; needs no network.",
    )
    storage.write_text(directory / "index.html", text)


def summary_table(run: Run) -> str:
    """What the terminal shows of the whole run: the table's primary columns, then the findings and warnings."""
    evaluations = load_evaluations(run)
    if not evaluations:
        return "no model has been evaluated"
    rows, quantities = results.rows(evaluations), results.quantities(evaluations)
    analysis, distilled = _texts(run)
    lines = [tables.to_text(rows, [quantity for quantity in quantities if quantity.primary]), ""]
    lines += [f"- {finding.sentence}" for finding in findings.statements(rows, quantities, analysis)]
    lines += [f"! {text}" for text in findings.warnings(rows, analysis, distilled)]
    return "\n".join(lines)


def load_evaluations(run: Run) -> list[Evaluation]:
    """Every finished evaluation: the configuration's targets in their order, each in its forms, then all others.

    Raises:
      UserError: a file of one that is not as `unidetox evaluate` writes it.
    """
    order = [model_name(target) for target in run.shared.targets]

    existing = dict.fromkeys([*_directories(run, ["evaluation"]), *_tested(run)])
    read = [results.read(path) for path in existing if base.is_complete(path)]
    evaluations = {(one.name, one.form): one for one in read}.values()  # of one form what a sweep tested
    forms = results.in_order(evaluation.form for evaluation in evaluations)

    def place(evaluation: Evaluation) -> tuple:
        name = evaluation.name
        return order.index(name) if name in order else len(order), name, forms.index(evaluation.form)

    return sorted(evaluations, key=place)


def _texts(run: Run) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The analysis, the run's own texts first in it, and what the distill stage counted; None where there is none."""
    analysis = storage.read_json(run.workdir / "analysis" / "analysis.json")
    if analysis:
        own = [name for name in (analyze.DISTILLED, analyze.SAMPLES) if name in analysis["sets"]]
        analysis["sets"] = {name: analysis["sets"][name] for name in dict.fromkeys([*own, *analysis["sets"]])}
    return analysis, (storage.read_json(common.distilled_directory(run) / base.COMPLETE) or {}).get("figures")


def changed_settings(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What was set other than its default, or has none; not the model, which the task's name says.

    Tasks of one stage (detoxify A, detoxify B) share a row for what they share.
    """
    tasks: dict[str, list[str]] = {}
    changed: dict[tuple[str, str], list[str]] = {}
    for record in records:
        stage = record["stage"].partition(" ")[0]
        tasks.setdefault(stage, []).append(record["stage"])
        for name, value in _flat(record["settings"]):
            default = _default(stage, name)
            if name != "model" and value not in ("", default):
                setting = f"{name}={_shown(value)}" + (f" ({_shown(default)})" if default != "" else "")
                changed.setdefault((stage, setting), []).append(record["stage"])
    settings_of: dict[str, list[str]] = {}
    for (stage, setting), who in sorted(changed.items(), key=lambda item: list(tasks).index(item[0][0])):
        settings_of.setdefault(stage if who == tasks[stage] else ", ".join(who), []).append(setting)
    return [{"Stage": who, "Setting (default)": ", ".join(listed)} for who, listed in settings_of.items()]


def _flat(values: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of each setting; those of a group as GROUP.NAME."""
    for name, value in values.items():
        yield from _flat(value, f"{within}{name}.") if isinstance(value, Mapping) else [(within + name, value)]


def _default(stage: str, name: str) -> Any:
    """A setting's default as JSON has it; an empty string where there is none."""
    section = "detoxify" if stage == "control" else stage.replace("-", "_")
    value: Any = settings.STAGES.get(section)
    for key in name.split("."):
        value = getattr(value, key, "")
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def examples(run: Run, evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Prompts at even steps through each category in turn, with each form's first continuation of the first model
    that was evaluated before and after (or else of the first model):
    {"text", "category", "answers": [{"name", "form", "text", "score"}, …]}."""
    pairs = results.pairs(evaluations, ORIGINAL, DETOXIFIED)
    if not evaluations or not run.report.examples:
        return []
    first = pairs[0][0] if pairs else evaluations[0]
    chosen = _spread(first.categories, run.report.examples)
    prompts = [{**line, "answers": []} for line in _lines(first.directory / "prompts.jsonl", chosen)]
    for evaluation in evaluations:
        if evaluation.name != first.name or not results.comparable(evaluation, first):
            continue
        samples = evaluation.metrics["counts"]["samples"]
        lines = _lines(evaluation.directory / "generations.jsonl", [prompt * samples for prompt in chosen])
        for prompt, line in zip(prompts, lines, strict=True):
            prompt["answers"].append({**line, "name": evaluation.name, "form": evaluation.form})
    return prompts


def _spread(categories: Sequence[str], count: int) -> list[int]:
    """Indices of `count` prompts at even steps through the prompts in order of their categories."""
    order, count = np.argsort(categories, kind="stable"), min(count, len(categories))
    return sorted(order[np.arange(count) * len(order) // count].tolist())


def _lines(path: epath.Path, wanted: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Those lines of a jsonl file, in order, which `wanted` has to be in; read no further than the last of them."""
    with path.open() as file:
        for index, line in enumerate(itertools.islice(file, max(wanted) + 1)):
            if index in wanted:
                yield json.loads(line)


def training_curves(run: Run) -> dict[str, list[dict[str, float]]]:
    """Training's name → its lines of metrics.jsonl."""
    files = [path / "metrics.jsonl" for path in _directories(run, TRAINED) if (path / "metrics.jsonl").exists()]
    return {
        str(file.parent.relative_to(run.workdir)).replace("/", " "): [
            json.loads(line) for line in file.read_text().splitlines()
        ]
        for file in files
    }


def _directories(run: Run, names: Sequence[str]) -> list[epath.Path]:
    """The working directory's directories of these names, each before those in it."""
    existing = [path for name in names for path in _rooms(run.workdir / name.removesuffix("/*"), name.endswith("/*"))]
    return [path for room in existing for path in (room, *sorted(below for below in room.iterdir() if below.is_dir()))]


def _rooms(path: epath.Path, within: bool) -> list[epath.Path]:
    """A directory, or those within it; none where it is not there."""
    if not path.exists():
        return []
    return sorted(path.iterdir()) if within else [path]


def _lead(run: Run, evaluations: Sequence[Evaluation]) -> str:
    names = list(dict.fromkeys(evaluation.name for evaluation in evaluations)) or [
        model_name(t) for t in run.shared.targets
    ]
    models = f"{len(names)} models" if len(names) > 1 else names[0]
    return f"UniDetox: {models}, detoxified with text from {model_name(run.shared.base)} and its toxic twin."
