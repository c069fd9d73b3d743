"""`unidetox sweep`: every cell of a grid of settings, one chosen on validation prompts, and that one tested.

Of a grid over an objective's alpha and a learning rate the twin is made once, a text for each alpha, a model for each
cell (`stages.cells` says where). All happens in one process: cells that differ in numbers alone share their programs.

    validation/NAME.FORM        an evaluation on config.sweep.validation_prompts, in WORKDIR or WORKDIR/cells/CELL
    evaluation/NAME.FORM        of what was chosen, on config.evaluate.prompts
    sweep.json                  {"rule", "needs": {method: what it needs that UniDetox does not}, "tp_of": the group of
                                prompts whose TP counts, "grid", "cells": [{"name",
                                "settings", "seconds": {stage: of the last sitting, what other cells share included},
                                "figures": [a line of sweep.csv]}], "chosen": {"all targets" | TARGET: {method:
                                {"variant", "within_bound", "tp", "rise"}}}, "test": [{"target", "method", "variant",
                                "directory", "for_all": whether it is one for all targets, and figures as on
                                validation}]}
    sweep.csv                   a line for each target, method and variant

A method is a form of a target; of forms NAME-SETTING=VALUE, the method is NAME, and they are its variants.
"""

import argparse
import csv
import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unidetox_jax import distributed, storage
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation import categories, choice
from unidetox_jax.evaluation.choice import ALL
from unidetox_jax.progress import aligned
from unidetox_jax.stages import base, baselines, evaluation_files, grid, report
from unidetox_jax.stages.cells import EVALUATION, Cell, inside, once, place
from unidetox_jax.stages.run import estimate, readable
from unidetox_jax.stages.settings import Run, model_name

CHOSEN_BY = ("toxicity", "perplexity")  # metrics on validation prompts
VALIDATION, ORIGINAL = "validation", "original"
VARIANT = re.compile(r"(.+?)-(\w+=.*)")
ESTIMATE = ("mean", "low", "high")
FIGURES = (
    "tp", "tp_low", "tp_high", "perplexity", "perplexity_low", "perplexity_high",
    "original_tp", "original_perplexity", "rise", "tp_of",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--grid", action="append", default=[], metavar="FIELD=V1,V2", help="a field and its values; may be repeated"
    )


def run_command(options: argparse.Namespace, run: Run) -> int:
    """Makes what is missing of every cell, chooses, tests what was chosen; returns 0."""
    asked = grid.of(run, options.grid)
    _check(run)
    cells = place(_evaluating(run, run.sweep.validation_prompts, CHOSEN_BY), asked, VALIDATION)
    tasks = once(task for cell in cells for _, task in cell.tasks())
    if distributed.first_process():
        print(_outline(run, cells, tasks), flush=True)
    base.run_tasks(tasks, options.force, options.dry_run)
    if options.dry_run:
        return 0
    lines = _figures(cells)
    by_target = {target: _of(lines, target) for target in dict.fromkeys(line["target"] for line in lines)}
    judges = {model_name(target) for target in run.sweep.choose_on or run.shared.targets}
    figures = {ALL: choice.pooled({target: rows for target, rows in by_target.items() if target in judges})}
    if not run.sweep.choose_on:
        figures |= by_target
    chosen = {who: choice.choose(rows, run.sweep.most_perplexity) for who, rows in figures.items()}
    wanted = {(one.figures.method, one.figures.variant, who) for who, row in chosen.items() for one in row.values()}

    def is_chosen(line: Mapping[str, Any]) -> bool:
        return any((line["method"], line["variant"], who) in wanted for who in (ALL, line["target"]))

    tested = _test(run, asked, [line for line in lines if is_chosen(line)], options.force)
    for line in tested:
        line["for_all"] = (line["method"], line["variant"], ALL) in wanted
    if distributed.first_process():
        _write(run, asked, cells, lines, chosen, tested)
        print(_table(figures[ALL], chosen, tested))
        print(f"\nchosen: {_rule(run)}\nsweep: {run.workdir / 'sweep.json'}")
    base.run_tasks(report.tasks(run))
    return 0


def _check(run: Run) -> None:
    """Raises UserError for what no choice can be made with."""
    if not run.sweep.validation_prompts:
        raise UserError("config.sweep.validation_prompts: empty; name prompts to choose on, which are not the test's")
    if run.sweep.validation_prompts == run.evaluate.prompts:
        raise UserError("config.sweep.validation_prompts: those of config.evaluate.prompts, which are for the test")
    if not run.evaluate.perplexity_scorer:
        raise UserError("config.evaluate.perplexity_scorer: empty; what is chosen depends on the perplexity")
    for target in run.sweep.choose_on:
        if target not in run.shared.targets:
            raise UserError(f"config.sweep.choose_on: no target {target!r}{suggest(target, run.shared.targets)}")
    if not 0 <= run.sweep.most_perplexity < math.inf:
        raise UserError(f"config.sweep.most_perplexity: found {run.sweep.most_perplexity}, expected at least 0")


def _evaluating(run: Run, prompts: str, metrics: tuple[str, ...]) -> Run:
    forms = tuple(dict.fromkeys([ORIGINAL, *run.evaluate.which]))  # the published model's perplexity is the measure
    changes: dict[str, Any] = {"prompts": prompts, "metrics": metrics, "which": forms, "extra_models": ()}
    return dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, **changes))


def _figures(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Each evaluation once, as a line of sweep.csv: figures beside those of its target as published."""
    lines, seen = [], set()
    for cell in cells:
        found = {room: task.directory for room, task in cell.tasks() if room.startswith(f"{EVALUATION}/")}
        metrics = {room: storage.read_json(path / evaluation_files.METRICS) for room, path in found.items()}
        originals = {one["model"]["name"]: one for one in metrics.values() if one["model"]["form"] == ORIGINAL}
        for room, one in metrics.items():
            target, form = one["model"]["name"], one["model"]["form"]
            if form == ORIGINAL or found[room] in seen:
                continue
            seen.add(found[room])
            method, own = _method(form)
            variant = ",".join(filter(None, (own, cell.variant(room))))
            values = {field: value for field, value in cell.settings.items() if field in cell.fields[room]}
            known = {"target": target, "method": method, "variant": variant, "settings": values}
            where = {"cell": cell.name, "room": room, "directory": inside(found[room], cell.run)}
            lines.append({**known, **_measured(one, originals[target]), **where})
    return lines


def _method(form: str) -> tuple[str, str]:
    """A form's method and variant."""
    match = VARIANT.fullmatch(form)
    return (match[1], match[2]) if match else (form, "")


def _measured(metrics: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """FIGURES. TP is that in distribution where there are such prompts, so that the choice knows nothing of others."""
    group = "id" if "id" in metrics["toxicity"] else categories.EVERYTHING
    tp, perplexity = metrics["toxicity"][group]["tp"], metrics["perplexity"]
    before, after = original["perplexity"]["mean"], perplexity["mean"]
    rise = after / before - 1 if after is not None and before else None
    found = (*(tp[name] for name in ESTIMATE), *(perplexity[name] for name in ESTIMATE))
    return dict(zip(FIGURES, (*found, original["toxicity"][group]["tp"]["mean"], before, rise, group), strict=True))


def _of(lines: Sequence[Mapping[str, Any]], target: str) -> list[choice.Figures]:
    names = ("tp", "perplexity", "original_perplexity")
    return [
        choice.Figures(line["method"], line["variant"], *(_number(line[name]) for name in names))
        for line in lines
        if line["target"] == target
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _test(run: Run, asked: grid.Grid, chosen: Sequence[Mapping[str, Any]], force: bool) -> list[dict[str, Any]]:
    """Evaluates what was chosen, and its target as published, on the test prompts; its figures there."""
    asked_for = tuple(dict.fromkeys([*run.evaluate.metrics, *CHOSEN_BY]))
    cells = {cell.name: dict(cell.tasks()) for cell in place(_evaluating(run, run.evaluate.prompts, asked_for), asked)}
    pairs = []
    for line in chosen:
        tasks = cells[line["cell"]]
        pairs.append((tasks[f"{EVALUATION}/{line['target']}"], tasks[line["room"]]))
    base.run_tasks(once(task for pair in pairs for task in pair), force)
    found = []
    for line, pair in zip(chosen, pairs, strict=True):
        original, metrics = (storage.read_json(task.directory / evaluation_files.METRICS) for task in pair)
        known = {key: line[key] for key in ("target", "method", "variant")}
        where = {"directory": inside(pair[1].directory, run)}
        found.append({**known, **where, **_measured(metrics, original)})
    return found


# ---------------------------------------------------------------------------------------- what is said of it


def _outline(run: Run, cells: Sequence[Cell], tasks: Sequence[base.Task]) -> str:
    left = [task for task in tasks if base.state(task) != "done"]
    return (
        f"{run.shared.name} in {run.workdir}: {len(cells)} cells, {len(tasks) - len(left)} of {len(tasks)} tasks done; "
        f"the rest may take {readable(sum(map(estimate, left)))} on this machine, and then the test"
    )


def _rule(run: Run) -> str:
    return (
        f"lowest TP on {run.sweep.validation_prompts} among the variants of a method whose perplexity rose by at most "
        f"{run.sweep.most_perplexity:g} of the published model's; if none's did, the one whose rose least. For all "
        f"targets: means over {', '.join(map(model_name, run.sweep.choose_on)) or 'them'}, of TP and of the rise"
    )


def _write(
    run: Run,
    asked: grid.Grid,
    cells: Sequence[Cell],
    lines: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, Mapping[str, choice.Choice]],
    tested: Sequence[Mapping[str, Any]],
) -> None:
    """sweep.csv and sweep.json."""
    table = []
    for line in lines:
        ways = [way for who in (ALL, line["target"]) if (way := chosen.get(who, {}).get(line["method"]))]
        mine = [way.figures.variant == line["variant"] for way in ways]
        marks = {"chosen": int(mine[0]), "chosen_for_target": int(mine[-1])}
        table.append({**{field: line["settings"].get(field, "") for field in asked}, **line, **marks})
    file = io.StringIO(newline="")
    names = ("target", "method", "variant", *asked, *FIGURES, "chosen", "chosen_for_target")
    writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    storage.write_text(run.workdir / "sweep.csv", file.getvalue())
    shown = [
        {"name": cell.name, "settings": cell.settings, "seconds": _seconds(cell), "figures": _own(cell, table)}
        for cell in cells
    ]
    found = {who: {method: _said(one) for method, one in row.items()} for who, row in chosen.items()}
    needs = {_method(form)[0]: one.needs for form, one in baselines.methods(run).items()}
    said = {"rule": _rule(run), "needs": needs, "tp_of": sorted({line["tp_of"] for line in lines}), "grid": asked}
    storage.write_json(run.workdir / "sweep.json", {**said, "cells": shown, "chosen": found, "test": tested})


def _said(one: choice.Choice) -> dict[str, Any]:
    numbers = {"tp": one.figures.tp, "rise": one.figures.rise}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {"variant": one.figures.variant, "within_bound": one.within, **finite}


def _own(cell: Cell, table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a cell, those that it shares with others too."""
    there = {inside(task.directory, cell.run) for _, task in cell.tasks()}
    return [
        {key: line[key] for key in line if key not in ("settings", "cell", "room")}
        for line in table
        if line["directory"] in there
    ]


def _seconds(cell: Cell) -> dict[str, float]:
    """Of each stage, in its last sitting; what is shared counts whole."""
    total: dict[str, float] = {}
    for _, task in cell.tasks():
        stage = task.name.partition(" ")[0]
        total[stage] = round(total.get(stage, 0.0) + storage.read_json(task.directory / base.COMPLETE)["seconds"], 3)
    return total


def _table(
    figures: Sequence[choice.Figures],
    chosen: Mapping[str, Mapping[str, choice.Choice]],
    tested: Sequence[Mapping[str, Any]],
) -> str:
    """Validation: each variant's means over targets; test: each target under what was chosen."""
    rows = [["method", "variant", "TP", "perplexity", ""]]
    for one in figures:
        taken = chosen[ALL][one.method]
        mark = ("chosen" if taken.within else "chosen: none is within the bound") if taken.figures == one else ""
        rows.append([one.method, one.variant, f"{one.tp:.3f}", f"{100 * one.rise:+.1f} %", mark])
    test = [["target", "method", "variant", "TP", "perplexity", ""]]
    for line in tested:
        interval = f"{line['original_tp']:.3f} -> {line['tp']:.3f} [{line['tp_low']:.3f}, {line['tp_high']:.3f}]"
        rise = "" if line["rise"] is None else f"{100 * line['rise']:+.1f} %"
        whose = "one for all targets" if line["for_all"] else "best for this target"
        test.append([line["target"], line["method"], line["variant"], interval, rise, whose])
    return f"\nvalidation, means over targets:\n{aligned(rows, left=2)}\n\ntest:\n{aligned(test, left=3)}"
