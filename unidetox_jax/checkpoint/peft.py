"""Reads and writes low-rank adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

The names and shapes of an adapter's tensors decide which model it fits; `base_model_name_or_path` is only a hint. PEFT
options that compute anything other than W + scale · B A are refused by name.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from unidetox_jax import sharding, storage
from unidetox_jax.checkpoint import streaming
from unidetox_jax.checkpoint.safetensors_file import SafetensorsFile, Spec, write_file
from unidetox_jax.checkpoint.source import ADAPTER, ADAPTER_TORCH, ADAPTER_WEIGHTS, read_object, resolve_adapter
from unidetox_jax.checkpoint.weights import TorchFile
from unidetox_jax.errors import UserError
from unidetox_jax.models import Model, ModelConfig, lora, stored_in_out
from unidetox_jax.models.lora import WEIGHT
from unidetox_jax.recipe import Lora

FILE_NAMES = re.compile(r"adapter_config\.json|adapter_model\.safetensors|README\.md")
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# PEFT options under which an adapter computes something else or changes the model's weights
UNSUPPORTED = (
    "use_dora modules_to_save layers_to_transform layer_replication rank_pattern alpha_pattern lora_bias use_qalora "
    "target_parameters trainable_token_indices alora_invocation_tokens megatron_config arrow_config use_bdlora "
    "kasa_config velora_config monteclora_config"
).split()
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights that change the model


def attach(model: Model, source: epath.PathLike) -> Model:
    """The model with the adapter at `source`; it shares the weights of `model`.

    Args:
      model: if it already has an adapter, that one is first merged into a copy of the weights.
      source: a PEFT directory or hub id, or a finished stage's directory.

    Raises:
      UserError: no adapter there, an unsupported kind, or one for another model; names the file.
    """
    directory = resolve_adapter(source)
    params, cfg = lora.merge(model)
    cfg, file = _with_adapter(cfg, directory)
    arrays = {name: {letter: _read_matrix(file, name, letter, cfg) for letter in "AB"} for name in lora.modules(cfg)}
    mesh = sharding.mesh_of(params) or sharding.single_device_mesh()
    shardings = sharding.param_shardings(arrays, mesh)
    return Model(lora.attach(params, jax.tree.map(sharding.put, arrays, shardings), cfg), cfg)


def read_config(cfg: ModelConfig, source: epath.PathLike) -> ModelConfig:
    """The configuration of `attach(model, source)`, without the weights."""
    directory = resolve_adapter(source)
    return _with_adapter(dataclasses.replace(cfg, lora=Lora()), directory)[0]


def save_adapter(directory: epath.PathLike, model: Model, base: str = "") -> None:
    """Writes the model's adapter for `PeftModel.from_pretrained`. Every process calls it.

    Args:
      model: a model with an adapter; its other weights are not written.
      base: where the model without the adapter is, recorded for PEFT.

    Raises:
      UserError: the model has no adapter, it cannot be written, or the directory holds something else.
    """
    if not model.cfg.lora.rank:
        raise UserError(f"{directory}: not written: the model has no adapter")
    with storage.atomic_directory(directory, FILE_NAMES) as work:
        write(work, model, base)


def write(directory: epath.Path, model: Model, base: str = "") -> None:
    """As `save_adapter`, into an existing directory."""
    params, cfg = model
    adapter = lora.detach(params, cfg, lambda leaf: streaming.read_rows(leaf, 0, len(leaf)))
    if jax.process_index() == 0:
        tensors = {}
        for name, pair in adapter.items():
            for layer in _layers(name, cfg):
                for letter, matrix in pair.items():
                    tensors[_tensor_name(name, letter, layer)] = matrix if layer is None else matrix[layer]
        specs = {name: Spec(matrix.dtype, matrix.shape) for name, matrix in tensors.items()}
        write_file(directory / ADAPTER_WEIGHTS, specs, tensors.values())
        storage.write_json(directory / ADAPTER, _config(cfg, base))


def _config(cfg: ModelConfig, base: str) -> dict[str, Any]:
    """The content of adapter_config.json; options left out have PEFT's defaults."""
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
    """(the model's configuration with the adapter's settings, the file of weights); its modules are the targets."""
    settings, hint = _settings(directory / ADAPTER)
    file = _open(directory)
    mismatch = f"the adapter is for another model than this {cfg.family}{hint}"
    expected = {
        _tensor_name(name, letter, layer): name
        for name in lora.linear_layers(cfg)
        for layer in _layers(name, cfg)
        for letter in "AB"
    }
    for name in file.specs:
        if name not in expected:
            reason = mismatch if TENSOR.fullmatch(name) else "expected only …lora_A.weight and …lora_B.weight"
            raise UserError(f"{file.path}: key {name!r}: {reason}")
    if not file.specs:
        raise UserError(f"{file.path}: holds no adapter tensors")
    targets = dict.fromkeys(expected[name] for name in file.specs)
    for name, module in expected.items():
        if module in targets and name not in file.specs:
            raise UserError(f"{file.path}: key {name!r} is missing; adapters of only some layers are not implemented")
    cfg = dataclasses.replace(cfg, lora=dataclasses.replace(settings, targets=tuple(targets)))
    try:
        shapes = lora.abstract(cfg)
    except UserError as error:  # a rank that this model's matrices cannot have
        raise UserError(f"{directory / ADAPTER}: {error}: {mismatch}") from None
    for name, spec in file.specs.items():
        letter = name.removesuffix(WEIGHT)[-1]
        shape = shapes[expected[name]][letter].shape[lora.is_per_layer(expected[name]) :]
        if tuple(spec.shape) != shape:
            raise UserError(
                f"{file.path}: key {name!r} has shape {spec.shape}, expected {shape} (r is {settings.rank}), "
                f"or {mismatch}"
            )
    return cfg, file


def _settings(path: epath.Path) -> tuple[Lora, str]:
    """(settings in adapter_config.json, hint at the base model it names). Raises UserError unless it is plain LoRA."""
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {config.get('peft_type')!r} is not implemented (known: LORA)")
    for name in UNSUPPORTED:
        if config.get(name):
            raise UserError(f"{path}: {name} = {config[name]!r} is not implemented")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias = {config['bias']!r} is not implemented (known: 'none')")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise UserError(f"{path}: init_lora_weights = {init!r} changes the model's own weights; not implemented")
    numbers = {name: config.get(name, default) for name, default in (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0))}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int if name == "r" else int | float):
            raise UserError(f"{path}: {name} = {value!r}, expected a number")
    rank, alpha, dropout = numbers.values()
    base = config.get("base_model_name_or_path")
    return (
        Lora(rank=rank, alpha=float(alpha), dropout=float(dropout), rslora=bool(config.get("use_rslora"))),
        f" ({base!r}, says {path.name})" if base else "",
    )


def _layers(name: str, cfg: ModelConfig) -> Iterable[int | None]:
    """A module's layers; None alone for a module outside the blocks."""
    return range(cfg.num_layers) if lora.is_per_layer(name) else (None,)


def _tensor_name(name: str, letter: str, layer: int | None) -> str:
    name = name if layer is None else name.replace("{layer}", str(layer))
    return f"base_model.model.{name}.lora_{letter}.weight"


def _read_matrix(file: SafetensorsFile | TorchFile, name: str, letter: str, cfg: ModelConfig) -> np.ndarray:
    """A or B of a module, stacked over layers [L, …] if it has them, in the file's dtype."""
    matrices = [file.open(_tensor_name(name, letter, layer)).array for layer in _layers(name, cfg)]
    return np.stack(matrices) if lora.is_per_layer(name) else np.array(matrices[0])
