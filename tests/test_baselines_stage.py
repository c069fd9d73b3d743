"""`unidetox baselines`: twins made once, every method's models, a killed run that goes on, mistakes in one line."""

import json
import re
import time

import numpy as np
import pytest
from conftest import HANGS
from etils import epath
from finetune_helpers import LENGTH, lines_of, make_world, same, start, training, weights, write_config
from safetensors.numpy import load_file

from unidetox_jax import checkpoint, cli, models
from unidetox_jax.stages import baselines, settings

METHODS = (
    "dexperts(alpha=1.0, top_p=0.95)",
    "dapt",
    "preprompt(text='Be kind: ')",
    "task_arithmetic(scale=0.5)",
    "task_arithmetic(scale=0.0)",
    "lm_steer(steer=-2.0, rank=1000, steps=2, batch_size=4)",
    "npo(steps=3)",
    "profs(pairs=8)",
)
STEERED = "lm_steer-steer=1.0-batch_size=4-steps=2"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def fields(world, **changes) -> dict:
    recipe = {
        "clean_data": f"jsonl:{world}/train.jsonl", "steps": 2, "batch_size": 8, "learning_rate": 1e-3,
        "max_length": LENGTH, "layout": "pad", "save_minutes": 0.0, "log_every": 1,
    }  # fmt: skip
    found = {f"baselines__{name}": value for name, value in recipe.items()}
    targets = (f"{world}/weights/gpt2", f"{world}/weights/llama")
    return {"targets": targets, "mesh": "data:2,fsdp:4", **training(world, "toxify"), **found, **changes}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """run(workdir, *arguments, **fields) → exit code."""
    place = tmp_path_factory.mktemp("configs")

    def run(workdir, *arguments, **changes):
        config = write_config(place / "config.py", **fields(world, **changes))
        return cli.main(["baselines", f"--config={config}", f"--workdir={workdir}", *arguments])

    return run


@pytest.fixture(scope="module")
def finished(run, world, tmp_path_factory):
    """A working directory with every method of one target."""
    workdir = tmp_path_factory.mktemp("finished") / "work"
    assert run(workdir, baselines__methods=METHODS, baselines__targets=(f"{world}/weights/gpt2",)) == 0
    return workdir


def snapshot(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_what_it_makes(finished, world):
    found = {path.name for path in (finished / "baselines").iterdir()}
    own = {"task_arithmetic-scale=0.5", "task_arithmetic-scale=0.0", "npo-steps=3", "profs-pairs=8", STEERED}
    own |= {"lm_steer-steer=-2.0-rank=1000-steps=2-batch_size=4"}
    assert found == {"toxic", "clean", *own}
    for name in found:
        [directory] = (finished / "baselines" / name).iterdir()
        assert directory.name == "gpt2" and (directory / "hf/model.safetensors").exists()
        assert not (directory / "checkpoints").exists()
    record = json.loads((finished / "baselines/npo-steps=3/gpt2/stage.json").read_text())
    assert record["figures"]["steps"] == 3 and record["settings"]["beta"] == 0.1
    assert [line["step"] for line in lines_of(finished / "baselines/npo-steps=3/gpt2")] == [1, 2, 3]
    first = lines_of(finished / "baselines/npo-steps=3/gpt2")[0]  # policy and reference differ by dropout alone
    assert first["loss"] == pytest.approx(20 * np.log(2), rel=5e-3)


@pytest.mark.slow
def test_they_are_what_their_names_say(finished, world):
    base = load_file(world / "weights/gpt2/model.safetensors")
    room = finished / "baselines"
    assert same(weights(room / "task_arithmetic-scale=0.0/gpt2"), base)
    toxic, half = weights(room / "toxic/gpt2"), weights(room / "task_arithmetic-scale=0.5/gpt2")
    for key, leaf in base.items():
        np.testing.assert_allclose(half[key], leaf - 0.5 * (toxic[key] - leaf), rtol=1e-5, atol=1e-7)
    steered = weights(room / STEERED / "gpt2")
    back = weights(room / "lm_steer-steer=-2.0-rank=1000-steps=2-batch_size=4/gpt2")
    assert not checkpoint.load_config(room / STEERED / "gpt2").tie_word_embeddings
    assert {key for key in steered if key not in base or not np.array_equal(steered[key], base[key])} == {
        "lm_head.weight"
    }
    head = base["transformer.wte.weight"]
    np.testing.assert_allclose(back["lm_head.weight"], head - 2 * (steered["lm_head.weight"] - head), atol=1e-7)
    assert np.abs(steered["lm_head.weight"] - head).max() > 0
    for kind in ("toxic", "clean"):
        assert not same(weights(room / kind / "gpt2"), base)


@pytest.mark.slow
def test_what_is_complete_is_left_alone(finished, run, world):
    before = snapshot(finished)
    target = (f"{world}/weights/gpt2",)
    assert run(finished, baselines__methods=METHODS, baselines__targets=target) == 0
    assert run(finished, baselines__methods=METHODS[:3], baselines__targets=target, baselines__keep=1) == 0
    assert snapshot(finished) == before


@pytest.mark.slow
def test_more_methods_and_targets_find_the_twins(finished, run, world):
    before = snapshot(finished)
    assert run(finished, baselines__methods=("task_arithmetic(scale=0.25)",)) == 0  # of llama as well
    after = snapshot(finished)
    assert {name: after[name] for name in before} == before
    new = {name.split("/hf/")[0] for name in after.keys() - before.keys() if name.endswith("model.safetensors")}
    room = "baselines/task_arithmetic-scale=0.25"
    assert new == {"baselines/toxic/llama", f"{room}/gpt2", f"{room}/llama"}


def test_dry_run_lists_the_work(run, tmp_path, capsys, world):
    assert run(tmp_path / "work", "--dry_run", baselines__methods=("lm_steer", "dexperts")) == 0
    lines = [re.split("  | to do", line)[0] for line in capsys.readouterr().out.splitlines()]
    twins = [f"baselines {kind} {name}" for kind in ("toxic", "clean") for name in ("gpt2", "llama")]
    own = [f"baselines {method} {name}" for method in ("lm_steer-steer=1.0", "lm_steer") for name in ("gpt2", "llama")]
    assert lines == [*twins, *own]
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_an_adapter_of_each_target(run, world, tmp_path):
    changes = {"baselines__lora__rank": 2, "baselines__targets": (f"{world}/weights/llama",)}
    methods = ("dexperts", "task_arithmetic", "npo(steps=2)")
    assert run(tmp_path, baselines__methods=methods, **changes) == 0
    toxic = tmp_path / "baselines/toxic/llama"
    assert (toxic / "adapter").exists() and not (toxic / "hf").exists()
    base, twin = (models.lora.merge(checkpoint.load(path)).params for path in (
        f"{world}/weights/llama", f"{world}/weights/llama+{toxic}"
    ))  # fmt: skip
    made = checkpoint.load(tmp_path / "baselines/task_arithmetic/llama").params
    kernel = lambda params: np.asarray(params["blocks"]["mlp"]["down"]["kernel"])  # noqa: E731
    np.testing.assert_allclose(kernel(made), kernel(base) - 0.5 * (kernel(twin) - kernel(base)), rtol=1e-5, atol=1e-7)
    assert (tmp_path / "baselines/npo-steps=2/llama/hf/model.safetensors").exists()


# ------------------------------------------------------------------------------------------ candidates


def test_candidates(world, tmp_path):
    config = settings.default_config()
    config.targets = (f"{world}/weights/gpt2", f"{world}/weights/llama")
    config.toxify.data, config.baselines.clean_data = "jsonl:toxic", "jsonl:clean"
    config.baselines.methods = (*METHODS, "self_debiasing")
    config.baselines.targets = config.targets[1:]
    found = baselines.candidates(settings.parse_run(config, epath.Path(tmp_path)))
    assert [name.partition("-")[0] for name in found] == [text.partition("(")[0] for text in config.baselines.methods]
    assert all(one.targets == config.targets[1:] for one in found.values())
    experts = found["dexperts-alpha=1.0-top_p=0.95"]
    assert experts.models == ("{target}", *(f"{{workdir}}/baselines/{kind}/{{name}}" for kind in ("clean", "toxic")))
    assert experts.objective == "dexperts(alpha=1.0, top_p=0.95)"
    assert found["npo-steps=3"].models == ("{workdir}/baselines/npo-steps=3/{name}",)
    assert found["preprompt-text=-Be-kind"].prefixes == ("Be kind: ",)
    config.baselines.lora.rank = 4
    found = baselines.candidates(settings.parse_run(config, epath.Path(tmp_path)))
    assert found["dapt"].models == ("{target}+{workdir}/baselines/clean/{name}",)


def test_a_long_text_is_a_short_name():
    one, other = (baselines.form(f"preprompt(text='{'word ' * 60}{end}')") for end in ("a", "b"))
    assert one != other and len(one) < 100 and one.startswith("preprompt-text=-word-word")


# ------------------------------------------------------------------------------------------ a killed run


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(world, tmp_path):
    methods = ("npo(steps=40, learning_rate=1e-4)",)
    changes = {"baselines__methods": methods, "baselines__targets": (f"{world}/weights/gpt2",), "mesh": "data:1"}
    changes |= {"baselines__save_minutes": 0.002, "baselines__log_every": 5}
    config = write_config(tmp_path / "config.py", **fields(world, **changes))

    def begin(name):
        return start("baselines", f"--config={config}", f"--workdir={tmp_path / name}")

    alone, killed = "alone", "killed"
    child = begin(alone)
    _, printed = child.communicate(timeout=HANGS)
    assert child.returncode == 0, printed
    child, where = begin(killed), tmp_path / killed / "baselines/npo-steps=40-learning_rate=1e-4/gpt2"
    while child.poll() is None and not any(path.name.isdigit() for path in (where / "checkpoints").glob("*")):
        time.sleep(0.01)
    child.kill()
    child.communicate(timeout=HANGS)
    assert child.returncode != 0 and not (where / "stage.json").exists() and (where / "stage.partial.json").exists()
    child = begin(killed)
    _, printed = child.communicate(timeout=HANGS)
    assert child.returncode == 0 and re.search(r"continues from step \d+ of 40", printed), printed
    other = tmp_path / alone / where.relative_to(tmp_path / killed)
    assert same(weights(where), weights(other)) and lines_of(where) == lines_of(other)


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("dexprts",)}, "config.baselines.methods: baseline: unknown name 'dexprts'; did you mean"),
        ({"methods": ("npo(bta=1)",)}, "config.baselines.methods: baseline npo: no setting 'bta'; did you mean"),
        ({"methods": ("lm_steer(rank=0)",)}, "baseline lm_steer: rank: found 0, expected at least 1"),
        ({"methods": ("task_arithmetic(scale=1e999)",)}, "scale: found inf, expected a finite number"),
        ({"methods": ("dexperts(top_p=2)",)}, r"config.baselines.methods: objective dexperts: top_p: found 2.0"),
        ({"methods": ("dapt", "dapt")}, "'dapt' is listed twice"),
        ({"methods": ("dapt",), "clean_data": ""}, "clean_data: empty, but dapt needs clean text"),
        ({"methods": ("profs",), "clean_data": ""}, "clean_data: empty, but profs needs clean text"),
        ({"methods": ("lm_steer",), "toxify__data": ""}, "config.baselines.data: empty, but lm_steer.* needs toxic"),
        ({"methods": ("dapt",), "targets": ("gpt3",)}, "config.baselines.targets: 'gpt3' .*see config.targets"),
        ({"methods": ("npo",), "steps": 0}, "config.baselines.steps: found 0, and config.baselines.epochs is 0 too"),
        ({"methods": ("dapt",), "clean_data": "jsonl:nowhere.jsonl"}, "no file '.*nowhere.jsonl'"),
        ({"methods": ()}, "nothing to do for baselines; config.baselines names nothing"),
        ({"methods": ("dapt,npo",)}, "a comma inside an element"),
    ],
)
def test_a_mistake_is_one_line_before_any_model_is_loaded(changes, words, run, world, tmp_path, capsys, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(checkpoint, "load", loaded)
    names = {name if "__" in name else f"baselines__{name}": value for name, value in changes.items()}
    assert run(tmp_path / "work", **names) == 2
    printed = capsys.readouterr().err
    [line] = [line for line in printed.splitlines() if line.startswith("unidetox: ")]
    assert re.search(words, line) and "Traceback" not in printed
    assert not (tmp_path / "work/baselines").exists()
