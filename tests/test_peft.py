"""Adapters on disk: reading PEFT's files, PEFT reading ours, MODEL+ADAPTER as a model, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from test_lora import peft_model, torch_logits
from variants import VARIANTS, torch_model

from unidetox_jax import checkpoint, cli, models, sharding
from unidetox_jax.errors import UserError
from unidetox_jax.models import lora

FAMILIES = {"gpt2": "gpt2", "opt": "opt-125m", "falcon": "falcon-40b", "llama": "llama-3", "phi3": "phi-4-mini"}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module", params=FAMILIES)
def there(request, tmp_path_factory):
    """(directory of the model, directory of an adapter that PEFT wrote, PEFT's model)."""
    directory = tmp_path_factory.mktemp(request.param)
    model = torch_model(VARIANTS[FAMILIES[request.param]])
    model.save_pretrained(directory / "model")
    model.name_or_path = str(directory / "model")
    adapted = peft_model(model)
    adapted.save_pretrained(directory / "adapter")
    return directory / "model", directory / "adapter", adapted


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """As `there`, for one family."""
    directory = tmp_path_factory.mktemp("llama")
    model = torch_model(VARIANTS["llama-3"])
    model.save_pretrained(directory / "model")
    peft_model(model).save_pretrained(directory / "adapter")
    return directory / "model", directory / "adapter"


def tokens(cfg) -> np.ndarray:
    return np.random.default_rng(0).integers(3, cfg.vocab_size, (2, 24)).astype(np.int32)


@pytest.mark.quick_variants(2)
def test_what_peft_wrote_gives_pefts_logits(there):
    base, adapter, adapted = there
    params, cfg = checkpoint.load(f"{base}+{adapter}")
    expected = torch_logits(adapted, tokens(cfg))
    np.testing.assert_allclose(models.forward(params, tokens(cfg), cfg), expected, rtol=0, atol=1e-4)
    plain = checkpoint.load(base)
    assert np.abs(models.forward(plain.params, tokens(cfg), plain.cfg) - expected).max() > 0.1
    assert checkpoint.load_config(f"{base}+{adapter}") == cfg


def test_back_in_pefts_format_not_a_bit_has_changed(there, tmp_path):
    base, adapter, _ = there
    model = checkpoint.load(f"{base}+{adapter}")
    checkpoint.save_adapter(tmp_path / "out", model, str(base))
    theirs, ours = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    assert all(ours[name].tobytes() == tensor.tobytes() for name, tensor in theirs.items())
    found, expected = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path / "out", adapter))
    for name in ("peft_type", "task_type", "r", "lora_alpha", "fan_in_fan_out", "bias", "use_rslora", "lora_dropout"):
        assert found[name] == expected[name], name


@pytest.mark.quick_variants(2)
def test_peft_reads_what_was_written_here(there, tmp_path):
    base, adapter, _ = there
    params, cfg = checkpoint.load(f"{base}+{adapter}")
    adapted = jax.tree.map(lambda leaf: leaf + 0.01, lora.detach(params, cfg))
    plain = checkpoint.load(base)
    cfg = dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, rslora=True))
    model = models.Model(lora.attach(plain.params, adapted, cfg), cfg)
    checkpoint.save_adapter(tmp_path / "out", model, str(base))
    reread = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")
    theirs = peft.PeftModel.from_pretrained(reread, str(tmp_path / "out")).eval()
    found = models.forward(*model[:1], tokens(cfg), cfg)
    np.testing.assert_allclose(found, torch_logits(theirs, tokens(cfg)), rtol=0, atol=1e-4)
    checkpoint.save_hf(tmp_path / "merged", model)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")
    np.testing.assert_allclose(torch_logits(merged.eval(), tokens(cfg)), found, rtol=0, atol=1e-4)


def test_convert_merges_and_splits_off(llama, tmp_path, capsys):
    base, adapter = llama
    assert cli.main(["convert", f"{base}+{adapter}", str(tmp_path / "hf")]) == 0
    assert cli.main(["convert", f"{base}+{adapter}", str(tmp_path / "orbax"), "--to=orbax"]) == 0
    assert cli.main(["convert", f"{base}+{adapter}", str(tmp_path / "split"), "--to=adapter"]) == 0
    assert (tmp_path / "split" / WEIGHTS).read_bytes()[8:] and not (tmp_path / "split" / "config.json").exists()
    for other in (tmp_path / "hf", tmp_path / "orbax", f"{base}+{tmp_path / 'split'}"):
        assert cli.main(["verify", f"{base}+{adapter}", str(other)]) == 0
    assert cli.main(["verify", f"{base}+{adapter}", str(base)]) == 1
    # a merged model takes an adapter like any other
    assert cli.main(["convert", f"{base}+{adapter}+{adapter}", str(tmp_path / "twice")]) == 0
    assert cli.main(["verify", f"{tmp_path / 'hf'}+{adapter}", str(tmp_path / "twice")]) == 0
    assert cli.main(["convert", str(base), str(tmp_path / "none"), "--to=adapter"]) == 2
    assert "the model has no adapter" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_model_and_its_adapted_one_share_the_models_weights(llama, tmp_path):
    base, adapter = llama
    model = checkpoint.load(base)
    one = checkpoint.attach(model, adapter)
    for left, right in zip(jax.tree.leaves(model.params), _base_leaves(one.params), strict=True):
        assert left is right
    sources = [f"{base}+{adapter}", str(base), f"{base}+{adapter}"]
    loaded = checkpoint.load_all(sources)
    assert list(loaded) == sources[:2]
    for left, right in zip(*(_base_leaves(one.params) for one in loaded.values()), strict=True):
        assert left is right


def _base_leaves(params) -> list:
    named = jax.tree_util.tree_leaves_with_path(params)
    return [leaf for path, leaf in named if "lora" not in sharding.path_string(path)]


def test_a_model_on_a_mesh_takes_an_adapter(llama):
    base, adapter = llama
    mesh = sharding.make_mesh("data:2,fsdp:2,model:2")
    params, cfg = checkpoint.load(f"{base}+{adapter}", mesh)
    expected = models.forward(checkpoint.load(f"{base}+{adapter}").params, tokens(cfg), cfg)
    with jax.set_mesh(mesh):
        found = models.forward(params, jax.device_put(np.tile(tokens(cfg), (2, 1)), sharding.batch_sharding(mesh)), cfg)
    np.testing.assert_allclose(found[:2], expected, rtol=0, atol=1e-4)


def test_bin_files_and_bfloat16_are_read(llama, tmp_path):
    base, adapter = llama
    tensors = {name: torch.from_numpy(array).bfloat16() for name, array in load_file(adapter / WEIGHTS).items()}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    params, cfg = checkpoint.load(f"{base}+{tmp_path}")
    leaf = params["blocks"]["mlp"]["down"]["lora_b"]
    assert leaf.dtype == jnp.bfloat16
    theirs = tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].float().numpy().T
    np.testing.assert_array_equal(np.asarray(leaf[1], np.float32), theirs)


def test_a_plus_in_a_name_divides_nothing(llama, tmp_path):
    base, adapter = llama
    (tmp_path / "a+b").symlink_to(base)
    (tmp_path / "c+d").symlink_to(adapter)
    assert checkpoint.split_adapter(tmp_path / "a+b") == (str(tmp_path / "a+b"), "")
    assert checkpoint.split_adapter(f"{tmp_path}/a+b+{tmp_path}/c+d") == (f"{tmp_path}/a+b", f"{tmp_path}/c+d")
    assert checkpoint.split_adapter("meta-llama/Llama-2-7b-hf+someone/adapter") == (
        "meta-llama/Llama-2-7b-hf",
        "someone/adapter",
    )
    checkpoint.load_config(f"{tmp_path}/a+b+{tmp_path}/c+d")


def change(adapter, there, tensors=None, **config):
    """A copy of an adapter with other options and changed tensors."""
    found = json.loads((adapter / "adapter_config.json").read_text()) | config
    (there / "adapter_config.json").write_text(json.dumps(found))
    save_file((tensors or (lambda x: x))(load_file(adapter / WEIGHTS)), there / WEIGHTS)
    return there


def without(text):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if text not in name}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "config", "line"),
    [
        (None, {"peft_type": "IA3"}, r"adapter_config.json: peft_type 'IA3' is not implemented \(known: LORA\)"),
        (None, {"use_dora": True}, "use_dora = True is not implemented"),
        (None, {"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not implemented"),
        (None, {"layers_to_transform": [0]}, "layers_to_transform"),
        (None, {"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        (None, {"bias": "all"}, "bias = 'all' is not implemented"),
        (None, {"init_lora_weights": "pissa_niter_16"}, "init_lora_weights = 'pissa_niter_16' changes the model's own"),
        (None, {"r": "four"}, "r = 'four', expected a number"),
        (None, {"r": 3}, r"key '.*lora_A.weight' has shape \(4, 88\), expected \(3, 88\) \(r is 3\), or the adapter"),
        (None, {"r": 300, "base_model_name_or_path": "x/y"}, r"lora.rank: found 300, .*another model .*'x/y', says"),
        (
            renamed("model.layers.", "transformer.h."),
            {},
            "key 'base_model.model.transformer.h.*for another model than this",
        ),
        (renamed(".layers.2.", ".layers.7."), {}, "key '.*layers.7.*for another model than this llama"),
        (without(".layers.1."), {}, "key '.*layers.1.*is missing; adapters of only some layers"),
        (renamed("lora_A.weight", "lora_magnitude_vector"), {}, "expected only …lora_A.weight and …lora_B.weight"),
    ],
)
def test_what_is_refused_in_a_line(llama, tmp_path, tensors, config, line):
    base, adapter = llama
    there = change(adapter, tmp_path, tensors, **config)
    for read in (checkpoint.load_config, checkpoint.load):
        with pytest.raises(UserError, match=line) as caught:
            read(f"{base}+{there}")
        assert str(there) in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_no_adapter(llama, tmp_path, capsys):
    base, adapter = llama
    for source, line in [
        (f"{base}+{tmp_path}", f"{tmp_path}: no adapter; expected adapter_config.json"),
        (f"{base}+{tmp_path}/none", f"{tmp_path}/none: no such directory"),
        (str(adapter), f"give both, as MODEL+{adapter}"),
        (f"{adapter}+{adapter}", "not a model"),
    ]:
        assert cli.main(["convert", source, str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert line in error.splitlines()[-1] and "Traceback" not in error
    narrow = tmp_path / "narrow"
    torch_model({**VARIANTS["llama-3"], "hidden_size": 16}).save_pretrained(narrow)
    with pytest.raises(
        UserError, match=r"has shape \(32, 4\), expected \(16, 4\) .*, or the adapter is for another model"
    ):
        checkpoint.load(f"{narrow}+{adapter}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text("[")
    with pytest.raises(UserError, match=r"damaged/adapter_config.json: not JSON"):
        checkpoint.load(f"{base}+{tmp_path / 'damaged'}")
