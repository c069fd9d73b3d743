"""Reads and writes weights in Hugging Face's layout, tensor by tensor, by the family's key table.

Host memory holds about one tensor at a time: when reading, a memory-mapped tensor is copied to the devices piece by
piece; when writing, a tensor is fetched, written and freed.
"""

import collections
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from unidetox_jax import models, sharding, storage
from unidetox_jax.checkpoint import streaming
from unidetox_jax.checkpoint.safetensors_file import Spec, write_file
from unidetox_jax.checkpoint.source import GENERATION
from unidetox_jax.checkpoint.weights import Weights
from unidetox_jax.errors import UserError
from unidetox_jax.progress import Progress

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "embed/tokens/embedding"
QUIET_BYTES = 1 << 28  # no progress bar below this size: done before it could be read
FLOATS = ("float32", "bfloat16", "float16")
TF_NORM_NAMES = {"gamma": "weight", "beta": "bias"}  # layer norms in checkpoints converted from TensorFlow


class Tensor(NamedTuple):
    """One tensor of a checkpoint to write; layer is None outside the blocks."""

    name: str
    key: models.Key
    layer: int | None
    spec: Spec


def read_params(weights: Weights, cfg: models.ModelConfig, mesh: Mesh, param_dtype: str | None) -> dict[str, Any]:
    """The parameters of a Hugging Face directory, on the mesh.

    Args:
      weights: the directory's tensors; each must belong to the model or be on the family's ignore list.
      param_dtype: dtype of all leaves; None: as stored (the wider one if the layers of a leaf differ).

    Raises:
      UserError: a missing or unexpected key, a wrong shape or dtype; names the file and the key.
    """
    names = _names_in_file(weights, cfg)
    abstract = models.abstract_params(cfg)
    targets = _targets(weights, names, cfg, abstract, mesh, param_dtype)
    filled: dict[str, jax.Array] = {}
    with _progress("reading weights", len(names), sum(weights.specs[name].nbytes for name in names.values())) as bar:
        for key in models.key_table(cfg):
            for path in key.ours:
                target = targets[path]
                filled[path] = streaming.allocate(target.shape, target.dtype, target.sharding)
            for layer, name in _tensors_of(key, cfg):
                tensor = weights.open(names[name])
                for path, part in zip(key.ours, key.split(tensor.array), strict=True):
                    rows = part if layer is None else part[None]
                    filled[path] = streaming.write_rows(filled[path], layer or 0, rows, tensor.release)
                bar.update(1)
    return jax.tree_util.tree_map_with_path(lambda path, _: filled[sharding.path_string(path)], abstract)


def write(directory: epath.Path, model: models.Model, dtype: str | None = None) -> None:
    """Writes safetensors files of at most 5 GB, config.json and the model's generation_config.json.

    Args:
      directory: must exist; process 0 writes to it, every process must call.
      model: an adapter is merged into the weights.
      dtype: of all tensors; None: as the parameters are.

    Raises:
      UserError: a file cannot be written.
    """
    params, cfg = models.lora.merge(model)
    by_path = _by_path(params)
    tensors = _plan(by_path, cfg, dtype)
    shards = _shards(tensors)
    first = jax.process_index() == 0
    with _progress("writing weights", len(tensors), sum(tensor.spec.nbytes for tensor in tensors)) as bar:
        for name, shard in shards.items():
            arrays = _fetch(shard, by_path, bar)
            if first:
                write_file(directory / name, {tensor.name: tensor.spec for tensor in shard}, arrays)
            else:
                collections.deque(arrays, maxlen=0)  # fetching is collective
    if not first:
        return
    if len(shards) > 1:
        storage.write_json(directory / INDEX, _index(shards))
    write_generation_config(directory, cfg)
    stored: collections.Counter[str] = collections.Counter()
    for tensor in tensors:
        stored[tensor.spec.dtype.name] += tensor.spec.nbytes
    name = stored.most_common(1)[0][0]  # transformers 5 reads the first, 4 the second
    storage.write_json(directory / "config.json", {**models.config_to_hf(cfg), "dtype": name, "torch_dtype": name})


def write_generation_config(directory: epath.Path, cfg: models.ModelConfig) -> None:
    """Writes the generation_config.json that the checkpoint came with, unchanged; nothing if it had none."""
    if cfg.generation_config:
        storage.write_text(directory / GENERATION, cfg.generation_config)


def parse_dtype(name: Any) -> str:
    """The name of a parameter dtype. Raises UserError for anything else."""
    text = name if isinstance(name, str) else np.dtype(name).name
    if text not in FLOATS:
        raise UserError(f"dtype {text!r}: expected {', '.join(FLOATS)}")
    return text


def _names_in_file(weights: Weights, cfg: models.ModelConfig) -> dict[str, str]:
    """Canonical name → name in the file, for every tensor; checkpoints of the bare model lack a prefix."""
    table = models.key_table(cfg)
    expected = [name for key in table for _, name in _tensors_of(key, cfg)]
    ignored = [re.compile(pattern) for pattern in models.ignored_keys(cfg)]
    unassigned = set(expected)
    names: dict[str, str] = {}
    unexpected = []
    for name in weights.specs:
        current = re.sub(r"\bLayerNorm\.(gamma|beta)$", lambda match: f"LayerNorm.{TF_NORM_NAMES[match[1]]}", name)
        candidates = (current, models.hf_prefix(cfg) + current)
        canonical = next((text for text in candidates if text in unassigned), None)
        if canonical is not None:
            unassigned.remove(canonical)
            names[canonical] = name
        elif not any(pattern.fullmatch(text) for pattern in ignored for text in candidates):
            unexpected.append(name)
    if cfg.tie_word_embeddings and HEAD in weights.specs:
        embedding = next(key.hf for key in table if key.ours == (EMBEDDING,))
        if names.setdefault(embedding, HEAD) != HEAD:  # some writers store a tied pair under the head's name
            _check_tied(weights, names[embedding])
    missing = [name for name in expected if name not in names]
    if unexpected:
        others = f", and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        lacking = f"; {missing[0]!r} is missing" if missing else ""
        raise UserError(
            f"{weights.path(unexpected[0])}: unexpected key {unexpected[0]!r} for a {cfg.family} model{others}{lacking}"
        )
    if missing:
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{weights.listing}: key {missing[0]!r} is missing{others}")
    return names


def _check_tied(weights: Weights, embedding: str) -> None:
    """A tied checkpoint may also store the head if it equals the embedding."""
    left, right = weights.open(embedding), weights.open(HEAD)
    same = left.array.shape == right.array.shape and left.array.dtype == right.array.dtype
    step = max(1, streaming.PIECE_BYTES // max(1, left.array[:1].nbytes))
    for start in range(0, len(left.array) if same else 0, step):
        rows = slice(start, start + step)
        same = same and np.array_equal(left.array[rows], right.array[rows], equal_nan=True)
        left.release()
        right.release()
    if not same:
        raise UserError(
            f"{weights.path(HEAD)}: key {HEAD!r} differs from {embedding!r}, but config.json has "
            "tie_word_embeddings true; set it to false to keep both"
        )


def _targets(weights, names, cfg, abstract, mesh: Mesh, param_dtype: str | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Path → shape, dtype and sharding of every leaf. Raises UserError for a tensor of another shape or dtype."""
    shardings = _by_path(sharding.param_shardings(abstract, mesh))
    shapes = _by_path(abstract)
    targets: dict[str, jax.ShapeDtypeStruct] = {}
    for key in models.key_table(cfg):
        specs = {names[name]: weights.specs[names[name]] for _, name in _tensors_of(key, cfg)}
        shape = _hf_shape(key, shapes)
        for name, spec in specs.items():
            where = f"{weights.path(name)}: key {name!r}"
            if spec.shape != shape:
                raise UserError(f"{where} has shape {spec.shape}, expected {shape}")
            if spec.dtype.name not in FLOATS and not (spec.dtype == np.float64 and param_dtype):
                raise UserError(f"{where} has dtype {spec.dtype}, expected {', '.join(FLOATS)}")
        dtype = np.dtype(param_dtype or jnp.result_type(*(spec.dtype for spec in specs.values())))
        for path in key.ours:
            targets[path] = jax.ShapeDtypeStruct(shapes[path].shape, dtype, sharding=shardings[path])
    if targets.keys() != shapes.keys():
        raise ValueError(f"{cfg.family}: no key fills {sorted(shapes.keys() - targets.keys())}")
    return targets


def _plan(by_path: dict[str, jax.Array], cfg: models.ModelConfig, dtype: str | None) -> list[Tensor]:
    """Every tensor to write, in model order: embeddings, layer by layer, final norm and head."""
    tensors = []
    for key in models.key_table(cfg):
        stored = np.dtype(dtype or jnp.result_type(*(by_path[path].dtype for path in key.ours)))
        spec = Spec(stored, _hf_shape(key, by_path))
        tensors += [Tensor(name, key, layer, spec) for layer, name in _tensors_of(key, cfg)]

    def position(tensor: Tensor) -> tuple[int, int]:
        section = ("embed", "blocks", "final").index(tensor.key.ours[0].split("/")[0])
        return section, tensor.layer or 0

    return sorted(tensors, key=position)


def _shards(tensors: list[Tensor]) -> dict[str, list[Tensor]]:
    """File name → tensors, in order, at most SHARD_BYTES in a file (unless one tensor is larger)."""
    groups = streaming.group_by_bytes(tensors, [tensor.spec.nbytes for tensor in tensors], SHARD_BYTES)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _fetch(tensors: list[Tensor], by_path: dict[str, jax.Array], bar: Progress) -> Iterator[np.ndarray]:
    for tensor in tensors:
        leaves = [by_path[path] for path in tensor.key.ours]
        if tensor.layer is None:
            arrays = [streaming.read_rows(leaf, 0, len(leaf)) for leaf in leaves]
        else:
            arrays = [streaming.read_rows(leaf, tensor.layer, 1)[0] for leaf in leaves]
        array = tensor.key.join(*arrays)
        ready = array.flags.c_contiguous and array.dtype == tensor.spec.dtype
        yield array if ready else streaming.cast_copy(array, tensor.spec.dtype)
        bar.update(1)


def _index(shards: dict[str, list[Tensor]]) -> dict[str, Any]:
    specs = [tensor.spec for shard in shards.values() for tensor in shard]
    return {
        "metadata": {
            "total_parameters": sum(int(np.prod(spec.shape)) for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        },
        "weight_map": {tensor.name: name for name, shard in shards.items() for tensor in shard},
    }


def _tensors_of(key: models.Key, cfg: models.ModelConfig) -> list[tuple[int | None, str]]:
    """(layer, name) of each tensor of a key."""
    if "{layer}" not in key.hf:
        return [(None, key.hf)]
    return [(layer, key.hf.format(layer=layer)) for layer in range(cfg.num_layers)]


def _hf_shape(key: models.Key, by_path: dict[str, Any]) -> tuple[int, ...]:
    """The shape of Hugging Face's tensor, by joining dummy leaves that take no memory."""
    stacked = "{layer}" in key.hf
    dummies = [np.broadcast_to(np.int8(0), by_path[path].shape[stacked:]) for path in key.ours]
    return tuple(key.join(*dummies).shape)


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, NamedSharding))
    return {sharding.path_string(path): leaf for path, leaf in leaves}


def _progress(label: str, tensors: int, nbytes: int) -> Progress:
    return Progress(tensors, "tensors", label, disable=nbytes < QUIET_BYTES or jax.process_index() != 0)
