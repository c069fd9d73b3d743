"""`unidetox sweep`: every cell of a grid of settings, one chosen on validation prompts, and that one tested.

Of a grid over an objective's alpha and a learning rate the twin is made once, a text for each alpha, a model for each
cell (`stages.cells` says where). All happens in one process: cells that differ in numbers alone share their programs.

    validation/NAME.FORM        an evaluation on config.sweep.validation_prompts, in WORKDIR or WORKDIR/cells/CELL
    evaluation/NAME.FORM        of what was chosen, on config.evaluate.prompts
    sweep.json                  {"rule", "needs": {method: what it needs that UniDetox does not}, "tp_of": the group of
                                prompts whose TP counts, "grid", "cells": [{"name",
                                "settings", "seconds": {stage: of the last sitting, what other cells share included},
                                "figures": [a line of sweep.csv, and "directory"]}], "chosen": {"all targets" | TARGET:
                                {method: {"variant", "within_bound", "tp", "rise"}}}, "test": [{"target", "method",
                                "variant", "directory", "for_all": whether it is one for all targets, and figures as
                                on validation}]}
    sweep.csv                   a line for each target, method and variant

A method is a form of a target; of forms NAME-SETTING=VALUE, the method is NAME, and they are its variants.
"""

import argparse
import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from etils import epath

from unidetox_jax import distributed, storage
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.evaluation import categories, choice
from unidetox_jax.evaluation.choice import ALL
from unidetox_jax.progress import format_table
from unidetox_jax.stages import base, baselines, evaluation_files, grid, report
from unidetox_jax.stages.cells import EVALUATION, Cell, inside, once, place
from unidetox_jax.stages.run import estimate, readable
from unidetox_jax.stages.settings import Run, model_name

CHOSEN_BY = ("toxicity", "perplexity")  # metrics on validation prompts
VALIDATION, ORIGINAL = "validation", "original"
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
    cells = place(_chosen_on(_evaluating(run, run.sweep.validation_prompts, CHOSEN_BY)), asked, VALIDATION)
    metrics = tuple(dict.fromkeys([*run.evaluate.metrics, *CHOSEN_BY]))
    for_test = place(_evaluating(run, run.evaluate.prompts, metrics), asked)
    tasks = once(task for cell in cells for task in cell.tasks.values())
    if distributed.is_main_process():
        print(_outline(run, cells, tasks), flush=True)
    base.run_tasks(tasks, options.force, options.dry_run)
    if options.dry_run:
        return 0
    lines = [_line(one) for one in _variants(cells)]
    by_target = {target: _of(lines, target) for target in dict.fromkeys(line["target"] for line in lines)}
    figures = {ALL: choice.pooled(by_target)}
    if not run.sweep.choose_on:
        figures |= by_target
    chosen = {who: choice.choose(rows, run.sweep.most_perplexity) for who, rows in figures.items()}
    tested = _test(for_test, chosen, {task.directory for task in tasks}, options.force)
    if distributed.is_main_process():
        _write(run, asked, cells, lines, chosen, tested)
        print(_table(figures[ALL], chosen, tested))
        print(f"\nchosen: {_rule(run)}\nsweep: {run.workdir / 'sweep.json'}")
    distributed.barrier("sweep written")  # the report reads it
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


def _chosen_on(run: Run) -> Run:
    """The run with no other targets than those on which the choice is made."""
    if not (chosen := run.sweep.choose_on):
        return run

    def kept(targets: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(target for target in targets if target in chosen)

    forms = {name: dataclasses.replace(one, targets=kept(one.targets)) for name, one in run.evaluate.candidates.items()}
    forms = {name: one for name, one in forms.items() if one.targets or not run.evaluate.candidates[name].targets}
    rivals = dataclasses.replace(run.baselines, targets=kept(run.baselines.targets))
    if run.baselines.targets and not rivals.targets:
        rivals = dataclasses.replace(rivals, methods=())
    return dataclasses.replace(
        run,
        shared=dataclasses.replace(run.shared, targets=chosen, control_targets=kept(run.shared.control_targets)),
        baselines=rivals,
        evaluate=dataclasses.replace(run.evaluate, candidates=forms),
    )


@dataclasses.dataclass(frozen=True)
class Variant:
    """An evaluation of a target in a form that was made of it, in the first cell that has it."""

    cell: Cell
    room: str
    target: str
    method: str
    variant: str

    @property
    def original(self) -> str:
        return f"{EVALUATION}/{self.target}"

    def metrics(self, room: str) -> Mapping[str, Any]:
        return storage.read_json(self.cell.tasks[room].directory / evaluation_files.METRICS)


def _variants(cells: Sequence[Cell]) -> Iterator[Variant]:
    """Each evaluation once, but for those of targets as published."""
    seen = set()
    for cell in cells:
        names = sorted(map(model_name, cell.run.shared.targets), key=len, reverse=True)
        for room, task in cell.tasks.items():
            target = next((name for name in names if room.startswith(f"{EVALUATION}/{name}.")), None)
            if target is None or room.removeprefix(f"{EVALUATION}/") in names or task.directory in seen:
                continue
            seen.add(task.directory)
            form = room.removeprefix(f"{EVALUATION}/{target}.")
            method, own = choice.split_form(form)
            yield Variant(cell, room, target, method, ",".join(filter(None, (own, cell.variant(room)))))


def _line(one: Variant) -> dict[str, Any]:
    """What is known of a variant once it was evaluated: a line of sweep.csv, and more."""
    where = {"directory": inside(one.cell.tasks[one.room].directory, one.cell.run)}
    form = one.room.removeprefix(f"{EVALUATION}/{one.target}.")
    known = {
        "target": one.target,
        "form": form,
        "method": one.method,
        "variant": one.variant,
        "settings": one.cell.own(one.room),
    }
    return {**known, **_measured(one.metrics(one.room), one.metrics(one.original)), **where}


def _measured(metrics: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """FIGURES. TP is that in distribution where there are such prompts, so that the choice knows nothing of others."""
    group = "id" if "id" in metrics["toxicity"] else categories.EVERYTHING
    tp, perplexity = metrics["toxicity"][group]["tp"], metrics["perplexity"]
    before, after = original["perplexity"]["mean"], perplexity["mean"]
    rise = after / before - 1 if after is not None and before else None
    found = (*(tp[name] for name in ESTIMATE), *(perplexity[name] for name in ESTIMATE))
    return dict(zip(FIGURES, (*found, original["toxicity"][group]["tp"]["mean"], before, rise, group), strict=True))


def _of(lines: Sequence[Mapping[str, Any]], target: str) -> list[choice.VariantScores]:
    names = ("tp", "perplexity", "original_perplexity")
    return [
        choice.VariantScores(line["method"], line["variant"], *(_number(line[name]) for name in names))
        for line in lines
        if line["target"] == target
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _test(
    cells: Sequence[Cell], chosen: Mapping[str, Mapping[str, choice.Choice]], made: Set[epath.Path], force: bool
) -> list[dict[str, Any]]:
    """Evaluates what was chosen on the test prompts: for all targets every target, and what was chosen for it alone.

    made: directories that are there for the choice, which force does not concern.
    """

    def is_chosen(one: Variant, who: str) -> bool:
        choices = chosen.get(who, {})
        return one.method in choices and choices[one.method].scores.variant == one.variant

    tested = [one for one in _variants(cells) if is_chosen(one, ALL) or is_chosen(one, one.target)]
    for task in once(task for one in tested for task in one.cell.needed([one.original, one.room])):
        base.run_tasks([task], force and task.directory not in made)
    lines = [{**_line(one), "for_all": is_chosen(one, ALL)} for one in tested]
    return [{name: value for name, value in line.items() if name != "settings"} for line in lines]


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
        mine = [way.scores.variant == line["variant"] for way in ways]
        marks = {"chosen": int(mine[0]), "chosen_for_target": int(mine[-1])}
        known = {name: value for name, value in line.items() if name != "settings"}
        table.append({**{field: line["settings"].get(field, "") for field in asked}, **known, **marks})
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
    needs = {choice.split_form(form)[0]: one.needs for form, one in baselines.methods(run).items()}
    said = {"rule": _rule(run), "needs": needs, "tp_of": sorted({line["tp_of"] for line in lines}), "grid": asked}
    storage.write_json(run.workdir / "sweep.json", {**said, "cells": shown, "chosen": found, "test": tested})


def _said(one: choice.Choice) -> dict[str, Any]:
    numbers = {"tp": one.scores.tp, "rise": one.scores.rise}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {"variant": one.scores.variant, "within_bound": one.within, **finite}


def _own(cell: Cell, table: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of a cell, those that it shares with others too."""
    there = {inside(task.directory, cell.run) for task in cell.tasks.values()}
    return [line for line in table if line["directory"] in there]


def _seconds(cell: Cell) -> dict[str, float]:
    """Of each stage, in its last sitting; what is shared counts whole."""
    total: dict[str, float] = {}
    for task in cell.tasks.values():
        stage = task.name.partition(" ")[0]
        total[stage] = round(total.get(stage, 0.0) + storage.read_json(task.directory / base.COMPLETE)["seconds"], 3)
    return total


def _table(
    figures: Sequence[choice.VariantScores],
    chosen: Mapping[str, Mapping[str, choice.Choice]],
    tested: Sequence[Mapping[str, Any]],
) -> str:
    """Validation: each variant's means over targets; test: each target under what was chosen."""
    rows = [["method", "variant", "TP", "perplexity", ""]]
    for one in figures:
        taken = chosen[ALL][one.method]
        mark = ("chosen" if taken.within else "chosen: none is within the bound") if taken.scores == one else ""
        rows.append([one.method, one.variant, f"{one.tp:.3f}", f"{100 * one.rise:+.1f} %", mark])
    test = [["target", "method", "variant", "TP", "perplexity", ""]]
    for line in tested:
        interval = f"{line['original_tp']:.3f} -> {line['tp']:.3f} [{line['tp_low']:.3f}, {line['tp_high']:.3f}]"
        rise = "" if line["rise"] is None else f"{100 * line['rise']:+.1f} %"
        whose = "one for all targets" if line["for_all"] else "best for this target"
        test.append([line["target"], line["method"], line["variant"], interval, rise, whose])
    return f"\nvalidation, means over targets:\n{format_table(rows, left=2)}\n\ntest:\n{format_table(test, left=3)}"
