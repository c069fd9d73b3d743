"""Hugging Face checkpoints round-trip bit-exactly, for every variant, dtype, mesh and kind of file."""

import itertools
import json

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from variants import EVERY, VARIANTS, chosen, params_from_torch, torch_model

from unidetox_jax import checkpoint, models, sharding
from unidetox_jax.checkpoint import hf, streaming
from unidetox_jax.checkpoint.weights import Weights
from unidetox_jax.errors import UserError


def tensors_of(directory):
    """Every tensor of a directory's safetensors files, by name."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        assert torch.equal(bits(tensor), bits(right[name])), name


def assert_same_params(left, right):
    left, right = ({jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
                   for tree in (left, right))  # fmt: skip
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert leaf.dtype == right[name].dtype, name
        assert np.asarray(leaf).tobytes() == np.asarray(right[name]).tobytes(), name


@pytest.mark.quick_variants(12)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_round_trips_bit_exactly(variant, tmp_path):
    reference = torch_model(VARIANTS[variant])
    reference.save_pretrained(tmp_path / "there")
    model = checkpoint.load(tmp_path / "there")
    assert_same_params(model.params, params_from_torch(reference, model.cfg))
    checkpoint.save_hf(tmp_path / "back", model)
    assert_same_bits(tensors_of(tmp_path / "there"), tensors_of(tmp_path / "back"))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(loaded) is type(reference)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_bits(loaded.state_dict(), reference.state_dict())
    assert checkpoint.load_config(tmp_path / "back") == model.cfg


ONE_EACH = chosen("gpt2", "opt-350m", "falcon-rw-1b", "llama-3.2-transformers-5", "mistral-1", "qwen-2", "qwen-3",
                  "gemma-1", "gemma-2", "gemma-3", "olmo-2", "olmo-3", "phi-4-mini", "pythia")  # fmt: skip
HALF = ("bfloat16", "float16")


@pytest.mark.quick_variants(4)
@pytest.mark.parametrize(
    ("variant", "dtype"),
    itertools.product(ONE_EACH, HALF) if EVERY else [("gpt2", "float16"), *zip(ONE_EACH, itertools.cycle(HALF))],
)
def test_half_precision_round_trips_bit_exactly(variant, dtype, tmp_path):
    torch_model(VARIANTS[variant], dtype=dtype).save_pretrained(tmp_path / "there")
    model = checkpoint.load(tmp_path / "there", mesh=sharding.make_mesh("data:2,fsdp:2,model:2"))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {dtype}
    checkpoint.save_hf(tmp_path / "back", model)
    assert_same_bits(tensors_of(tmp_path / "there"), tensors_of(tmp_path / "back"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert loaded.dtype == getattr(torch, dtype)


@pytest.mark.quick_variants(1)
@pytest.mark.parametrize("variant", ["gpt2", "falcon-40b", "opt-no-final-norm"])
def test_orbax_checkpoint_is_read_on_another_mesh(variant, tmp_path):
    torch_model(VARIANTS[variant], dtype="bfloat16").save_pretrained(tmp_path / "there")
    model = checkpoint.load(tmp_path / "there", mesh=sharding.make_mesh("fsdp:4,model:2"))
    checkpoint.save(tmp_path / "orbax", model)
    again = checkpoint.load(tmp_path / "orbax", mesh=sharding.make_mesh("data:2,model:4"))
    assert again.cfg == model.cfg
    assert sharding.mesh_of(again.params).shape["model"] == 4
    checkpoint.save_hf(tmp_path / "back", again)
    assert_same_bits(tensors_of(tmp_path / "there"), tensors_of(tmp_path / "back"))


def test_requested_dtype_is_the_rounding_of_the_stored(tmp_path):
    reference = torch_model(VARIANTS["llama-3"])
    reference.save_pretrained(tmp_path / "there")
    model = checkpoint.load(tmp_path / "there", param_dtype="bfloat16")
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path / "there").items()}
    checkpoint.save_hf(tmp_path / "loaded", model)
    assert_same_bits(tensors_of(tmp_path / "loaded"), expected)
    full = checkpoint.load(tmp_path / "there")
    checkpoint.save_hf(tmp_path / "saved", full, dtype="bfloat16")
    assert_same_bits(tensors_of(tmp_path / "saved"), expected)
    checkpoint.save(tmp_path / "orbax", full)
    assert_same_params(checkpoint.load(tmp_path / "orbax", param_dtype="bfloat16").params, model.params)
    with pytest.raises(UserError, match="dtype 'int8': expected float32"):
        checkpoint.load(tmp_path / "there", param_dtype="int8")


def test_many_files_are_written_and_read(tmp_path, monkeypatch):
    reference = torch_model(VARIANTS["llama-2-linear"])
    reference.save_pretrained(tmp_path / "there", max_shard_size="60KB")
    assert len(list((tmp_path / "there").glob("*.safetensors"))) > 2
    model = checkpoint.load(tmp_path / "there")
    monkeypatch.setattr(hf, "SHARD_BYTES", 60_000)
    checkpoint.save_hf(tmp_path / "back", model)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(path.stat().st_size < 70_000 for path in files)
    assert_same_bits(tensors_of(tmp_path / "there"), tensors_of(tmp_path / "back"))
    ours, theirs = (json.loads((tmp_path / name / hf.INDEX).read_text()) for name in ("back", "there"))
    assert ours["metadata"] == theirs["metadata"] and ours["weight_map"].keys() == theirs["weight_map"].keys()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert_same_bits(loaded.state_dict(), reference.state_dict())


@pytest.mark.parametrize("layout", ["one", "many", "before PyTorch 1.6"])
def test_bin_weights(layout, tmp_path):
    reference = torch_model(VARIANTS["opt-125m"], dtype="bfloat16")
    reference.config.save_pretrained(tmp_path)
    tensors = dict(reference.state_dict())  # the tied head included, as PyTorch writes it
    if layout == "many":
        names = sorted(tensors)
        parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, part in parts.items():
            torch.save({name: tensors[name] for name in part}, tmp_path / file)
        places = {name: file for file, part in parts.items() for name in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "one")
    model = checkpoint.load(tmp_path)
    checkpoint.save_hf(tmp_path / "back", model)
    assert_same_bits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict(), tensors)


def test_bin_with_more_than_tensors_is_refused(tmp_path):
    torch_model(VARIANTS["gpt2"]).config.save_pretrained(tmp_path)
    torch.save({"a": pytest.raises}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: damaged, or holds more than tensors"):
        checkpoint.load(tmp_path)
    torch.save({"a": 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="key 'a': found int, expected a tensor"):
        checkpoint.load(tmp_path)


def test_bin_without_pytorch_names_the_extra(tmp_path, monkeypatch):
    torch_model(VARIANTS["gpt2"]).config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'unidetox-jax\[torch\]'"):
        Weights(tmp_path)


@pytest.mark.parametrize("variant, bare", [("gpt2", "transformer"), ("opt-125m", "model"), ("llama-1", "model")])
def test_checkpoint_of_the_bare_model(variant, bare, tmp_path):
    reference = torch_model(VARIANTS[variant])
    reference.config.save_pretrained(tmp_path)
    tensors = {name.removeprefix(f"{bare}."): tensor.contiguous() for name, tensor in reference.state_dict().items()}
    if reference.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if variant == "gpt2":  # constant masks of older versions
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")  # and no metadata
    model = checkpoint.load(tmp_path)
    assert_same_params(model.params, params_from_torch(reference, model.cfg))


def test_tied_checkpoint_that_stores_the_head(tmp_path):
    reference = torch_model(VARIANTS["gpt2"])
    reference.config.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    expected = params_from_torch(reference, models.config_from_hf(VARIANTS["gpt2"]))
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert_same_params(checkpoint.load(tmp_path).params, expected)
    embedding = tensors.pop("transformer.wte.weight")  # some writers store the pair under the head's name
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert_same_params(checkpoint.load(tmp_path).params, expected)
    tensors["transformer.wte.weight"] = embedding + 1
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="key 'lm_head.weight' differs from 'transformer.wte.weight'"):
        checkpoint.load(tmp_path)


def test_layers_of_mixed_dtypes_take_the_wider_one(tmp_path):
    reference = torch_model(VARIANTS["gpt2"])
    reference.config.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    tensors["transformer.h.1.ln_1.weight"] = tensors["transformer.h.1.ln_1.weight"].bfloat16()
    tensors["transformer.ln_f.weight"] = tensors["transformer.ln_f.weight"].bfloat16()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    params = checkpoint.load(tmp_path).params
    assert params["blocks"]["attention_norm"]["scale"].dtype == "float32"
    assert params["final"]["norm"]["scale"].dtype == "bfloat16"


@pytest.mark.parametrize("mesh", ["model:8", "fsdp:8", "data:2,fsdp:2,model:2"])
@pytest.mark.parametrize(
    "shape, axes", [((48, 24), ("model", "fsdp")), ((5, 16, 24), (None, "fsdp", "model")), ((7,), ())]
)
def test_array_written_and_read_in_pieces(mesh, shape, axes, monkeypatch):
    """Pieces of a few rows, for every sharding of the first axis, written and read back."""
    mesh = sharding.make_mesh(mesh)
    axes = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=False)]
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    monkeypatch.setattr(streaming, "PIECE_BYTES", 700)
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    stacked = len(shape) == 3
    leaf = streaming.allocate(shape, np.float32, placed)
    released = []
    for first in range(len(values)) if stacked else [0]:
        rows = values[first : first + 1] if stacked else values
        transposed = np.moveaxis(np.ascontiguousarray(np.moveaxis(rows, 0, -1)), -1, 0)  # any strides will do
        leaf = streaming.write_rows(leaf, first, transposed, lambda: released.append(1))
    assert leaf.sharding == placed and np.array_equal(leaf, values)
    assert released
    for first, count in [(3, 1)] if stacked else [(0, len(values))]:
        assert np.array_equal(streaming.read_rows(leaf, first, count), values[first : first + count])


def test_pieces_of_a_sharded_vocabulary_are_not_gathered():
    mesh = sharding.make_mesh("fsdp:2,model:4")
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", "fsdp"))
    piece = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", None, "fsdp"))
    leaf = jax.ShapeDtypeStruct((4096, 64), np.float32, sharding=placed)
    part = jax.ShapeDtypeStruct((4, 8, 64), np.float32, sharding=piece)
    start = jax.ShapeDtypeStruct((), np.int32)
    for program in (
        streaming._update(placed, 4).lower(leaf, part, start),
        streaming._slice(piece, 4, 8).lower(leaf, start),
    ):
        text = program.compile().as_text()
        assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text


def test_existing_directories(tmp_path, shared):
    model = checkpoint.load(shared / "models" / "stories260K")
    checkpoint.save_hf(tmp_path / "out", model, checkpoint.load_tokenizer(shared / "models" / "stories260K"))
    checkpoint.save(tmp_path / "out", model)  # replaces all of the other checkpoint's files
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["generation_config.json", "model.json", "params"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds 'thesis.tex', which is no part of a checkpoint"):
        checkpoint.save_hf(tmp_path / "out", model)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: found a file, expected a directory"):
        checkpoint.save(tmp_path / "file", model)


def test_sources(tmp_path, shared):
    """A finished stage means its export; an unfinished one, a file, nothing and an unknown hub id are errors."""
    real = shared / "models" / "stories260K"
    model = checkpoint.load(real)
    checkpoint.save_hf(tmp_path / "stage" / "hf", model)
    (tmp_path / "stage" / "stage.json").write_text("{}")
    assert_same_params(checkpoint.load(tmp_path / "stage").params, model.params)
    assert checkpoint.load_config(tmp_path / "stage").num_layers == 5
    (tmp_path / "stage" / "stage.json").rename(tmp_path / "stage" / "stage.partial.json")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "stage", "this stage is not finished"),
        (tmp_path / "nothing", "nothing: no such directory"),
        (tmp_path / "stage" / "hf" / "config.json", "found a file, expected the directory"),
        (tmp_path / "empty", "no checkpoint; expected config.json"),
        ("nobody/nothing", "nobody/nothing: no such directory, and no download from the hub"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.load(source)
        with pytest.raises(UserError):
            checkpoint.load_tokenizer(source)


def test_numpy_params_can_be_saved(tmp_path):
    cfg = models.config_from_hf(VARIANTS["llama-3"])
    params = params_from_torch(torch_model(VARIANTS["llama-3"]), cfg)
    checkpoint.save_hf(tmp_path / "numpy", models.Model(params, cfg))
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[3]), params)
    checkpoint.save_hf(tmp_path / "placed", models.Model(placed, cfg))
    assert_same_params(checkpoint.load(tmp_path / "numpy").params, checkpoint.load(tmp_path / "placed").params)
    assert_same_params(checkpoint.load(tmp_path / "numpy").params, params)


@pytest.mark.parametrize("files", ["all", "tokenizer.json", "tokenizer.model"])
def test_tokenizer(files, tmp_path, shared):
    real = shared / "models" / "stories260K"
    if files == "all":
        tokenizer = checkpoint.load_tokenizer(real)
    elif files == "tokenizer.json":
        for name in ("tokenizer.json", "config.json"):
            (tmp_path / name).write_bytes((real / name).read_bytes())
        tokenizer = checkpoint.load_tokenizer(tmp_path)
    else:
        source = shared / "tokenizers" / "llama2"
        tokenizer = checkpoint.load_tokenizer(source)
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
        text = "Hello world, a naïve test: 12 + 7"
        assert tokenizer(text).input_ids == [1, *pieces.encode(text)]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.decode(tokenizer("Once upon").input_ids, skip_special_tokens=True) == "Once upon"
