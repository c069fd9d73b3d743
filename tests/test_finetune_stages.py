"""pretrain, toxify, detoxify: from a configuration to finished models, and a clear line for every mistake."""

import json
import re
import types

import ml_collections
import numpy as np
import pytest
import transformers
from conftest import HANGS
from finetune_helpers import (
    lines_of,
    make_distilled,
    make_world,
    same,
    start,
    torch_loss,
    training,
    weights,
    write_config,
)

from unidetox_jax import checkpoint, cli, data, models
from unidetox_jax.data import toyworld
from unidetox_jax.stages import pretrain, settings, toxify
from unidetox_jax.stages.task import fingerprint

MESH = "data:2,fsdp:4"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """run(command, workdir, *arguments, **fields) → exit code: one command with a configuration of those fields."""
    place = tmp_path_factory.mktemp("configs")

    def run(command, workdir, *arguments, **fields):
        given = {"base": f"{world}/weights/gpt2", "mesh": MESH, **training(world, "toxify")}
        given |= {**training(world, "detoxify"), **training(world, "pretrain"), **fields}
        config = write_config(place / "config.py", **given)
        return cli.main([command, f"--config={config}", f"--workdir={workdir}", *arguments])

    return run


@pytest.fixture(scope="module")
def finished(run, world, tmp_path_factory):
    """A working directory with the toxic twin, distilled text, samples, two detoxified targets and one control."""
    workdir = tmp_path_factory.mktemp("finished") / "work"
    assert run("toxify", workdir) == 0
    make_distilled(workdir / "distilled", world)
    make_distilled(workdir / "samples", world, count=16)
    targets = (f"{world}/weights/gpt2", f"{world}/weights/llama")
    assert run("detoxify", workdir, targets=targets, control_targets=targets[:1]) == 0
    return workdir


def snapshot(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def complaint(capsys) -> str:
    """The one line of the mistake; nothing else may look like a crash."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    [line] = [line for line in printed.splitlines() if line.startswith("unidetox: ")]
    return line


# ------------------------------------------------------------------------------------------------- what they make


def test_toxify_makes_a_finished_directory(finished, world):
    toxic = finished / "toxic"
    found = {path.name for path in toxic.iterdir()}
    assert found == {"hf", "metrics.jsonl", "tensorboard", "stage.json"}
    record = json.loads((toxic / "stage.json").read_text())
    figures = record["figures"]
    assert figures["steps"] == 4 and figures["texts"] == 60 and figures["truncated"] > 0
    assert figures["validation_loss"] < figures["validation_loss_before"]
    assert {"train_loss", "tokens", "text_tokens", "tokens_per_second", "seconds"} <= set(figures)
    assert record["inputs"]["data"] == data.fingerprint(f"dghs?file={world}/toxic.jsonl")
    assert record["inputs"]["model"] == fingerprint(world / "weights/gpt2")
    assert [line["step"] for line in lines_of(toxic)] == [0, 1, 2, 3, 4]


def test_the_export_is_the_trained_model_with_its_tokenizer(finished, world):
    """PyTorch gives the validation loss that the stage recorded."""
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "toxic/hf").eval()
    assert model.dtype == torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "toxic/hf")
    texts = data.texts(f"jsonl:{world}/valid.jsonl")
    recorded = json.loads((finished / "toxic/stage.json").read_text())["figures"]["validation_loss"]
    np.testing.assert_allclose(torch_loss(model, tokenizer, texts, 32), recorded, rtol=1e-5)


def test_a_twin_is_found_by_its_stage_directory(finished):
    params, cfg = checkpoint.load(finished / "toxic")
    assert cfg.hidden_size == 32 and params["embed"]["tokens"]["embedding"].dtype == np.float32


def test_detoxify_makes_every_target_and_control(finished, world):
    assert sorted(path.name for path in (finished / "detoxified").iterdir()) == ["gpt2", "llama"]
    assert [path.name for path in (finished / "control").iterdir()] == ["gpt2"]
    for part, texts in (("detoxified/gpt2", 24), ("detoxified/llama", 24), ("control/gpt2", 16)):
        record = json.loads((finished / part / "stage.json").read_text())
        assert record["figures"]["texts"] == texts
        assert record["settings"]["data"].startswith("distilled:{workdir}/")  # so that a moved run stays complete
    assert not same(weights(finished / "detoxified/gpt2"), weights(finished / "control/gpt2"))
    assert checkpoint.load_config(finished / "detoxified/llama").family == "llama"


def test_what_is_complete_is_left_alone(finished, run, world):
    before = snapshot(finished)
    targets = (f"{world}/weights/gpt2", f"{world}/weights/llama")
    assert run("toxify", finished) == 0
    assert run("detoxify", finished, targets=targets, control_targets=targets[:1]) == 0
    assert snapshot(finished) == before


def test_a_record_in_the_old_spelling_is_complete(finished, run):
    record = finished / "toxic/stage.json"
    text = record.read_text()
    old = text.replace('"reproduce_release"', '"official"')
    assert old != text
    record.write_text(old)
    assert run("toxify", finished) == 0
    assert record.read_text() == old
    record.write_text(text)


@pytest.mark.parametrize(("lacking", "code"), [("clip_norm", 0), ("lora", 0), ("learning_rate", 2)])
def test_a_record_without_a_setting_had_its_default(finished, run, lacking, code):
    """As a version wrote it that did not have the setting: `clip_norm` is the default here, `learning_rate` is not."""
    record = finished / "toxic/stage.json"
    text = record.read_text()
    old = json.loads(text)
    del old["settings"][lacking]
    record.write_text(json.dumps(old))
    assert run("toxify", finished) == code
    record.write_text(text)


def test_other_settings_are_explained_and_watching_is_free(finished, run, capsys):
    before = snapshot(finished)
    (finished / "toxic/checkpoints/4").mkdir(parents=True)  # as one leaves it that is killed when it has just finished
    assert run("toxify", finished, toxify__learning_rate=2e-3) == 2
    assert "settings.learning_rate: was 0.001, now 0.002" in complaint(capsys)
    assert run("toxify", finished, toxify__save_minutes=1.0, toxify__log_every=3) == 0
    assert snapshot(finished) == before and not (finished / "toxic/checkpoints").exists()


def test_dry_run_says_what_is_done(finished, run, world, capsys):
    targets = (f"{world}/weights/gpt2", f"{world}/weights/opt")
    assert run("detoxify", finished, "--dry_run", targets=targets) == 0
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert lines == [["detoxify", "gpt2", "done"], ["detoxify", "opt", "to"]]


@pytest.mark.slow
def test_detoxify_on_any_other_data(run, world, tmp_path):
    options = {"targets": (f"{world}/weights/opt",), "detoxify__data": f"jsonl:{world}/train.jsonl"}
    assert run("detoxify", tmp_path, **options, detoxify__steps=0, detoxify__epochs=0.1) == 0
    record = json.loads((tmp_path / "detoxified/opt/stage.json").read_text())
    assert record["figures"]["steps"] == 4  # a tenth of 300 texts, 8 a step, rounded up
    assert record["figures"]["texts"] == 300


@pytest.mark.slow
def test_pretrain_begins_with_the_seeds_weights(run, world, tmp_path):
    fields = {"pretrain__models": (f"{world}/models/falcon",), "pretrain__learning_rate": 0.0}
    for seed, place in ((123, "a"), (123, "b"), (124, "c")):
        assert run("pretrain", tmp_path / place, **fields, pretrain__seed=seed) == 0
    a, b, c = (weights(tmp_path / place / "pretrained/falcon") for place in "abc")
    assert same(a, b) and not same(a, c)
    assert checkpoint.load_tokenizer(tmp_path / "a/pretrained/falcon").eos_token == "<|endoftext|>"


@pytest.mark.slow
def test_a_pretrained_model_may_have_text_of_its_own(run, world, tmp_path):
    names = (f"{world}/models/opt", f"{world}/models/llama=dghs?file={world}/toxic.jsonl")
    assert run("pretrain", tmp_path, pretrain__models=names, pretrain__steps=1) == 0
    for name, texts in (("opt", 300), ("llama", 60)):
        record = json.loads((tmp_path / f"pretrained/{name}/stage.json").read_text())
        assert record["figures"]["texts"] == texts


def test_an_estimate_needs_no_model(world, tmp_path):
    """6 operations for each parameter and token; nothing for a model that is not made yet."""
    config = ml_collections.ConfigDict({"base": f"{world}/weights/gpt2"})
    config.toxify = {"data": "text:nowhere.txt", "steps": 10, "batch_size": 4, "max_length": 100}
    [task] = toxify.tasks(settings.parse_run(config, tmp_path))
    assert task.operations() == 6 * 10 * 4 * 50 * models.num_params(checkpoint.load_config(world / "weights/gpt2"))
    config.base = "{workdir}/pretrained/gpt2"
    [task] = toxify.tasks(settings.parse_run(config, tmp_path))
    assert task.operations() == 0


@pytest.mark.slow
def test_pretrain_writes_the_world_it_learns(run, world, tmp_path, monkeypatch):
    """The tokenizers and texts are the world's own, written first; twice the same command writes once."""
    written = []

    def write(directory, seed, sizes):
        written.append((seed, sizes.train, sizes.scorer))
        make_world(directory)

    monkeypatch.setattr(pretrain, "toyworld", types.SimpleNamespace(write=write, Sizes=toyworld.Sizes))
    fields = {
        "pretrain__world": True, "pretrain__world_seed": 5, "pretrain__world_texts": 400,
        "pretrain__models": ("{workdir}/world/models/opt",),
        "pretrain__data": "jsonl:{workdir}/world/train.jsonl",
        "pretrain__validation": "jsonl:{workdir}/world/valid.jsonl",
    }  # fmt: skip
    for _ in range(2):
        assert run("pretrain", tmp_path, **fields) == 0
    assert written == [(5, 400, 400)]
    assert checkpoint.load_config(tmp_path / "pretrained/opt").family == "opt"
    assert run("toxify", tmp_path, base="{workdir}/pretrained/opt") == 0


@pytest.mark.slow
def test_official_trains_and_exports_bfloat16(run, world, tmp_path):
    assert run("toxify", tmp_path, toxify__official=True) == 0
    assert all(tensor.dtype == "bfloat16" for tensor in weights(tmp_path / "toxic").values())


def test_the_export_takes_the_dtype_asked_for(run, world, tmp_path):
    assert run("toxify", tmp_path, toxify__export_dtype="float16", toxify__steps=1) == 0
    assert all(tensor.dtype == np.float16 for tensor in weights(tmp_path / "toxic").values())


def test_a_finished_model_stays_readable_while_it_is_exported_again(finished, run, monkeypatch):
    """Whole or not at all: in the middle of writing, what stands there is the former export."""
    before = weights(finished / "toxic")
    seen = []
    write = checkpoint.model_io.hf.write

    def write_and_look(work, model, dtype):
        write(work, model, dtype)
        seen.append(same(weights(finished / "toxic"), before))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.model_io.hf, "write", write_and_look)
        record = json.loads((finished / "toxic/stage.json").read_text())
        begun = {key: record[key] for key in ("stage", "settings", "inputs")}
        (finished / "toxic/stage.partial.json").write_text(json.dumps(begun))
        (finished / "toxic/stage.json").unlink()
        assert run("toxify", finished) == 2
    assert seen == [True] and same(weights(finished / "toxic"), before)
    assert run("toxify", finished) == 0  # and the checkpoint of the last step is enough to finish
    assert same(weights(finished / "toxic"), before)


# ------------------------------------------------------------------------------------------------------- mistakes


SAMPLES = "samples: not complete, and control opt needs its texts; run `unidetox distill` first"


def bad_file(directory, name) -> str:
    """A data set that cannot be trained on, by the name of what is wrong."""
    contents = {
        "empty.jsonl": b"", "blank.jsonl": b'{"text": " "}\n', "columns.csv": b"sentence,label\nhello,1\n",
        "bytes.txt": b"fine\n\xff\xfe\n", "broken.jsonl": b'{"text": "a"}\n{"te\n',
    }  # fmt: skip
    (directory / name).write_bytes(contents[name])
    return f"{directory}/{name}"


@pytest.mark.parametrize(
    ("command", "fields", "words"),
    [
        ("toxify", {"toxify__max_length": 200}, "max_length: found 200, beyond the model's context of 128 tokens"),
        ("toxify", {"toxify__max_length": 1}, "max_length: found 1, expected at least 2"),
        ("toxify", {"toxify__data": "jsonl:{bad}/empty.jsonl"}, r"empty.jsonl: .*(empty|no )"),
        ("toxify", {"toxify__data": "jsonl:{bad}/blank.jsonl"}, "no text is left to train on: all 1 are empty"),
        ("toxify", {"toxify__data": "csv:{bad}/columns.csv"}, "no column 'text'; found 'sentence', 'label'"),
        ("toxify", {"toxify__data": "text:{bad}/bytes.txt"}, "bytes.txt, line 2: byte 0xff is not UTF-8"),
        ("toxify", {"toxify__data": "jsonl:{bad}/broken.jsonl"}, "broken.jsonl, line 2: not JSON"),
        ("toxify", {"toxify__data": "jsonl:{bad}/nothing.jsonl"}, "no file '.*nothing.jsonl'"),
        ("toxify", {"toxify__validation": "csv:{bad}/columns.csv"}, "no column 'text'"),
        ("toxify", {"toxify__data": ""}, "config.toxify.data: empty"),
        ("toxify", {"base": "{bad}/nowhere"}, "nowhere: no such directory"),
        ("toxify", {"toxify__steps": 0}, "config.toxify.steps: found 0, and config.toxify.epochs is 0 too"),
        ("toxify", {"toxify__learning_rate": -1.0}, "config.toxify.learning_rate: found -1.0"),
        ("toxify", {"toxify__learning_rate": float("nan")}, "config.toxify.learning_rate: found nan"),
        ("toxify", {"toxify__batch_size": 0}, "config.toxify.batch_size: found 0"),
        ("toxify", {"toxify__save_minutes": -1.0}, "config.toxify.save_minutes: found -1.0"),
        ("toxify", {"toxify__layout": "packed"}, "layout: no 'packed'; did you mean 'pack'"),
        ("toxify", {"toxify__export_dtype": "int8"}, "config.toxify.export_dtype: no 'int8'"),
        ("toxify", {"toxify__remat": "some"}, "config.toxify.remat: no 'some' .known: dots, full, none"),
        ("detoxify", {"targets": ("{world}/weights/opt", "{bad}/nowhere")}, "nowhere: no such directory"),
        ("detoxify", {"targets": ("{world}/weights/opt",), "control_targets": ("{world}/weights/opt",)}, SAMPLES),
        (
            "pretrain",
            {"pretrain__models": ("{world}/models/opt",), "pretrain__data": ""},
            "config.pretrain.data: empty",
        ),
        ("pretrain", {"pretrain__models": ("{bad}/nowhere",)}, "nowhere: no such directory"),
        ("pretrain", {}, "nothing to do for pretrain"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_else_is_touched(command, fields, words, run, world, tmp_path, capsys):
    bad, workdir = tmp_path / "bad", tmp_path / "work"
    bad.mkdir()
    make_distilled(workdir / "distilled", world)

    def filled(value):
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        if not isinstance(value, str):
            return value
        value = value.replace("{world}", str(world))
        if "{bad}" in value and not value.endswith(("nowhere", "nothing.jsonl")):
            bad_file(bad, value.rsplit("/", 1)[-1])
        return value.replace("{bad}", str(bad))

    before = snapshot(workdir)
    assert run(command, workdir, **{name: filled(value) for name, value in fields.items()}) == 2
    assert re.search(words, complaint(capsys))
    after = snapshot(workdir)
    assert {name: content for name, content in after.items() if not name.endswith("stage.partial.json")} == before


def test_a_mended_mistake_begins_anew(run, tmp_path, capsys):
    assert run("toxify", tmp_path, toxify__max_length=200) == 2
    assert run("toxify", tmp_path) == 0


def test_a_tokenizer_of_another_vocabulary(run, world, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    checkpoint.save_hf(
        mixed, checkpoint.load(world / "weights/llama"), checkpoint.load_tokenizer(world / "weights/opt")
    )
    assert run("toxify", tmp_path / "work", base=str(mixed)) == 2
    assert re.search(r"its tokenizer gave token \d+ \('.+'\), but the model's vocabulary has 512", complaint(capsys))


def test_a_checkpoint_of_another_model_in_the_directory(finished, run, world, tmp_path, capsys):
    """Somebody copied checkpoints; they are refused, and stay as they are."""
    copied = tmp_path / "toxic/checkpoints/4"
    with checkpoint.Checkpointer(copied.parent) as checkpoints:
        checkpoints.save(4, checkpoint.load(world / "weights/gpt2").params)
    before = snapshot(copied)
    assert run("toxify", tmp_path, base=f"{world}/weights/llama") == 2
    assert re.search(r"toxic/checkpoints: checkpoint of step 4: leaf .*", complaint(capsys))
    assert snapshot(copied) == before


def test_a_real_nan_names_step_and_rows(run, tmp_path, capsys):
    assert run("toxify", tmp_path, toxify__learning_rate=1e38, toxify__clip_norm=0.0) == 2
    line = complaint(capsys)
    assert re.search(r"toxify: step 2: loss (nan|inf), .* on rows \d+(, \d+){7} of the data", line)
    assert "try a lower learning_rate" in line


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_earlier_results_stay(finished, world, tmp_path):
    """A limit on the size of files stands for the disk's: the checkpoint is the first that does not fit."""
    config = write_config(
        tmp_path / "config.py", base=f"{world}/weights/gpt2", targets=(f"{world}/weights/opt",),
        **training(world, "detoxify"),
    )  # fmt: skip
    before = snapshot(finished)
    child = start("detoxify", f"--config={config}", f"--workdir={finished}", file_kib=20)
    _, printed = child.communicate(timeout=HANGS)
    assert child.returncode == 2, printed
    [line] = [line for line in printed.splitlines() if line.startswith("unidetox: ")]
    assert "cannot be written" in line and "Traceback" not in printed
    after = snapshot(finished)
    assert {name: after[name] for name in before} == before
    assert not (finished / "detoxified/opt/stage.json").exists()
