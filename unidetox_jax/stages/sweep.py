"""`unidetox sweep`: every cell of a grid of settings, one chosen on validation prompts, and that one tested.

Cells share what they have in common: for a grid of alpha and a learning rate there is one twin, a text for each alpha
and a model for each cell (`stages.cells` says where). All run in one process, so cells that differ in numbers alone
share their compiled programs.

    validation/NAME.FORM        an evaluation on config.sweep.validation_prompts, in WORKDIR or WORKDIR/cells/CELL
    evaluation/NAME.FORM        of the chosen variants, on config.evaluate.prompts
    sweep.json                  {"rule", "needs": {method: what it needs that UniDetox does not}, "tp_of": the group of
                                prompts whose TP counts, "grid", "cells": [{"name",
                                "settings", "seconds": {stage: since its last start, shared tasks included},
                                "figures": [a line of sweep.csv, and "directory"]}], "diverged": [{"directory": of a
                                training, "message"}], "chosen": {"all targets" | TARGET:
                                {method: {"variant", "within_bound", "tp", "rise"}}}, "test": [{"target", "method",
                                "variant", "directory", "for_all": whether it was chosen for all targets, and the
                                columns of sweep.csv, measured on the test prompts}]}
    sweep.csv                   a line for each target, method and variant

A training that diverges is left out with all that depends on it, and not repeated without --force.
A method is a form of a target; forms NAME-SETTING=VALUE are variants of the method NAME.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from etils import epath

from unidetox_jax import distributed, storage
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation import categories
from unidetox_jax.evaluation.variant_selection import ALL, Choice, VariantScores, choose, pooled, split_form
from unidetox_jax.progress import format_table
from unidetox_jax.report import tables
from unidetox_jax.stages import baselines, grid, report
from unidetox_jax.stages.cells import (
    Cell,
    LeftOut,
    Variant,
    make_cells,
    relative,
    run_unless_diverged,
    unique,
    variants,
)
from unidetox_jax.stages.evaluated_models import ORIGINAL
from unidetox_jax.stages.run import estimate, readable
from unidetox_jax.stages.settings import Run, model_name
from unidetox_jax.stages.task import COMPLETE, Task, run_tasks, state

CHOOSING_METRICS = ("toxicity", "perplexity")
VALIDATION = "validation"
MEASURES = (
    "tp", "tp_low", "tp_high", "perplexity", "perplexity_low", "perplexity_high",
    "original_tp", "original_perplexity", "rise", "tp_of",
)  # fmt: skip

Line = dict[str, Any]  # of sweep.csv, with "settings" and "directory"
Choices = Mapping[str, Mapping[str, Choice]]  # ALL or target → method → choice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--grid", action="append", default=[], metavar="FIELD=V1,V2", help="a field and its values; may be repeated"
    )


def run_command(options: argparse.Namespace, run: Run) -> int:
    """Runs what is missing of every cell, chooses, tests the chosen variants; returns 0."""
    values = grid.parse(run, options.grid)
    _check(run)
    validation_run = _with_evaluation(run, run.sweep.validation_prompts, CHOOSING_METRICS)
    cells = make_cells(_only_choosing_targets(validation_run), values, VALIDATION)
    test_metrics = tuple(dict.fromkeys([*run.evaluate.metrics, *CHOOSING_METRICS]))
    test_cells = make_cells(_with_evaluation(run, run.evaluate.prompts, test_metrics), values)
    tasks = unique(task for cell in cells for task in cell.tasks.values())
    if distributed.is_main_process():
        print(_outline(run, cells, tasks), flush=True)
    if options.dry_run:
        run_tasks(tasks, dry_run=True)
        return 0
    left_out: LeftOut = {}
    validated = {task.directory for task in tasks}
    run_unless_diverged(cells, tasks, validated if options.force else (), left_out)
    lines, chosen = _choose(run, list(variants(cells)), left_out)
    tested = _test(test_cells, chosen, validated, left_out, options.force)
    if distributed.is_main_process():
        print(_describe(_write(run, values, cells, lines, chosen, tested, left_out)))
        print(f"sweep: {run.workdir / 'sweep.json'}")
    distributed.barrier("sweep written")  # the report reads it
    run_tasks(report.tasks(run))
    return 0


def _check(run: Run) -> None:
    """Raises UserError for settings that no choice can be made with."""
    if not run.sweep.validation_prompts:
        raise UserError("config.sweep.validation_prompts: empty; name prompts to choose on, which are not the test's")
    if run.sweep.validation_prompts == run.evaluate.prompts:
        raise UserError("config.sweep.validation_prompts: those of config.evaluate.prompts, which are for the test")
    if not run.evaluate.perplexity_scorer:
        raise UserError("config.evaluate.perplexity_scorer: empty, but the choice needs perplexity; name a model")
    for target in run.sweep.choose_on:
        if target not in run.shared.targets:
            raise UserError(f"config.sweep.choose_on: no target {target!r}{suggest(target, run.shared.targets)}")
    if not 0 <= run.sweep.most_perplexity < math.inf:
        raise UserError(f"config.sweep.most_perplexity: found {run.sweep.most_perplexity}, expected at least 0")


def _with_evaluation(run: Run, prompts: str, metrics: tuple[str, ...]) -> Run:
    """The run with other prompts and metrics, and always with published models, as changes are relative to them."""
    forms = tuple(dict.fromkeys([ORIGINAL, *run.evaluate.which]))
    changes: dict[str, Any] = {"prompts": prompts, "metrics": metrics, "which": forms, "extra_models": ()}
    return dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, **changes))


def _only_choosing_targets(run: Run) -> Run:
    """The run without targets that are not in config.sweep.choose_on."""
    if not (targets := run.sweep.choose_on):
        return run

    def restrict(some_targets: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(target for target in some_targets if target in targets)

    candidates = {}
    for name, candidate in run.evaluate.candidates.items():
        remaining = restrict(candidate.targets)
        if remaining or not candidate.targets:  # none: all targets
            candidates[name] = dataclasses.replace(candidate, targets=remaining)
    rivals = dataclasses.replace(run.baselines, targets=restrict(run.baselines.targets))
    if run.baselines.targets and not rivals.targets:
        rivals = dataclasses.replace(rivals, methods=())
    return dataclasses.replace(
        run,
        shared=dataclasses.replace(run.shared, targets=targets, control_targets=restrict(run.shared.control_targets)),
        baselines=rivals,
        evaluate=dataclasses.replace(run.evaluate, candidates=candidates),
    )


def _choose(run: Run, planned: Sequence[Variant], left_out: LeftOut) -> tuple[list[Line], Choices]:
    """(the lines of the finished variants, the choices among them, for all targets among those finished on all).

    Raises:
      UserError: none is left.
    """
    lines = [_line(variant) for variant in planned if variant.finished(left_out)]
    unfinished = {(variant.method, variant.name) for variant in planned if not variant.finished(left_out)}
    by_target: dict[str, list[VariantScores]] = {}
    for line in lines:
        by_target.setdefault(line["target"], []).append(_figures(line))
    on_all = [scores for scores in pooled(by_target) if (scores.method, scores.variant) not in unfinished]
    choose_for = {ALL: on_all, **({} if run.sweep.choose_on else by_target)}
    chosen = {target: choose(rows, run.sweep.most_perplexity) for target, rows in choose_for.items()}
    if not any(chosen.values()):
        raise UserError("; ".join(["sweep: no variant is left to choose from", *filter(None, left_out.values())][:2]))
    return lines, chosen


def _is_chosen(choices: Mapping[str, Choice], method: str, variant: str) -> bool:
    return method in choices and choices[method].scores.variant == variant


def _line(variant: Variant) -> Line:
    """An evaluated variant's line of sweep.csv."""
    return {
        "target": variant.target,
        "form": variant.form,
        "method": variant.method,
        "variant": variant.name,
        "settings": variant.cell.settings_of(variant.directory),
        **_measures(variant.metrics(variant.directory), variant.metrics(variant.original_directory)),
        "directory": relative(variant.cell.tasks[variant.directory].directory, variant.cell.run),
    }


def _measures(metrics: Mapping[str, Any], original: Mapping[str, Any]) -> Line:
    """MEASURES. TP is on in-distribution prompts if there are any, so that the choice does not see the others."""
    group = "id" if "id" in metrics["toxicity"] else categories.EVERYTHING
    tp, perplexity = metrics["toxicity"][group]["tp"], metrics["perplexity"]
    before, after = original["perplexity"]["mean"], perplexity["mean"]
    rise = after / before - 1 if after is not None and before else None
    estimates = [estimate[name] for estimate in (tp, perplexity) for name in ("mean", "low", "high")]
    values = (*estimates, original["toxicity"][group]["tp"]["mean"], before, rise, group)
    return dict(zip(MEASURES, values, strict=True))


def _figures(line: Line) -> VariantScores:
    numbers = (line[name] for name in ("tp", "perplexity", "original_perplexity"))
    return VariantScores(line["method"], line["variant"], *(math.nan if x is None else x for x in numbers))


def _test(
    cells: Sequence[Cell], chosen: Choices, validated: Set[epath.Path], left_out: LeftOut, force: bool
) -> list[Line]:
    """Evaluates the choices on the test prompts: that for all targets on every target, and each target's own.

    validated: directories made for the choice, which `force` must not make again.
    """

    def is_chosen(variant: Variant, target: str) -> bool:
        return _is_chosen(chosen.get(target, {}), variant.method, variant.name)

    tested = [variant for variant in variants(cells) if is_chosen(variant, ALL) or is_chosen(variant, variant.target)]
    tasks = unique(task for variant in tested for task in variant.tasks())
    redone = {task.directory for task in tasks} - validated if force else ()
    run_unless_diverged(cells, tasks, redone, left_out)
    return [
        _without_settings(_line(variant)) | {"for_all": is_chosen(variant, ALL)}
        for variant in tested
        if variant.finished(left_out)
    ]


def _without_settings(line: Line) -> Line:
    return {name: value for name, value in line.items() if name != "settings"}


def _outline(run: Run, cells: Sequence[Cell], tasks: Sequence[Task]) -> str:
    left = [task for task in tasks if state(task) != "done"]
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
    values: grid.Grid,
    cells: Sequence[Cell],
    lines: Sequence[Line],
    chosen: Choices,
    tested: Sequence[Line],
    left_out: LeftOut,
) -> dict[str, Any]:
    """Writes sweep.csv and sweep.json; returns the content of the latter."""
    table = []
    for line in lines:
        name, for_target = (line["method"], line["variant"]), chosen.get(line["target"], chosen[ALL])
        marks = {
            "chosen": int(_is_chosen(chosen[ALL], *name)),
            "chosen_for_target": int(_is_chosen(for_target, *name)),
        }
        table.append(
            {**{field: line["settings"].get(field, "") for field in values}, **_without_settings(line), **marks}
        )
    columns = ("target", "method", "variant", *values, *MEASURES, "chosen", "chosen_for_target")
    storage.write_text(run.workdir / "sweep.csv", tables.to_csv(table, columns))
    content = {
        "rule": _rule(run),
        "needs": {split_form(form)[0]: baseline.needs for form, baseline in baselines.methods(run).items()},
        "tp_of": sorted({line["tp_of"] for line in lines}),
        "grid": values,
        "cells": [
            {
                "name": cell.name,
                "settings": cell.settings,
                "seconds": _seconds(cell, left_out),
                "figures": _lines_of(cell, table),
            }
            for cell in cells
        ],
        "diverged": [
            {"directory": relative(directory, run), "message": message}
            for directory, message in left_out.items()
            if message
        ],
        "chosen": {target: {method: _as_json(one) for method, one in row.items()} for target, row in chosen.items()},
        "test": tested,
    }
    storage.write_json(run.workdir / "sweep.json", content)
    return content


def _as_json(chosen: Choice) -> dict[str, Any]:
    numbers = {"tp": chosen.scores.tp, "rise": chosen.scores.rise}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {"variant": chosen.scores.variant, "within_bound": chosen.within, **finite}


def _lines_of(cell: Cell, table: Sequence[Line]) -> list[Line]:
    """A cell's lines, including those that it shares with others."""
    directories = {relative(task.directory, cell.run) for task in cell.tasks.values()}
    return [line for line in table if line["directory"] in directories]


def _seconds(cell: Cell, left_out: LeftOut) -> dict[str, float]:
    """{stage: seconds since its last start}; shared tasks count fully, those left out not at all."""
    total: dict[str, float] = {}
    for task in cell.tasks.values():
        stage, finished = task.name.partition(" ")[0], task.directory not in left_out
        seconds = storage.read_json(task.directory / COMPLETE)["seconds"] if finished else 0.0
        total[stage] = round(total.get(stage, 0.0) + seconds, 3)
    return total


def _describe(sweep: Mapping[str, Any]) -> str:
    """For the terminal, from sweep.json: each variant on validation prompts, and the test of the chosen ones."""
    records = tables.sweep_variants(sweep)
    validation = [list(records[0]), *(list(record.values()) for record in records)]
    test = [["target", "method", "variant", "TP", "perplexity", ""]]
    for line in sweep["test"]:
        interval = f"{line['original_tp']:.3f} -> {line['tp']:.3f} [{line['tp_low']:.3f}, {line['tp_high']:.3f}]"
        rise = "" if line["rise"] is None else f"{100 * line['rise']:+.1f} %"
        chosen_for = "one for all targets" if line["for_all"] else "best for this target"
        test.append([line["target"], line["method"], line["variant"], interval, rise, chosen_for])
    diverged = "".join(f"diverged: {one['directory']}: {one['message']}\n" for one in sweep["diverged"])
    return (
        f"\nvalidation, means over targets:\n{format_table(validation, left=2)}\n{diverged}\n"
        f"test:\n{format_table(test, left=3)}\n\nchosen: {sweep['rule']}"
    )
