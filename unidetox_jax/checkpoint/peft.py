"""Low-rank adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

Which model an adapter is for is decided by the names and shapes of its tensors; `base_model_name_or_path` is a hint to
people. Whatever of PEFT's kinds of adapter would be another function than W + scale · B A is refused by name.
"""

import dataclasses
import json
import re
from typing import Any

import jax
import numpy as np
from etils import epath

from unidetox_jax import sharding, storage
from unidetox_jax.checkpoint import leaves
from unidetox_jax.checkpoint.safetensors_file import SafetensorsFile, Spec, write_file
from unidetox_jax.checkpoint.source import ADAPTER, ADAPTER_TORCH, ADAPTER_WEIGHTS, find_adapter
from unidetox_jax.checkpoint.weights import TorchFile
from unidetox_jax.errors import UserError
from unidetox_jax.models import Model, ModelConfig, lora, stored_in_out
from unidetox_jax.models.lora import WEIGHT
from unidetox_jax.recipe import Lora

NAMES = re.compile(r"adapter_config\.json|adapter_model\.safetensors|README\.md")
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# PEFT's options that make an adapter another function, or other weights of the model's own
OFF = (
    "use_dora modules_to_save layers_to_transform layer_replication rank_pattern alpha_pattern lora_bias use_qalora "
    "target_parameters trainable_token_indices alora_invocation_tokens megatron_config arrow_config use_bdlora "
    "kasa_config velora_config monteclora_config"
).split()
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of init_lora_weights: they change the model as well


def attach(model: Model, source: epath.PathLike) -> Model:
    """The model with the adapter at `source` beside its weights, which both then share.

    Args:
      model: an adapter that it has is merged first, into weights of its own.
      source: PEFT's directory or hub id, or a finished stage's.

    Raises:
      UserError: no adapter there, one of another kind or for another model: one line that names the file.
    """
    directory = find_adapter(source)
    params, cfg = lora.merge(model)
    cfg, file = _with_adapter(cfg, directory)
    arrays = {name: {letter: _stacked(file, name, letter, cfg) for letter in "AB"} for name in lora.modules(cfg)}
    mesh = sharding.mesh_of(params) or sharding.single_device_mesh()
    shardings = sharding.param_shardings(arrays, mesh)
    return Model(lora.attach(params, jax.tree.map(sharding.put, arrays, shardings), cfg), cfg)


def read_config(cfg: ModelConfig, source: epath.PathLike) -> ModelConfig:
    """The configuration of the model with the adapter at `source`. Raises UserError as `attach` does."""
    directory = find_adapter(source)
    return _with_adapter(dataclasses.replace(cfg, lora=Lora()), directory)[0]


def save_adapter(directory: epath.PathLike, model: Model, base: str = "") -> None:
    """Writes the model's adapter as `PeftModel.from_pretrained` reads it. Every process calls it.

    Args:
      model: with an adapter; of its weights nothing is written.
      base: where the model without the adapter lies, for people and for PEFT.

    Raises:
      UserError: the model has no adapter, it cannot be written, or something else is there.
    """
    if not model.cfg.lora.rank:
        raise UserError(f"{directory}: not written: the model has no adapter")
    with storage.whole_directory(directory, NAMES) as work:
        write(work, model, base)


def write(directory: epath.Path, model: Model, base: str = "") -> None:
    """As `save_adapter`, into a directory that exists."""
    params, cfg = model
    adapter = lora.detach(params, cfg, lambda leaf: leaves.fetch(leaf, 0, len(leaf)))
    if jax.process_index() == 0:
        tensors = {}
        for name, pair in adapter.items():
            for layer in range(cfg.num_layers) if lora.is_per_layer(name) else (None,):
                for letter, matrix in pair.items():
                    tensors[_tensor(name, letter, layer)] = matrix if layer is None else matrix[layer]
        specs = {name: Spec(matrix.dtype, matrix.shape) for name, matrix in tensors.items()}
        write_file(directory / ADAPTER_WEIGHTS, specs, tensors.values())
        storage.write_json(directory / ADAPTER, _config(cfg, base))


def _config(cfg: ModelConfig, base: str) -> dict[str, Any]:
    """PEFT's adapter_config.json; its other options are PEFT's defaults."""
    settings = cfg.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "use_rslora": settings.rslora,
        "lora_dropout": settings.dropout,
        "target_modules": [lora.short_name(name) for name in lora.modules(cfg)],
        "fan_in_fan_out": stored_in_out(cfg),
        "bias": "none",
        "inference_mode": True,
    }


def _open(directory: epath.Path) -> SafetensorsFile | TorchFile:
    if (directory / ADAPTER_WEIGHTS).exists() or not (directory / ADAPTER_TORCH).exists():
        return SafetensorsFile(directory / ADAPTER_WEIGHTS)
    return TorchFile(directory / ADAPTER_TORCH)


def _with_adapter(cfg: ModelConfig, directory: epath.Path) -> tuple[ModelConfig, SafetensorsFile | TorchFile]:
    """The model's configuration with the adapter's settings, and its file, whose modules are the targets."""
    settings, hint = _settings(directory / ADAPTER)
    file = _open(directory)
    another = f"the adapter is for another model than this {cfg.family}{hint}"
    every = lora.linear_layers(cfg)
    expected = {
        _tensor(name, letter, layer): name
        for name in every
        for layer in (range(cfg.num_layers) if lora.is_per_layer(name) else (None,))
        for letter in "AB"
    }
    for name in file.specs:
        if name not in expected:
            reason = another if TENSOR.fullmatch(name) else "expected …lora_A.weight and …lora_B.weight alone"
            raise UserError(f"{file.path}: key {name!r}: {reason}")
    if not file.specs:
        raise UserError(f"{file.path}: holds no tensor of an adapter")
    targets = dict.fromkeys(expected[name] for name in file.specs)
    for name, module in expected.items():
        if module in targets and name not in file.specs:
            raise UserError(f"{file.path}: key {name!r} is missing; an adapter of some layers only is not implemented")
    cfg = dataclasses.replace(cfg, lora=dataclasses.replace(settings, targets=tuple(targets)))
    try:
        shapes = lora.abstract(cfg)
    except UserError as error:  # a rank that this model's matrices cannot have
        raise UserError(f"{directory / ADAPTER}: {error}: {another}") from None
    for name, found in file.specs.items():
        letter = name.removesuffix(WEIGHT)[-1]
        wanted = shapes[expected[name]][letter].shape[lora.is_per_layer(expected[name]) :]
        if tuple(found.shape) != wanted:
            sizes = f"shape {found.shape}, expected {wanted} (r is {settings.rank})"
            raise UserError(f"{file.path}: key {name!r} has {sizes}, or {another}")
    return cfg, file


def _settings(path: epath.Path) -> tuple[Lora, str]:
    """(what an adapter_config.json says, in words what model it names). Raises UserError for what is not plain LoRA."""
    try:
        found = json.loads(path.read_text())
        kind = found.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: no dictionary in JSON ({error})") from None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type {kind!r} is not implemented (known: LORA)")
    for name in OFF:
        if found.get(name):
            raise UserError(f"{path}: {name} = {found[name]!r} is not implemented")
    if found.get("bias", "none") != "none":
        raise UserError(f"{path}: bias = {found['bias']!r} is not implemented (known: 'none')")
    start = found.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UserError(f"{path}: init_lora_weights = {start!r} changes the model's own weights; not implemented")
    numbers = {name: found.get(name, default) for name, default in (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0))}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int if name == "r" else int | float):
            raise UserError(f"{path}: {name} = {value!r}, expected a number")
    rank, alpha, dropout = numbers.values()
    base = found.get("base_model_name_or_path")
    return (
        Lora(rank=rank, alpha=float(alpha), dropout=float(dropout), rslora=bool(found.get("use_rslora"))),
        f" ({base!r}, says {path.name})" if base else "",
    )


def _tensor(name: str, letter: str, layer: int | None) -> str:
    name = name if layer is None else name.replace("{layer}", str(layer))
    return f"base_model.model.{name}.lora_{letter}.weight"


def _stacked(file: SafetensorsFile | TorchFile, name: str, letter: str, cfg: ModelConfig) -> np.ndarray:
    """A matrix of all layers, [L, …], in the file's dtype."""
    if not lora.is_per_layer(name):
        return np.array(file.open(_tensor(name, letter, None)).array)
    return np.stack([file.open(_tensor(name, letter, layer)).array for layer in range(cfg.num_layers)])
