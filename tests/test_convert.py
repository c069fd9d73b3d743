"""`unidetox convert` and `unidetox verify` as a user runs them: files in, files out, one line for an error."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from variants import VARIANTS, torch_model

from unidetox_jax import cli
from unidetox_jax.checkpoint import verify


@pytest.fixture
def source(tmp_path):
    """A LLaMA with random weights in Hugging Face's format."""
    directory = tmp_path / "source"
    torch_model(VARIANTS["llama-3.1"]).save_pretrained(directory)
    return directory


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_round_trip_is_verified(source, tmp_path, capsys):
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    assert run("convert", source, orbax) == 0
    assert run("convert", orbax, back, "--mesh=model:2,fsdp:-1") == 0
    before, after = (load_file(path / "model.safetensors") for path in (source, back))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert run("verify", source, back) == 0
    printed = capsys.readouterr().out
    assert "PyTorch" in printed and "they agree" in printed and "500 tokens" in printed
    assert run("verify", back, orbax) == 0


def test_verify_detects_a_difference(source, tmp_path, capsys):
    other = tmp_path / "other"
    torch_model(VARIANTS["llama-3.1"], seed=1).save_pretrained(other)
    assert run("verify", source, other) == 1
    assert "THEY DISAGREE" in capsys.readouterr().out


def test_agreement_of_known_logits():
    first = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32))
    second = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]], np.float32))
    result = verify.compare(first, second)
    assert result.kl == pytest.approx(0.25 * np.log(2), rel=1e-5)
    assert result.difference == pytest.approx(np.log(2), rel=1e-5)
    assert result.top1 == 0.5 and result.top10 == 1.0 and not result.agrees


def test_real_model_with_its_tokenizer(shared, tmp_path):
    source, orbax, back = shared / "models" / "stories260K", tmp_path / "orbax", tmp_path / "back"
    assert run("convert", source, orbax, "--to=orbax") == 0
    assert run("convert", orbax, back, "--to=hf", "--dtype=float32") == 0
    assert run("verify", source, back) == 0
    tokenizers = [transformers.AutoTokenizer.from_pretrained(path) for path in (source, back)]
    first, second = (tokenizer("Once upon a time").input_ids for tokenizer in tokenizers)
    assert first == second
    models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (source, back)]
    ids = torch.tensor([first])
    assert torch.equal(*(model.generate(ids, do_sample=False, max_new_tokens=20) for model in models))


def damage(source, kind):
    """Damages a checkpoint; returns what the message must name."""
    weights, config = source / "model.safetensors", source / "config.json"
    settings, tensors = json.loads(config.read_text()), load_file(weights)
    if kind == "missing file":
        weights.unlink()
        return "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return "truncated"
    if kind in ("unknown type", "unknown option"):
        settings |= (
            {"model_type": "mamba"} if kind == "unknown type" else {"rope_scaling": {"type": "su", "factor": 2.0}}
        )
        config.write_text(json.dumps(settings))
        return "'mamba'" if kind == "unknown type" else "'su'"
    if kind == "wrong shape":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    elif kind == "missing key":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["model.layers.1.mlp.extra.weight"] = np.zeros(3, np.float32)
    save_file(tensors, weights, metadata={"format": "pt"})
    return {"wrong shape": "model.norm.weight", "missing key": "mlp.up_proj", "surplus key": "mlp.extra"}[kind]


@pytest.mark.parametrize(
    "kind",
    ["missing file", "truncated", "wrong shape", "unknown type", "unknown option", "missing key", "surplus key"],
)
def test_bad_input_is_one_line_naming_the_cause(source, tmp_path, capsys, kind):
    named = damage(source, kind)
    destination = tmp_path / "destination"
    assert run("convert", source, destination) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("unidetox:")]) == 1
    assert named in lines[-1] and str(source) in lines[-1] and "Traceback" not in "".join(lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_full_disk_leaves_nothing(source, tmp_path, form):
    """A limit on file sizes stands in for a full disk."""
    command = [sys.executable, "-m", "unidetox_jax.cli", "convert", source, tmp_path / "destination", f"--to={form}"]
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert result.returncode == 2, result.stderr
    assert "cannot be written" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_existing_destination_is_replaced_only_by_force(source, tmp_path, capsys):
    destination = tmp_path / "destination"
    assert run("convert", source, destination, "--to=hf") == 0
    assert run("convert", source, destination, "--to=hf") == 2
    assert "--force" in capsys.readouterr().err
    assert run("convert", source, destination, "--to=orbax", "--force") == 0
    (destination / "notes.txt").write_text("mine")
    assert run("convert", source, destination, "--force") == 2
    assert (destination / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_memory_of_a_large_conversion(tmp_path):
    """0.9 GB in four files to Orbax's format and back, in processes that hold the model and at most 0.6 GB more."""
    code = textwrap.dedent("""
        import re, sys, jax, numpy as np
        from unidetox_jax import checkpoint, cli, models
        from unidetox_jax.checkpoint import hf
        source, destination, form = sys.argv[1:]
        if form == "make":
            hf.SHARD_BYTES = 25 * 10**7
            cfg = models.config_from_hf({"model_type": "llama", "vocab_size": 8000, "hidden_size": 2048,
                "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16,
                "num_key_value_heads": 16, "max_position_embeddings": 512})
            one = np.float32(1)
            params = jax.tree.map(lambda leaf: np.broadcast_to(one, leaf.shape), models.abstract_params(cfg))
            checkpoint.save_hf(destination, models.Model(params, cfg))
            sys.exit()
        def peak():  # of this program; getrusage's starts from that of the process it was forked from
            return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
        jax.numpy.zeros(1).block_until_ready()
        before = peak()
        assert cli.main(["convert", source, destination, "--to=" + form]) == 0
        print("RISE", peak() - before)
    """)
    source, orbax, back = tmp_path / "source", tmp_path / "orbax", tmp_path / "back"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def child(source, destination, form):
        command = [sys.executable, "-c", code, str(source), str(destination), form]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    child("", source, "make")
    files = list(source.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    assert len(files) >= 4 and size > 0.9e9
    for left, right, form in ((source, orbax, "orbax"), (orbax, back, "hf")):
        rise = int(child(left, right, form).split("RISE")[1])
        assert size / 2 < rise <= size + 0.6e9, f"to {form}: {rise / 1e9:.2f} GB for {size / 1e9:.2f} GB"
        shutil.rmtree(left)
