"""`unidetox sweep`: what cells share, the choice, resumption after kills, errors."""

import collections
import csv
import dataclasses
import json
import logging
import math
import string
import time

import processes
import pytest
from conftest import HANGS
from etils import epath
from finetune_helpers import ROOT, make_world, start, training, write_config

from unidetox_jax import cli, text_statistics
from unidetox_jax.benchmarks import comparison, distilled_text
from unidetox_jax.errors import Diverged, UserError
from unidetox_jax.evaluation.variant_selection import Choice, VariantScores, choose, pooled
from unidetox_jax.stages import cells, grid, settings, sweep, task

pytestmark = pytest.mark.usefixtures("one_device")
PLAIN = f"{string.ascii_letters}{string.digits}_.=()-"
ALPHAS, RATES = (0.1, 0.6), (1e-3, 3e-3)
GRID = {"distill": {"objective": {"alpha": ALPHAS}}, "detoxify": {"learning_rate": RATES}}


@pytest.fixture(scope="module")
def world(one_device, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("sweep") / "world")


@pytest.fixture(scope="module")
def config(world):
    model = f"{world}/weights/gpt2"
    evaluate = {
        "scorer": "tests.finetune_helpers:chance", "perplexity_scorer": f"{world}/weights/llama",
        "prompts": f"{world}/prompts.jsonl",
        "mmlu": (), "runs": 1, "samples": 2, "max_new_tokens": 8, "id_categories": ("hills", "rivers", "plains"),
        "ood_categories": ("islands",),
    }  # fmt: skip
    distill = {"num_texts": 16, "batch_size": 8, "max_length": 24}
    return write_config(
        world / "sweep.py", base=model, targets=(model,), control_targets=(model,), sweep__grid=GRID,
        sweep__validation_prompts=f"{world}/prompts_valid.jsonl", sweep__most_perplexity=0.5,
        **{f"evaluate__{name}": value for name, value in evaluate.items()},
        **{f"distill__{name}": value for name, value in distill.items()},
        **training(world, "toxify", save_minutes=9),
        **training(world, "detoxify", validation="", steps=3, save_minutes=9),
    )  # fmt: skip


def command(config, workdir, *more):
    return ["sweep", f"--config={config}", f"--workdir={workdir}", *more]


class Compiled(logging.Handler):
    """Counts compilations by program and shapes."""

    def __init__(self):
        super().__init__()
        self.programs = collections.Counter()

    def emit(self, record):
        if record.getMessage().startswith("Compiling"):
            self.programs[record.getMessage()] += 1


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """An uninterrupted sweep of four cells: (its directory, its compilations)."""
    workdir, compiled = tmp_path_factory.mktemp("sweep") / "alone", Compiled()
    log = logging.getLogger("jax._src.interpreters.pxla")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("handlers", [compiled]), ("level", logging.DEBUG), ("propagate", False)):
            patch.setattr(log, name, value)
        log.manager._clear_cache()  # it caches which levels are enabled
        assert cli.main(command(config, workdir)) == 0
    log.manager._clear_cache()
    return workdir, compiled.programs


def finished(workdir):
    return {str(path.parent.relative_to(workdir)) for path in workdir.rglob("stage.json")}


@pytest.mark.slow
def test_tasks_that_no_field_changes_are_run_once(alone):
    workdir, _ = alone
    name = "gpt2"
    by_alpha = {f"alpha={a}": [f"learning_rate={r},alpha={a}" for r in RATES] for a in ALPHAS}
    rates = [f"cells/learning_rate={rate}" for rate in RATES]
    made = finished(workdir)
    shared = {"toxic", "samples", f"validation/{name}", f"evaluation/{name}"}
    expected = shared | {f"cells/{alpha}/distilled" for alpha in by_alpha}
    expected |= {f"{cell}/{room}" for cell in rates for room in (f"control/{name}", f"validation/{name}.control")}
    expected |= {
        f"cells/{cell}/{room}"
        for alpha in by_alpha.values()
        for cell in alpha
        for room in (f"detoxified/{name}", f"validation/{name}.detoxified")
    }
    tested = made - expected - {"report"}
    assert not expected - made
    assert sorted(path.rsplit("/", 1)[1] for path in tested) == [f"{name}.control", f"{name}.detoxified"]


@pytest.mark.slow
def test_each_program_is_compiled_once(alone):
    _, programs = alone
    assert sum(programs.values()) > 20
    # A program without arguments may have several output shapes
    named = {text: count for text, count in programs.items() if "types ()" not in text}
    assert [text[:300] for text, count in named.items() if count > 1] == []
    assert sum("jit(step)" in text for text in named) == 2  # of training and of the validation loss


@pytest.mark.slow
def test_one_is_chosen_and_tested(alone, capsys):
    workdir, _ = alone
    found = json.loads((workdir / "sweep.json").read_text())
    with (workdir / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(found["cells"]) == 4 and len(rows) == 4 + 2  # the control does not depend on alpha
    assert len({row["tp"] for row in rows}) > 1
    assert found["tp_of"] == ["id"] and "rose by at most 0.5" in found["rule"]
    keys = ("tp", "perplexity", "original_perplexity")
    figures = [VariantScores(row["method"], row["variant"], *(float(row[k]) for k in keys)) for row in rows]
    for method, choice in choose(figures, 0.5).items():
        for who in ("all targets", "gpt2"):  # equal for a single target
            assert found["chosen"][who][method]["variant"] == choice.scores.variant
            assert found["chosen"][who][method]["within_bound"] == choice.within
        marked = [row for row in rows if row["method"] == method and row["chosen"] == "1"]
        assert [row["variant"] for row in marked] == [choice.scores.variant]
        (tested,) = [line for line in found["test"] if line["method"] == method]
        metrics = json.loads((workdir / tested["directory"] / "metrics.json").read_text())
        assert metrics["prompt_source"].endswith("/prompts.jsonl") and metrics["diversity"]
        assert metrics["perplexity"]["mean"] == tested["perplexity"]
        assert metrics["toxicity"]["id"]["tp"]["mean"] == tested["tp"]
        assert tested["for_all"]
    page = (workdir / "report" / "index.html").read_text()
    for heading in ("Sweep", "How much the settings matter", "Every method and its settings"):
        assert heading in page
    assert all(f"{form}</small>" in page for form in ("as published", "detoxified", "samples-only control"))
    cell = found["cells"][0]
    assert {"toxify", "distill", "detoxify", "control", "evaluate"} == set(cell["seconds"])
    assert {line["method"] for line in cell["figures"]} == {"detoxified", "control"}


def results(workdir):
    """The results that must not depend on interruptions."""
    found = json.loads((workdir / "sweep.json").read_text())
    for cell in found["cells"]:
        del cell["seconds"]
    texts = {path.parent.parent.name: path.read_bytes() for path in workdir.glob("cells/*/distilled/texts.jsonl")}
    return found, (workdir / "sweep.csv").read_bytes(), texts


@pytest.mark.slow
def test_killed_and_continued_it_ends_the_same(alone, config, tmp_path):
    workdir = tmp_path / "killed"
    for count in (1, 2):
        child = start(*command(config, workdir), capture=True)
        while len(list(workdir.glob("cells/*/detoxified/gpt2/stage.json"))) < count:
            assert child.poll() is None, child.communicate()[1][-3000:]
            time.sleep(0.02)
        child.kill()
        child.communicate(timeout=HANGS)
        assert not (workdir / "sweep.json").exists()
    made = {path: path.stat().st_mtime_ns for path in workdir.rglob("stage.json")}
    assert cli.main(command(config, workdir)) == 0
    assert made == {path: path.stat().st_mtime_ns for path in made}  # nothing was redone
    assert finished(workdir) == finished(alone[0])
    assert results(workdir) == results(alone[0])


@pytest.mark.slow
def test_a_smaller_grid_reuses_results(alone, config, capsys):
    """A field with one value is part of directory names too, so values may be added or removed later."""
    workdir, _ = alone
    assert cli.main(command(config, workdir, "--dry_run", "--grid", "distill.objective.alpha=0.6")) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert "2 cells, 12 of 12 tasks done" in first
    assert f"{workdir}/cells/alpha=0.6/distilled" in " ".join(lines)


def figures(**variants):
    return [VariantScores("m", name, tp, perplexity, 10.0) for name, (tp, perplexity) in variants.items()]


@pytest.mark.parametrize(
    ("rows", "variant", "within"),
    [
        (figures(a=(0.5, 10.0), b=(0.2, 11.0), c=(0.1, 11.2)), "b", True),  # c: its perplexity rose too much
        (figures(a=(0.5, 9.0), b=(0.5, 8.0)), "b", True),  # ties: the lower perplexity
        (figures(a=(0.1, 15.0), b=(0.3, 12.0)), "b", False),  # none is within the bound
        (figures(a=(0.1, math.nan), b=(0.9, 10.0)), "b", True),  # NaN is not chosen
        (figures(a=(math.nan, 10.0), b=(0.9, 10.0)), "b", True),
        (figures(a=(0.1, math.nan), b=(0.2, math.nan)), "a", False),
    ],
)
def test_the_rule(rows, variant, within):
    assert choose(rows, 0.1) == {"m": Choice(next(row for row in rows if row.variant == variant), within)}


def test_one_configuration_for_all_targets():
    """By mean TP and mean rise; variants that a target lacks are left out."""
    one, other = figures(a=(0.2, 10.0), b=(0.4, 9.0), c=(0.0, 9.0)), figures(a=(0.4, 12.0), b=(0.4, 10.0))
    found = {row.variant: row for row in pooled({"one": one, "other": other})}
    assert found.keys() == {"a", "b"}
    assert found["a"].tp == pytest.approx(0.3) and found["a"].rise == pytest.approx(0.1)
    assert choose(found.values(), 0.05)["m"].scores.variant == "b"
    assert choose(found.values(), 0.1 + 1e-9)["m"].scores.variant == "a"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--grid", "detoxify.learning_rat=1"], "detoxify.learning_rat: no such field; did you mean 'learning_rate'?"),
        (["--grid", "detoxify=1"], "detoxify is a group of fields; name one of them: learning_rate"),
        (["--grid", "detoxify.steps.more=1"], "detoxify.steps.more: no such field"),
        (["--grid", "distill.objective.alfa=1"], "no setting 'alfa'; did you mean 'alpha'?"),
        (["--grid", "distill.objective.alpha=2"], "found 2, expected a number in (0, 1]"),
        (["--grid", "detoxify.learning_rate=high"], "config.detoxify.learning_rate: found 'high', expected float"),
        (["--grid", "detoxify.learning_rate="], "detoxify.learning_rate has no values"),
        (["--grid", "detoxify.steps=2,3,2"], "detoxify.steps has a value twice in (2, 3, 2)"),
        (["--grid", "detoxify.steps"], "--grid detoxify.steps: expected FIELD=VALUE,VALUE"),
        (["--grid", "report.examples=1,2"], "report.examples changes nothing in this sweep"),
        (["--config.sweep.validation_prompts="], "config.sweep.validation_prompts: empty"),
        (["--config.sweep.validation_prompts=prompts.jsonl", "--config.evaluate.prompts=prompts.jsonl"],
         "those of config.evaluate.prompts, which are for the test"),
        (["--config.evaluate.perplexity_scorer="], "config.evaluate.perplexity_scorer: empty"),
        (["--config.sweep.choose_on=('nobody',)"], "config.sweep.choose_on: no target 'nobody'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_any_work(config, tmp_path, capsys, more, words):
    assert cli.main(command(config, tmp_path / "none", *more)) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_an_empty_grid(world, tmp_path, capsys):
    empty = write_config(world / "empty.py", sweep__validation_prompts="x")
    assert cli.main(command(empty, tmp_path / "none")) == 2
    assert "config.sweep.grid: empty; write --grid FIELD=VALUE,VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "values", "name"),
    [
        (("a.rate", "b.objective.alpha"), {"a.rate": 5e-5, "b.objective.alpha": 0.1}, "rate=5e-05,alpha=0.1"),
        (("a.rate", "b.rate"), {"a.rate": 1, "b.rate": 2}, "a.rate=1,b.rate=2"),
        (("d.models",), {"d.models": ("base", "toxic")}, "models=base-toxic"),
        (("d.objective",), {"d.objective": "contrastive(alpha=0.1)"}, "objective=contrastive(alpha=0.1)"),
    ],
)
def test_names(fields, values, name):
    assert grid.name(values, fields) == name


def test_names_are_valid_for_directories():
    names = [grid.name({"f.data": value}, ["f.data"]) for value in ("dghs?file=x/y", "dghs?file=x_y", "x" * 300)]
    assert len(set(names)) == 3 and all(set(name) <= set(PLAIN) and len(name) < 90 for name in names)


def test_paths_of_the_configuration_are_relocated():
    run = settings.parse_run(settings.default_config(), "w")
    relocated = {"pretrained/gpt2": "w/one", "toxic": "w/two", "scorer": "w/three", "scorer/b": "w/four"}
    moved = dataclasses.replace(run, relocated={name: epath.Path(path) for name, path in relocated.items()})
    for text, expected in {
        "{workdir}/pretrained/gpt2": "w/one",
        "{workdir}/pretrained/gpt2/hf": "w/one/hf",
        "{workdir}/pretrained/gpt2-xl": "w/pretrained/gpt2-xl",
        "{workdir}/pretrained/gpt2+{workdir}/toxic": "w/one+w/two",
        "linear:{workdir}/scorer": "linear:w/three",
        "linear:{workdir}/scorer/b#toxic": "linear:w/four#toxic",
        "dghs?file={workdir}/world/toxic.jsonl&split=dev": "dghs?file=w/world/toxic.jsonl&split=dev",
        "{workdir}": "w",
    }.items():
        assert moved.path(text) == expected
    assert moved.directory("toxic/hf") == epath.Path("w/two/hf") and run.directory("toxic") == epath.Path("w/toxic")


@pytest.mark.slow
def test_the_table_of_several_sweeps(alone, tmp_path, capsys):
    workdir, _ = alone
    assert comparison.main([str(workdir), str(workdir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((workdir / "sweep.json").read_text())
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines[2:4]}
    assert set(rows) == {"detoxified", "samples-only control"}
    (tested,) = [line for line in found["test"] if line["method"] == "detoxified"]
    row = rows["detoxified"]
    assert row[1] == f"{tested['tp']:.3f}" and row[2] == "–" and row[-3:-1] == ["–", "–"]  # no costs were measured
    before = tested["original_tp"]
    assert row[3] == (f"{100 * (tested['tp'] / before - 1):+.1f} %" if before else "–")
    assert row[6] == f"{100 * tested['rise']:+.1f} %"
    assert row[-1].startswith(found["chosen"]["all targets"]["detoxified"]["variant"])
    assert "[" in rows["samples-only control"][2] and "1 targets and 2 runs" in lines[-1]
    assert comparison.main([str(tmp_path)]) == 2
    assert "no sweep.json" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_distilled_texts(alone, tmp_path, capsys):
    """This sweep varies the learning rate as well, so that no model lies beside a text but the control."""
    workdir, _ = alone
    assert distilled_text.main([str(workdir)]) == 0
    head, _, *lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0].strip("| `") for line in lines] == ["samples of the base model", *(f"alpha={a}" for a in ALPHAS)]
    texts = [json.loads(line)["text"] for line in (workdir / "samples/texts.jsonl").open()]
    share = sum(text_statistics.repeated_share(text) for text in texts) / len(texts)
    assert dict(zip(head, lines[0], strict=True))["repeated 4-grams"] == f"{share:.1%}"
    assert not (workdir / "scorer").exists() and not [title for title in head if "toxic by" in title]
    assert distilled_text.main([str(tmp_path)]) == 2
    assert "no distilled text" in capsys.readouterr().err


def test_one_target_chooses_for_all(tmp_path, capsys):
    """Other targets are trained and evaluated only after the choice, for the chosen cell."""
    chosen = "--config.sweep.choose_on=('{workdir}/pretrained/gpt2',)"
    quickstart = [f"--config={ROOT}/configs/quickstart.py:comparison", f"--workdir={tmp_path / 'none'}", chosen]
    assert cli.main(["sweep", *quickstart, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "validation/gpt2.detoxified" in printed and "baselines/toxic/gpt2" in printed
    assert not any(f"{room}/opt" in printed for room in ("detoxified", "control", "validation", "toxic", "clean"))
    run = settings.parse_run(cli.load_config(f"{ROOT}/configs/quickstart.py"), tmp_path)
    (cell,) = cells.make_cells(run, {"detoxify.learning_rate": (1e-4,)})
    found = [
        str(task.directory.relative_to(tmp_path)) for task in cell.with_dependencies(["evaluation/opt.detoxified"])
    ]
    assert found == [
        "world", "pretrained/gpt2", "pretrained/opt", "pretrained/scorer", "toxic", "distilled",
        "cells/learning_rate=0.0001/detoxified/opt", "cells/learning_rate=0.0001/evaluation/opt.detoxified",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_in_a_bucket_sweep_as_one_does(config, tmp_path, bucket):
    """The same cells, texts and choice; numbers up to rounding."""

    def sweep(workdir, count):
        address = f"127.0.0.1:{processes.free_port()}"
        more = ["--grid", "distill.objective.alpha=0.6", "--grid", "detoxify.learning_rate=1e-3,3e-3"]
        several = [processes.joined(address, count, index) if count > 1 else [] for index in range(count)]
        commands = [processes.command([*command(config, workdir), *more, *one]) for one in several]
        ended = processes.wait(processes.start(commands, devices=2 // count))
        assert [one.code for one in ended] == [0] * count, "\n".join(one.err[-2000:] for one in ended)
        texts = (workdir / "cells/alpha=0.6/distilled/texts.jsonl").read_bytes()
        return json.loads((workdir / "sweep.json").read_text()), texts

    (one, texts), (two, same) = sweep(tmp_path / "one", 1), sweep(bucket / "sweep", 2)
    assert texts == same
    assert one["chosen"].keys() == two["chosen"].keys()
    for ours, theirs in zip(one["test"], two["test"], strict=True):
        assert ours["directory"] == theirs["directory"]
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-3)


@pytest.mark.slow
def test_a_training_that_diverges_is_left_out(config, tmp_path, capfd):
    alpha = ["--grid", "distill.objective.alpha=0.6", "--grid"]
    both, bad = [*alpha, "detoxify.learning_rate=1e-3,1e30"], [*alpha, "detoxify.learning_rate=1e30"]
    assert cli.main(command(config, tmp_path, *both)) == 0
    printed = capfd.readouterr()
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    cell = f"cells/{grid.name({'learning_rate': 1e30}, ['learning_rate'])}"
    places = {"detoxify": f"{cell},alpha=0.6/detoxified/gpt2", "control": f"{cell}/control/gpt2"}
    assert {one["directory"] for one in sweep["diverged"]} == set(places.values())
    for stage, place in places.items():
        (message,) = [one["message"] for one in sweep["diverged"] if one["directory"] == place]
        assert message.startswith(f"{stage} gpt2: step 2: loss ")
        (warning,) = [line for line in printed.err.splitlines() if f"{place}: left out" in line]
        assert message in warning and f"diverged: {place}: {message}" in printed.out
    with (tmp_path / "sweep.csv").open() as file:
        variants = {row["method"]: row["variant"] for row in csv.DictReader(file)}
    assert variants == {"detoxified": "learning_rate=0.001,alpha=0.6", "control": "learning_rate=0.001"}
    assert {method: choice["variant"] for method, choice in sweep["chosen"]["gpt2"].items()} == variants
    assert {line["method"]: line["variant"] for line in sweep["test"]} == variants
    assert all(f"<b>{place}</b>" in (tmp_path / "report/index.html").read_text() for place in places.values())

    made, text = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json*")}, results(tmp_path)
    assert cli.main(command(config, tmp_path, *both)) == 0
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json*")}
    assert results(tmp_path) == text
    assert "control gpt2: step 2" in capfd.readouterr().err
    assert cli.main(command(config, tmp_path, *bad)) == 2
    assert "unidetox: sweep: no variant is left to choose from; " in capfd.readouterr().err.splitlines()[-1]


def test_a_diverged_training_is_repeated_by_force_and_by_its_stage(tmp_path):
    trained = []

    def body(directory):
        trained.append(directory)
        (directory / "metrics.jsonl").touch()
        raise Diverged("step 2")

    diverging = task.Task("train", epath.Path(tmp_path / "model"), {"rate": 1e30}, dict, body)
    skipping, forced = {"retry_diverged": False}, {"force": True}
    for options, repeated in ((skipping, 1), (skipping, 0), ({}, 1), (skipping, 0), (skipping | forced, 1)):
        trained.clear()
        with pytest.raises(Diverged, match="step 2"):
            task.run_tasks([diverging], **options)
        assert len(trained) == repeated
    with pytest.raises(UserError, match="rate: was 1e\\+30, now 0.1"):
        task.run_tasks([dataclasses.replace(diverging, settings={"rate": 0.1})], retry_diverged=False)


def test_a_stage_that_diverges_before_it_makes_anything_can_be_corrected(tmp_path):
    def body(_):
        raise Diverged("step 1")

    for rate in (1e30, 1e20):
        with pytest.raises(Diverged):
            task.run_tasks([task.Task("train", epath.Path(tmp_path / "model"), {"rate": rate}, dict, body)])
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_force_redoes_tasks_of_the_choice_only_once(alone, config, monkeypatch):
    workdir, _ = alone
    forced = []
    monkeypatch.setattr(task, "run_task", lambda task, force=False, *_: forced.append((str(task.directory), force)))
    for name in ("_write", "_describe"):
        monkeypatch.setattr(sweep, name, lambda *arguments: None)
    assert cli.main(command(config, workdir, "--force")) == 0
    made = [directory for directory, force in forced if force]
    assert len(made) == len(set(made)) and any("/validation/" in directory for directory in made)
    assert any("/evaluation/" in directory for directory in made)
