"""Models in and out of directories, whichever form they have.

A model comes back in the dtype that it was stored in, while `cfg.dtype`, what it computes in, follows the machine
(float32 on CPU, bfloat16 on accelerators).
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from unidetox_jax import models, sharding, storage
from unidetox_jax.checkpoint import hf, orbax_io, peft
from unidetox_jax.checkpoint.source import GENERATION, MODEL, Source, find, split
from unidetox_jax.checkpoint.weights import Weights
from unidetox_jax.errors import UserError

PARAMS = "params"
# What a checkpoint's directory may hold; one that holds anything else is somebody's, and is not replaced.
NAMES = re.compile(
    r"(config|generation_config|model|special_tokens_map|added_tokens|.*\.index)\.json|vocab\.(json|txt)|merges\.txt"
    r"|sentencepiece\.bpe\.model|(tokenizer|chat_template)[\w.]*|params|.*\.safetensors|pytorch_model.*\.bin"
    r"|README\.md|LICENSE.*"
)


def load(source: epath.PathLike, mesh: Mesh | None = None, param_dtype: str | None = None) -> models.Model:
    """The model that `source` holds, streamed to the devices.

    Args:
      source: a Hugging Face directory or hub id, a directory of `save`, or a finished stage's; or MODEL+ADAPTER, one
        of these and PEFT's adapter of it.
      mesh: where the parameters live; None: the first device.
      param_dtype: "float32", "bfloat16" or "float16"; None: as stored.

    Raises:
      UserError: nothing there, an unknown model_type or option, a missing or surplus key, a wrong shape, damaged
        files: one line that names file and key.
    """
    name, adapter = split(source)
    if adapter:
        return peft.attach(load(name, mesh, param_dtype), adapter)
    found = find(name)
    cfg = read_config(found)
    mesh = sharding.single_device_mesh() if mesh is None else mesh
    param_dtype = param_dtype and hf.parse_dtype(param_dtype)
    if found.kind == "hf":
        return models.Model(hf.read_params(Weights(found.directory), cfg, mesh, param_dtype), cfg)
    return models.Model(_read_orbax(found.directory / PARAMS, cfg, mesh, param_dtype), cfg)


def load_all(
    sources: Iterable[epath.PathLike], mesh: Mesh | None = None, param_dtype: str | None = None
) -> dict[str, models.Model]:
    """`load` of each, by source. One that is named twice is loaded once, and MODEL+ADAPTER shares MODEL's weights with
    all that are made of it."""
    loaded: dict[str, models.Model] = {}

    def get(source: str) -> models.Model:
        if source not in loaded:
            name, adapter = split(source)
            loaded[source] = peft.attach(get(name), adapter) if adapter else load(name, mesh, param_dtype)
        return loaded[source]

    return {source: get(source) for source in map(str, sources)}


def load_config(source: epath.PathLike) -> models.ModelConfig:
    """The configuration alone of what `load` takes. Raises UserError as `load` does."""
    name, adapter = split(source)
    return peft.read_config(load_config(name), adapter) if adapter else read_config(find(name, weights=False))


def save(directory: epath.PathLike, model: models.Model) -> None:
    """Writes a model in Orbax's form, readable on any other mesh: params/ and model.json. Every process calls it.

    Raises:
      UserError: it cannot be written, or something else is there. Nothing half-written is left.
    """
    with storage.whole_directory(directory, NAMES) as work:
        write_orbax(work, model)


def save_hf(directory: epath.PathLike, model: models.Model, tokenizer: Any = None, dtype: str | None = None) -> None:
    """Writes a model in Hugging Face's form: `AutoModelForCausalLM.from_pretrained(directory)` loads it.

    Args:
      tokenizer: of transformers; its files are written as well.
      dtype: of the weights, as in `load`; None: as the parameters are.

    Raises:
      UserError: it cannot be written, or something else is there. Nothing half-written is left.
    """
    dtype = dtype and hf.parse_dtype(dtype)
    with storage.whole_directory(directory, NAMES) as work:
        if tokenizer is not None and jax.process_index() == 0:
            with storage.written_locally(work) as local:
                tokenizer.save_pretrained(local)
        hf.write(work, model, dtype)


def read_config(found: Source) -> models.ModelConfig:
    """The configuration of a checkpoint that was found, with its generation_config.json."""
    cfg = models.config_from_hf(found.directory) if found.kind == "hf" else _read_orbax_config(found.directory / MODEL)
    path = found.directory / GENERATION
    return dataclasses.replace(cfg, generation_config=_generation_config(path)) if path.exists() else cfg


def _generation_config(path: epath.Path) -> str:
    """The file's text. Raises UserError where its end tokens cannot be read."""
    try:
        text = path.read_bytes().decode()
        ends = json.loads(text).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: no dictionary in JSON ({error})") from None
    if not all(type(token) is int for token in models.as_ids(ends)):
        raise UserError(f"{path}: eos_token_id is {ends!r}, expected a token's id or a list of them")
    return text


def _read_orbax_config(path: epath.Path) -> models.ModelConfig:
    try:
        config = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    return models.config_from_hf(config, where=str(path))


def write_orbax(directory: epath.Path, model: models.Model) -> None:
    """params/ first, model.json last: on an object store it marks the whole as complete. An adapter is merged."""
    model = models.lora.merge(model)
    orbax_io.save_tree(directory / PARAMS, model.params)
    if jax.process_index() == 0:
        hf.write_generation_config(directory, model.cfg)
        record = {"format": "unidetox_jax 1", "config": models.config_to_hf(model.cfg)}
        storage.write_json(directory / MODEL, record)


def _read_orbax(directory: epath.Path, cfg: models.ModelConfig, mesh: Mesh, param_dtype: str | None) -> dict[str, Any]:
    stored = {} if param_dtype else orbax_io.saved_dtypes(directory)
    abstract = models.abstract_params(cfg, param_dtype or "float32")

    def target(path, leaf, placed):
        dtype = stored.get(sharding.path_string(path), leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=placed)

    shardings = sharding.param_shardings(abstract, mesh)
    return orbax_io.restore_tree(directory, jax.tree_util.tree_map_with_path(target, abstract, shardings))
