"""Low-rank adapters through the commands: toxify, distill, detoxify, evaluate; resumption; and what is refused."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from finetune_helpers import make_world, training, write_config
from safetensors.numpy import load_file

import unidetox_jax as ud
from unidetox_jax import checkpoint, cli, models
from unidetox_jax.errors import UserError
from unidetox_jax.stages import distill, settings, toxify
from unidetox_jax.stages.loading import trained_model
from unidetox_jax.stages.task import COMPLETE, PARTIAL

WEIGHTS = "adapter_model.safetensors"
STAGES = ("toxify", "distill", "detoxify", "evaluate")


@pytest.fixture(scope="module")
def world(one_device, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def configure(world, tmp_path_factory):
    """configure(**fields) → a configuration's path: every stage small, both trainings by LoRA."""
    place = tmp_path_factory.mktemp("configs")

    def configure(**fields):
        given = {"base": f"{world}/weights/gpt2", "mesh": "data:1"}
        given["targets"] = (f"{world}/weights/gpt2", f"{world}/weights/llama")
        given |= training(world, "toxify", learning_rate=1e-2, steps=6)
        given |= training(world, "detoxify", learning_rate=1e-2, save_minutes=9)
        given |= {"toxify__lora__rank": 4, "toxify__lora__targets": ("c_attn", "mlp.c_fc"), "detoxify__lora__rank": 2}
        given |= {"detoxify__lora__merge": True, "detoxify__lora__dropout": 0.1}
        given |= {"distill__num_texts": 16, "distill__max_length": 24, "distill__batch_size": 16}
        given |= {"evaluate__prompts": f"{world}/prompts.jsonl", "evaluate__runs": 1, "evaluate__samples": 2}
        given |= {"evaluate__metrics": ("toxicity",), "evaluate__scorer": "lexicon", "evaluate__max_prompts": 2}
        return write_config(place / "config.py", **{**given, **fields})

    return configure


@pytest.fixture(scope="module")
def run(configure):
    """run(command, workdir, *arguments, **fields) → exit code."""

    def run(command, workdir, *arguments, **fields):
        return cli.main([command, f"--config={configure(**fields)}", f"--workdir={workdir}", *arguments])

    return run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A working directory after all four stages."""
    workdir = tmp_path_factory.mktemp("finished") / "work"
    for stage in STAGES:
        assert run(stage, workdir) == 0, stage
    return workdir


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]  # test_lora.py has the meshes


def test_a_stage_leaves_an_adapter_of_little_size(finished, world):
    assert sorted(path.name for path in (finished / "toxic" / "adapter").iterdir()) == ["adapter_config.json", WEIGHTS]
    assert not (finished / "toxic" / "hf").exists()
    assert not (finished / "toxic" / "checkpoints").exists()
    tensors = load_file(finished / "toxic" / "adapter" / WEIGHTS)
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float32"}
    assert all(tensor.any() for tensor in tensors.values())
    assert (finished / "detoxified/llama/adapter" / WEIGHTS).exists()


def test_what_was_trained_is_in_peft_what_it_is_here(finished, world):
    source = f"{world}/weights/gpt2+{finished}/toxic"
    params, cfg = checkpoint.load(source)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 24)).astype(np.int32)
    found = models.forward(params, tokens, cfg)
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "weights/gpt2")
    adapted = peft.PeftModel.from_pretrained(model, str(finished / "toxic" / "adapter")).eval()
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    plain = checkpoint.load(f"{world}/weights/gpt2")
    assert np.abs(models.forward(plain.params, tokens, plain.cfg) - expected).max() > 1e-3


def test_the_merged_export_is_the_model_with_its_adapter(finished, world):
    merged, original = f"{finished}/detoxified/llama", f"{world}/weights/llama"
    assert cli.main(["verify", merged, f"{original}+{merged}"]) == 0
    assert cli.main(["verify", merged, original]) == 1
    config = json.loads((finished / "toxic/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_attn", "mlp.c_fc"] and config["r"] == 4


def test_base_and_twin_share_one_set_of_weights(finished, configure):
    run = settings.parse_run(cli.load_config(str(configure())), finished)
    plain, twin = (one.params for one in distill._load(run, run.distill)[0])
    for path in ("attention/query", "mlp/up"):
        part, name = path.split("/")
        assert plain["blocks"][part][name]["kernel"] is twin["blocks"][part][name]["kernel"]
    assert plain["embed"]["tokens"]["embedding"] is twin["embed"]["tokens"]["embedding"]
    assert "lora_a" in twin["blocks"]["mlp"]["up"] and "lora_a" not in plain["blocks"]["mlp"]["up"]
    record = json.loads((finished / "distilled/stage.json").read_text())
    assert record["inputs"]["models.toxic"] != record["inputs"]["models.base"]
    assert trained_model("M", "D", run.toxify) == "M+D"


def test_evaluation_is_of_the_adapted_model(finished, world):
    metrics = {path.parent.name: json.loads(path.read_text()) for path in finished.glob("evaluation/*/metrics.json")}
    assert sorted(metrics) == ["gpt2", "gpt2.detoxified", "llama", "llama.detoxified"]
    source = metrics["llama.detoxified"]["model"]["source"]
    assert source == f"{world}/weights/llama+{{workdir}}/detoxified/llama"
    texts = [(finished / "evaluation" / name / "generations.jsonl").read_text() for name in sorted(metrics)[2:]]
    assert texts[0] != texts[1]


def test_what_is_complete_is_left_alone_and_other_settings_are_explained(finished, run, capsys):
    for stage in STAGES:
        assert run(stage, finished) == 0
    assert run("toxify", finished, toxify__lora__rank=8) == 2
    assert "settings.lora.rank: was 4, now 8" in capsys.readouterr().err


def bytes_in(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_stopped_and_continued_is_the_same_to_the_bit(finished, configure, run, world, tmp_path, monkeypatch):
    """As SIGKILL after step 5 leaves it."""
    workdir = tmp_path / "work"
    with monkeypatch.context() as patched:
        patched.setattr("unidetox_jax.stages.task._remove_scratch", lambda task: None)
        assert run("toxify", workdir) == 0
    held = bytes_in(workdir / "toxic" / "checkpoints" / "6")
    cfg = models.config_from_hf(world / "weights/gpt2")
    assert held < 4 * models.num_params(cfg)  # with both moments, less than the weights alone
    [task] = toxify.tasks(settings.parse_run(cli.load_config(str(configure())), workdir))
    _, stays = task.disk()
    assert stays <= bytes_in(workdir / "toxic" / "adapter") < 1.5 * stays
    expected = (finished / "toxic/adapter" / WEIGHTS).read_bytes()
    assert (workdir / "toxic/adapter" / WEIGHTS).read_bytes() == expected
    record = json.loads((workdir / "toxic" / COMPLETE).read_text())
    (workdir / "toxic" / COMPLETE).unlink()
    (workdir / "toxic" / PARTIAL).write_text(json.dumps({k: record[k] for k in ("stage", "settings", "inputs")}))
    shutil.rmtree(workdir / "toxic" / "adapter")
    shutil.rmtree(workdir / "toxic" / "checkpoints" / "6")
    assert sorted(path.name for path in (workdir / "toxic/checkpoints").iterdir()) == ["5"]
    assert run("toxify", workdir) == 0
    assert (workdir / "toxic/adapter" / WEIGHTS).read_bytes() == expected


@pytest.mark.parametrize(
    ("stage", "fields", "line"),
    [
        ("toxify", {"toxify__lora__targets": ("q_proj",)}, "config.toxify.lora.targets: no linear layer 'q_proj'"),
        ("toxify", {"toxify__lora__rank": 33}, "config.toxify.lora.rank: found 33, but 'attn.c_attn' is"),
        ("toxify", {"toxify__lora__rank": -1}, "config.toxify.lora.rank: found -1"),
        ("toxify", {"toxify__lora__alpha": 0.0}, "config.toxify.lora.alpha: found 0.0, expected a number above 0"),
        ("toxify", {"toxify__lora__dropout": 1.0}, "config.toxify.lora.dropout: found 1.0, expected"),
        ("toxify", {"toxify__lora__dropout": 0.5, "toxify__dropout": False}, "toxify.lora.dropout: found 0.5, but"),
        ("toxify", {"toxify__reproduce_release": True}, "config.toxify.lora.rank: reproduce_release"),
        ("pretrain", {"pretrain__lora__rank": 2}, "config.pretrain.lora.rank: found 2, but random"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(run, world, tmp_path, capsys, stage, fields, line):
    if stage == "pretrain":
        fields = {**fields, **training(world, "pretrain"), "pretrain__models": (f"{world}/models/gpt2",)}
    assert run(stage, tmp_path / "work", **fields) == 2
    error = capsys.readouterr().err
    assert line in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "work" / "toxic").exists()


def test_an_unknown_field_of_lora_is_named(run, configure, tmp_path, capsys):
    assert cli.main(["toxify", f"--config={configure()}", f"--workdir={tmp_path}", "--config.toxify.lora.rnk=3"]) == 2
    assert "rnk" in capsys.readouterr().err
    assert cli.main(["toxify", f"--config={configure()}", f"--workdir={tmp_path}", "--config.toxify.lora.alpha=x"]) == 2
    with pytest.raises(UserError, match=r"config.toxify.lora.rnk: no such field; did you mean 'rank'"):
        settings.parse({"lora": {"rnk": 3}}, settings.ToxifySettings, "config.toxify")


def test_as_a_library(world, tmp_path):
    model = ud.load(world / "weights/opt")
    texts = [json.loads(line)["text"] for line in (world / "train.jsonl").read_text().splitlines()[:16]]
    options = {"steps": 3, "max_length": 32, "layout": "pad", "learning_rate": 1e-2}
    tuned = ud.finetune(model, texts, lora=ud.Lora(rank=4), **options)
    assert tuned.params["embed"]["tokens"]["embedding"] is model.params["embed"]["tokens"]["embedding"]
    ud.save_adapter(tuned, tmp_path / "adapter", str(world / "weights/opt"))
    ud.save(tuned, tmp_path / "merged")
    tokens = np.arange(20, dtype=np.int32)[None]
    expected = models.forward(tuned.params, tokens, tuned.cfg)
    for source in (f"{world}/weights/opt+{tmp_path}/adapter", tmp_path / "merged"):
        again = ud.load(source)
        np.testing.assert_allclose(models.forward(again.params, tokens, again.cfg), expected, rtol=0, atol=1e-4)
    assert np.abs(models.forward(model.params, tokens, model.cfg) - expected).max() > 1e-3
    whole = ud.finetune(tuned, texts, **options)  # all weights, of the model with its adapter merged
    assert not whole.cfg.lora.rank and "lora_a" not in whole.params["blocks"]["mlp"]["up"]
