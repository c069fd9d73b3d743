"""Loads and saves models, in Hugging Face's format or Orbax's.

Parameters keep the dtype they were stored in; the compute dtype, `cfg.dtype`, follows the machine (float32 on CPU,
bfloat16 on accelerators).
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
from unidetox_jax.checkpoint.source import GENERATION, MODEL, Source, resolve, split_adapter
from unidetox_jax.checkpoint.weights import Weights
from unidetox_jax.errors import UserError

PARAMS = "params"
# Names that a checkpoint's directory may hold; a directory with any other file is never replaced
FILE_NAMES = re.compile(
    r"(config|generation_config|model|special_tokens_map|added_tokens|.*\.index)\.json|vocab\.(json|txt)|merges\.txt"
    r"|sentencepiece\.bpe\.model|(tokenizer|chat_template)[\w.]*|params|.*\.safetensors|pytorch_model.*\.bin"
    r"|README\.md|LICENSE.*"
)


def load(source: epath.PathLike, mesh: Mesh | None = None, param_dtype: str | None = None) -> models.Model:
    """Loads the model at `source`, streamed to the devices.

    Args:
      source: a Hugging Face directory or hub id, a directory that `save` wrote or a finished stage's; or
        MODEL+ADAPTER, one of these and a PEFT adapter for it.
      mesh: where the parameters live; None: the first device.
      param_dtype: "float32", "bfloat16" or "float16"; None: as stored.

    Raises:
      UserError: nothing there, an unknown model_type or option, a missing or unexpected key, a wrong shape, damaged
        files; names the file and the key.
    """
    name, adapter = split_adapter(source)
    if adapter:
        return peft.attach(load(name, mesh, param_dtype), adapter)
    resolved = resolve(name)
    cfg = _read_config(resolved)
    mesh = sharding.single_device_mesh() if mesh is None else mesh
    param_dtype = param_dtype and hf.parse_dtype(param_dtype)
    if resolved.kind == "hf":
        return models.Model(hf.read_params(Weights(resolved.directory), cfg, mesh, param_dtype), cfg)
    return models.Model(_read_orbax(resolved.directory / PARAMS, cfg, mesh, param_dtype), cfg)


def load_all(
    sources: Iterable[epath.PathLike], mesh: Mesh | None = None, param_dtype: str | None = None
) -> dict[str, models.Model]:
    """Source → model. A source named twice is loaded once, and every MODEL+ADAPTER shares the weights of MODEL."""
    loaded: dict[str, models.Model] = {}

    def get(source: str) -> models.Model:
        if source not in loaded:
            name, adapter = split_adapter(source)
            loaded[source] = peft.attach(get(name), adapter) if adapter else load(name, mesh, param_dtype)
        return loaded[source]

    return {source: get(source) for source in map(str, sources)}


def load_config(source: epath.PathLike) -> models.ModelConfig:
    """The configuration of the model at `source`, as in `load`, without its weights."""
    name, adapter = split_adapter(source)
    return peft.read_config(load_config(name), adapter) if adapter else _read_config(resolve(name, weights=False))


def save(directory: epath.PathLike, model: models.Model) -> None:
    """Writes a model in Orbax's format (params/ and model.json), readable on any mesh. Every process calls it.

    Raises:
      UserError: it cannot be written, or the directory holds something else. Nothing half-written is left.
    """
    with storage.atomic_directory(directory, FILE_NAMES) as work:
        write_orbax(work, model)


def save_hf(directory: epath.PathLike, model: models.Model, tokenizer: Any = None, dtype: str | None = None) -> None:
    """Writes a model in Hugging Face's format: `AutoModelForCausalLM.from_pretrained(directory)` loads it.

    Args:
      tokenizer: a transformers tokenizer to write as well.
      dtype: of the weights, as in `load`; None: as the parameters are.

    Raises:
      UserError: it cannot be written, or the directory holds something else. Nothing half-written is left.
    """
    dtype = dtype and hf.parse_dtype(dtype)
    with storage.atomic_directory(directory, FILE_NAMES) as work:
        if tokenizer is not None and jax.process_index() == 0:
            with storage.staged_locally(work) as local:
                tokenizer.save_pretrained(local)
        hf.write(work, model, dtype)


def _read_config(source: Source) -> models.ModelConfig:
    """A checkpoint's configuration, with its generation_config.json."""
    directory = source.directory
    cfg = models.config_from_hf(directory) if source.kind == "hf" else _read_orbax_config(directory / MODEL)
    path = directory / GENERATION
    return dataclasses.replace(cfg, generation_config=_generation_config(path)) if path.exists() else cfg


def _generation_config(path: epath.Path) -> str:
    """The file's text. Raises UserError if its end tokens cannot be read."""
    try:
        text = path.read_bytes().decode()
        eos = json.loads(text).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON object ({error})") from None
    if not all(type(token) is int for token in models.as_ids(eos)):
        raise UserError(f"{path}: eos_token_id is {eos!r}, expected a token id or a list of them")
    return text


def _read_orbax_config(path: epath.Path) -> models.ModelConfig:
    try:
        config = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    return models.config_from_hf(config, where=str(path))


def write_orbax(directory: epath.Path, model: models.Model) -> None:
    """Writes params/, then model.json, which marks the checkpoint as complete in an object store. Merges an adapter."""
    model = models.lora.merge(model)
    orbax_io.save_tree(directory / PARAMS, model.params)
    if jax.process_index() == 0:
        hf.write_generation_config(directory, model.cfg)
        record = {"format": "unidetox_jax 1", "config": models.config_to_hf(model.cfg)}
        storage.write_json(directory / MODEL, record)


def _read_orbax(directory: epath.Path, cfg: models.ModelConfig, mesh: Mesh, param_dtype: str | None) -> dict[str, Any]:
    stored = {} if param_dtype else orbax_io.saved_dtypes(directory)
    abstract = models.abstract_params(cfg, param_dtype or "float32")

    def target(path, leaf, leaf_sharding):
        dtype = stored.get(sharding.path_string(path), leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf_sharding)

    shardings = sharding.param_shardings(abstract, mesh)
    return orbax_io.restore_tree(directory, jax.tree_util.tree_map_with_path(target, abstract, shardings))
