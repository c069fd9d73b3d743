"""`unidetox report`: a page, a table and a csv file of the run's results so far.

Reads the records and results of finished stages, and no model. Redone without --force when one of them changes.

    index.html    self-contained: style and plots inline, no script, no network
    results.csv   a row per number; results.tex a table for a paper (booktabs)
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
from unidetox_jax.report import findings, page, results, tables
from unidetox_jax.report.results import DETOXIFIED, ORIGINAL, Evaluation
from unidetox_jax.stages import analyze, settings
from unidetox_jax.stages.settings import Run, model_name
from unidetox_jax.stages.task import COMPLETE, Task, fingerprint, is_complete, versions

TRAINED = ("pretrained", "toxic", "detoxified", "control")  # metrics.jsonl lies in these or one level below
STAGE_DIRECTORIES = (
    "pretrained", "scorer", "toxic", "distilled", "samples", "detoxified", "control", "baselines/*", "evaluation",
    "analysis",
)  # fmt: skip


def tasks(run: Run) -> list[Task]:
    """The report on what exists when it runs."""

    def inputs() -> dict[str, str]:
        fingerprints = {str(path.relative_to(run.workdir)): fingerprint(path / COMPLETE) for path in finished(run)}
        sweep = run.workdir / "sweep.json"
        return fingerprints | ({sweep.name: fingerprint(sweep)} if sweep.exists() else {})

    def body(directory: epath.Path) -> dict[str, Any]:
        if distributed.is_main_process():
            write(run, directory)
            print(f"report: {directory / 'index.html'}")
        return {}

    recorded = {**dataclasses.asdict(run.report), "name": run.shared.name}
    return [Task("report", run.workdir / "report", recorded, inputs, body, derived=True)]


def finished(run: Run) -> list[epath.Path]:
    """The directories of complete tasks except the report, in stage order, then those that a sweep tested."""
    directories = (*_directories(run, STAGE_DIRECTORIES), *_tested(run))
    return list(dict.fromkeys(path for path in directories if is_complete(path)))


def _sweep(run: Run) -> dict[str, Any]:
    """The content of sweep.json, or {}."""
    return storage.read_json(run.workdir / "sweep.json") or {}


def _tested(run: Run) -> list[epath.Path]:
    """The evaluations of the variants that a sweep chose for all targets."""
    return [run.workdir / line["directory"] for line in _sweep(run).get("test", ()) if line["for_all"]]


def write(run: Run, directory: epath.Path) -> None:
    """Writes the page, the tables and the plots."""
    from unidetox_jax.report import plots, sweep_plots  # Matplotlib is not to delay the start of `unidetox run`

    evaluations = load_evaluations(run)
    rows, quantities = results.rows(evaluations), results.quantities(evaluations)
    analysis, distilled = _text_results(run)
    stages = [storage.read_json(path / COMPLETE) for path in finished(run)]
    sweep = _sweep(run)
    sweep_lines = tables.sweep_lines(sweep) if sweep else []
    result_plots = [
        plots.trade_off(rows),
        plots.categories(rows),
        plots.changes(rows, quantities),
        sweep_plots.frontier(sweep_lines),
        sweep_plots.sensitivity(sweep_lines),
    ]
    leaning, training = plots.leaning(analysis) if analysis else None, plots.training(training_curves(run))
    for plot in filter(None, (*result_plots, leaning, training)):
        storage.write_bytes(directory / "plots" / f"{plot.name}.png", plot.png())
    if rows:
        storage.write_text(directory / "results.csv", tables.results_csv(rows))
        storage.write_text(directory / "results.tex", page.to_latex(rows, quantities))
    text = page.render(
        title=run.shared.name,
        lead=_lead(run, evaluations),
        note=run.report.note,
        findings=findings.statements(rows, quantities, analysis),
        warnings=findings.warnings(rows, analysis, distilled),
        rows=rows,
        quantities=quantities,
        plots=[plot for plot in result_plots if plot],
        leaning=leaning,
        training=training,
        analysis=analysis,
        distilled=distilled,
        examples=examples(run, evaluations),
        sweep=sweep,
        stages=stages,
        changed_settings=changed_settings([stage for stage in stages if "method" not in stage["settings"]]),
        footer=f"Made by unidetox_jax {versions()['unidetox-jax']} from a working directory; needs no network.",
    )
    storage.write_text(directory / "index.html", text)


def summary_table(run: Run) -> str:
    """For the terminal: the table's primary columns, then findings and warnings."""
    evaluations = load_evaluations(run)
    if not evaluations:
        return "no model has been evaluated"
    rows, quantities = results.rows(evaluations), results.quantities(evaluations)
    analysis, distilled = _text_results(run)
    lines = [tables.to_text(rows, [quantity for quantity in quantities if quantity.primary]), ""]
    lines += [f"- {finding.sentence}" for finding in findings.statements(rows, quantities, analysis)]
    lines += [f"! {text}" for text in findings.warnings(rows, analysis, distilled)]
    return "\n".join(lines)


def load_evaluations(run: Run) -> list[Evaluation]:
    """Every complete evaluation: the configuration's targets in order, each in its forms, then all others.

    Raises:
      UserError: a file that `unidetox evaluate` did not write.
    """
    directories = dict.fromkeys([*_directories(run, ["evaluation"]), *_tested(run)])
    loaded = [results.read(path) for path in directories if is_complete(path)]
    evaluations = {(one.name, one.form): one for one in loaded}.values()  # a sweep's test replaces others of its form
    targets = [model_name(target) for target in run.shared.targets]
    forms = results.in_order(evaluation.form for evaluation in evaluations)

    def order(evaluation: Evaluation) -> tuple:
        name = evaluation.name
        return targets.index(name) if name in targets else len(targets), name, forms.index(evaluation.form)

    return sorted(evaluations, key=order)


def _text_results(run: Run) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(the analysis with the run's own texts first, the figures of the distill stage); None if missing."""
    analysis = storage.read_json(run.workdir / "analysis" / "analysis.json")
    if analysis:
        own = [name for name in (analyze.DISTILLED, analyze.SAMPLES) if name in analysis["sets"]]
        analysis["sets"] = {name: analysis["sets"][name] for name in dict.fromkeys([*own, *analysis["sets"]])}
    return analysis, (storage.read_json(run.directory("distilled") / COMPLETE) or {}).get("figures")


def changed_settings(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A table of settings that differ from their defaults or have none, except the model, which the task's name says.

    Tasks of one stage (detoxify A, detoxify B) share a row for their common settings.
    """
    tasks_of: dict[str, list[str]] = {}
    tasks_with: dict[tuple[str, str], list[str]] = {}
    for record in records:
        stage = record["stage"].partition(" ")[0]
        tasks_of.setdefault(stage, []).append(record["stage"])
        for name, value in _flatten(record["settings"]):
            default = _default(stage, name)
            if name != "model" and value not in ("", default):
                setting = f"{name}={_shown(value)}" + (f" ({_shown(default)})" if default != "" else "")
                tasks_with.setdefault((stage, setting), []).append(record["stage"])
    rows: dict[str, list[str]] = {}
    for (stage, setting), tasks in sorted(tasks_with.items(), key=lambda item: list(tasks_of).index(item[0][0])):
        rows.setdefault(stage if tasks == tasks_of[stage] else ", ".join(tasks), []).append(setting)
    return [{"Stage": tasks, "Setting (default)": ", ".join(listed)} for tasks, listed in rows.items()]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of each setting; those of a group as GROUP.NAME."""
    for name, value in values.items():
        yield from _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]


def _default(stage: str, name: str) -> Any:
    """A setting's default as in JSON; "" if it has none."""
    section = "detoxify" if stage == "control" else stage.replace("-", "_")
    value: Any = settings.SECTIONS.get(section)
    for key in name.split("."):
        value = getattr(value, key, "")
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def examples(run: Run, evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Prompts evenly spaced over the categories, with the first continuation by each form of the first model that was
    evaluated before and after (or else of the first model):
    {"text", "category", "answers": [{"name", "form", "text", "score"}, …]}."""
    pairs = results.pairs(evaluations, ORIGINAL, DETOXIFIED)
    if not evaluations or not run.report.examples:
        return []
    first = pairs[0][0] if pairs else evaluations[0]
    indices = _spread(first.categories, run.report.examples)
    prompts = [{**line, "answers": []} for line in _lines(first.directory / "prompts.jsonl", indices)]
    for evaluation in evaluations:
        if evaluation.name != first.name or not results.comparable(evaluation, first):
            continue
        samples = evaluation.metrics["counts"]["samples"]
        lines = _lines(evaluation.directory / "generations.jsonl", [index * samples for index in indices])
        for prompt, line in zip(prompts, lines, strict=True):
            prompt["answers"].append({**line, "name": evaluation.name, "form": evaluation.form})
    return prompts


def _spread(categories: Sequence[str], count: int) -> list[int]:
    """`count` prompt indices at even steps through the prompts sorted by category."""
    order, count = np.argsort(categories, kind="stable"), min(count, len(categories))
    return sorted(order[np.arange(count) * len(order) // count].tolist())


def _lines(path: epath.Path, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The lines of a jsonl file with these indices, in file order; reads no further than the last one."""
    with path.open() as file:
        for index, line in enumerate(itertools.islice(file, max(indices) + 1)):
            if index in indices:
                yield json.loads(line)


def training_curves(run: Run) -> dict[str, list[dict[str, float]]]:
    """{training: the lines of its metrics.jsonl}."""
    return {
        str(path.relative_to(run.workdir)).replace("/", " "): storage.read_lines(path / "metrics.jsonl")
        for path in _directories(run, TRAINED)
        if (path / "metrics.jsonl").exists()
    }


def _directories(run: Run, names: Sequence[str]) -> list[epath.Path]:
    """The existing directories of these names, each followed by those inside it; NAME/* for all inside NAME."""
    directories: list[epath.Path] = []
    for name in names:
        parent = run.workdir / name.removesuffix("/*")
        if parent.exists():
            directories += sorted(parent.iterdir()) if name.endswith("/*") else [parent]
    return [path for directory in directories for path in (directory, *_subdirectories(directory))]


def _subdirectories(directory: epath.Path) -> list[epath.Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir())


def _lead(run: Run, evaluations: Sequence[Evaluation]) -> str:
    names = list(dict.fromkeys(evaluation.name for evaluation in evaluations))
    names = names or [model_name(target) for target in run.shared.targets]
    models = f"{len(names)} models" if len(names) > 1 else names[0]
    return f"UniDetox: {models}, detoxified with text from {model_name(run.shared.base)} and its toxic twin."
