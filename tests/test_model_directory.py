"""What the world's model directories hold beside a config and weights: generation settings, constants of old exports, a
second set of weights, adapters, tokens that the model does not have."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from finetune_helpers import ROOT
from variants import VARIANTS

from unidetox_jax import checkpoint, cli, data, decoding, models, training
from unidetox_jax.data.batches import collate, epoch_plans
from unidetox_jax.decoding import objectives
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.likelihood import loglikelihood

FAMILIES = ("gpt2", "opt-125m", "falcon-7b", "llama-3.2-transformers-5")
PROMPT = np.array([[5, 6, 7]], np.int32)
TARGETS = {  # of the paper, as published; a folder of shared/hub each
    "gpt2-xl": "gpt2-xl",
    "opt-6.7b": "SqueezeAILab-SqueezeLLM--models-opt-6.7b",
    "falcon-7b": "published--A-tiiuae--falcon-7b",
    "Llama-2-7b-hf": "published--A-meta-llama--Llama-2-7b-hf",
}


def tiny(variant="gpt2", **changes):
    cfg = models.config_from_hf({**VARIANTS[variant], **changes})
    return models.Model(models.init(cfg, jax.random.key(0)), cfg)


@pytest.fixture
def there(tmp_path):
    """A GPT-2 of random weights in Hugging Face's form."""
    checkpoint.save_hf(tmp_path / "there", tiny())
    return tmp_path / "there"


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def generated(model):
    return decoding.generate([model], PROMPT, objective=objectives.get("base"), max_new_tokens=4, seed=1)


# generation_config.json


def test_generation_config_travels_as_it_was(there, tmp_path):
    text = '{"do_sample":true,\r\n  "eos_token_id": [2, 9],\n "top_p": 0.90, "_comment": "Grüße"}'
    (there / "generation_config.json").write_bytes(text.encode())
    model = checkpoint.load(there)
    checkpoint.save_hf(tmp_path / "hf", model)
    checkpoint.save(tmp_path / "orbax", model)
    checkpoint.save_hf(tmp_path / "back", checkpoint.load(tmp_path / "orbax"))
    assert cli.main(["convert", str(tmp_path / "orbax"), str(tmp_path / "converted")]) == 0
    for name in ("hf", "back", "converted"):
        assert (tmp_path / name / "generation_config.json").read_bytes() == text.encode(), name
        assert checkpoint.load_config(tmp_path / name).eos_token_ids == (2, 9)
        assert json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"] == 2
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == [2, 9]


def test_without_generation_config_none_is_written(there, tmp_path):
    checkpoint.save(tmp_path / "orbax", checkpoint.load(there))
    checkpoint.save_hf(tmp_path / "back", checkpoint.load(tmp_path / "orbax"))
    assert not (tmp_path / "back" / "generation_config.json").exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").generation_config.eos_token_id == 2


@pytest.mark.parametrize("several", [True, False])
def test_its_end_tokens_end_a_row(several, there):
    without = generated(checkpoint.load(there))
    token = int(without.tokens[0, 0])
    assert without.lengths[0] > 1
    (there / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, token] if several else token}))
    result = generated(checkpoint.load(there))
    assert result.ended[0] and result.lengths[0] == 1 and result.tokens[0, 0] == token


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[2]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>', expected"),
    ],
)
def test_a_damaged_generation_config(text, message, there):
    (there / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=f"generation_config.json: {message}"):
        checkpoint.load(there)


def test_every_published_generation_config_is_read(shared, tmp_path):
    files = sorted(shared.glob("hub/*/generation_config.json"))
    assert len(files) > 50
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["gpt2"]))
    for path in files:
        (tmp_path / "generation_config.json").write_bytes(path.read_bytes())
        theirs = json.loads(path.read_text()).get("eos_token_id")
        ends = theirs if isinstance(theirs, list) else [theirs] * (theirs is not None)
        assert checkpoint.load_config(tmp_path).eos_token_ids == tuple(dict.fromkeys([2, *ends])), path


# Weights


@pytest.mark.quick_variants(2)
@pytest.mark.parametrize("variant", FAMILIES)
def test_constants_of_old_exports_are_passed_over(variant, tmp_path):
    model = tiny(variant)
    checkpoint.save_hf(tmp_path, model)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    one = np.ones(3, np.float32)
    constants = (
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.cos_cached",
        "layers.0.self_attn.rotary_emb.sin_cached", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq",
        "transformer.h.0.self_attention.maybe_rotary.inv_freq", "transformer.h.0.self_attention.rotary.inv_freq",
        "transformer.h.0.self_attention.rotary_emb.inv_freq", "transformer.h.0.attn.bias", "h.0.attn.masked_bias",
        "model.decoder.version", "decoder.version",
    )  # fmt: skip
    head = {"lm_head.weight": next(tensors[name] for name in tensors if "embed" in name or "wte" in name)}
    safetensors.numpy.save_file({**tensors, **dict.fromkeys(constants, one), **head}, file)
    assert same(checkpoint.load(tmp_path).params, model.params)
    safetensors.numpy.save_file({**tensors, "model.layers.0.self_attn.scale": one}, file)
    with pytest.raises(UserError, match="unexpected key 'model.layers.0.self_attn.scale'"):
        checkpoint.load(tmp_path)


def test_two_sets_of_weights(there, caplog):
    """An index with its shards beside model.safetensors, and .bin beside both: what transformers takes is taken."""
    tensors = safetensors.numpy.load_file(there / "model.safetensors")
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    safetensors.numpy.save_file(other, there / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (there / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({name: torch.tensor(tensor + 2) for name, tensor in tensors.items()}, there / "pytorch_model.bin")
    for left_out in ("", "model.safetensors", "model.safetensors.index.json"):
        (there / left_out).unlink() if left_out else None
        caplog.clear()
        with caplog.at_level("INFO", logger="absl"):
            found = checkpoint.load(there).params["embed"]["tokens"]["embedding"]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(there).state_dict()["transformer.wte.weight"]
        assert np.array_equal(found, theirs.numpy())
        lines = [line for line in caplog.messages if "as transformers does" in line]
        assert len(lines) == (left_out != "model.safetensors.index.json")
        assert all("pytorch_model.bin" in line for line in lines)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_refused_as_what_it_is(whole, there, tmp_path):
    directory = there if whole else tmp_path
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "r": 8}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    for read in (checkpoint.load, checkpoint.load_config):
        with pytest.raises(
            UserError,
            match=r"a LORA adapter of .*, not a model; give both, as meta-llama/Llama-2-7b-hf\+/",
        ):
            read(directory)


def test_paths_begin_at_home(there, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(there)
    model = checkpoint.load("~/there")
    checkpoint.save_hf("~/hf", model)
    checkpoint.save("~/orbax", model)
    assert cli.main(["convert", "~/orbax", "~/converted"]) == 0
    assert same(checkpoint.load("~/converted").params, model.params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "hf", "orbax", "there"]
    assert not list(pathlib.Path.cwd().glob("~*"))


# Tokens


@pytest.fixture(scope="module")
def padded(shared):
    """GPT-2's tokenizer with a pad token that was added to it and not to the model."""
    tokenizer = checkpoint.load_tokenizer(shared / "tokenizers" / "gpt2")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer.pad_token_id == 50257
    return tokenizer


def test_a_pad_token_outside_the_vocabulary_is_never_fed(padded):
    model = tiny(vocab_size=50257)
    tokens = data.tokenize(["a long text of several words", "short"], padded, 16, vocab_size=50257)
    ((shape, rows),) = epoch_plans(tokens, 2)
    batch = collate(tokens, shape, rows)
    assert batch["tokens"].max() == 50256
    loss, _ = training.loss(model.params, batch, model.cfg)
    assert np.isfinite(loss)


def test_a_token_outside_the_embedding_is_an_error_that_names_it(padded):
    with pytest.raises(UserError, match=r"token 50257 \('<\|pad\|>'\), but the model's vocabulary has 50257 tokens"):
        data.tokenize(["text with <|pad|> in it"], padded, 16, vocab_size=50257)
    model = tiny()
    for context, continuation in (([5, 131], [6]), ([5], [131, 6]), ([5], [6, 131])):
        with pytest.raises(UserError, match="request 1 has token 131, but the model's vocabulary has 131 tokens"):
            loglikelihood(model, [[5], context], [[6], continuation])
    with pytest.raises(UserError, match="token 131 in row 0, but model 0 has a vocabulary of 131"):
        decoding.generate([model], np.array([[5, 131]]), objective=objectives.get("base"), max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_published_target_lacks_nothing_but_its_weights(target, shared, tmp_path, capfd):
    """The paper's configuration with the published metadata, LLaMA-2's tokens or GPT-2's, comes to the weights."""
    directory = tmp_path / target
    directory.mkdir()
    tokenizer = shared / "tokenizers" / ("llama2" if target.startswith("Llama") else "gpt2")
    for path in (*tokenizer.iterdir(), *(shared / "hub" / TARGETS[target]).iterdir()):
        (directory / path.name).write_bytes(path.read_bytes())
    options = (f"--config.base={directory}", f"--config.data_dir={shared / 'data'}", f"--workdir={tmp_path / 'work'}")
    assert cli.main(["toxify", f"--config={ROOT}/configs/unidetox_gpt2_xl.py", *options]) == 2
    error = capfd.readouterr().err
    assert f"unidetox: {directory}: no weights; expected one of model.safetensors" in error
    assert error.count("ignored, since") == 1
