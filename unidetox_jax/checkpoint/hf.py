"""Weights from and to Hugging Face's layout, tensor by tensor, by the family's key table.

Neither way holds more of the model in host memory than about one tensor: on the way in a tensor's map is copied
piece by piece to the devices, on the way out a tensor is fetched, written and dropped.
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
from unidetox_jax.checkpoint import leaves
from unidetox_jax.checkpoint.safetensors_file import Spec, write_file
from unidetox_jax.checkpoint.source import GENERATION
from unidetox_jax.checkpoint.weights import Weights
from unidetox_jax.errors import UserError
from unidetox_jax.progress import Progress

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "embed/tokens/embedding"
QUIET_BYTES = 1 << 28  # smaller models are done before a bar could be read
FLOATS = ("float32", "bfloat16", "float16")
OLDER_NAMES = {"gamma": "weight", "beta": "bias"}  # of a layer norm's parameters, in checkpoints that TensorFlow made


class Target(NamedTuple):
    """A leaf to be."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding


class Tensor(NamedTuple):
    """One tensor of a checkpoint: layer is None outside the blocks."""

    name: str
    key: models.Key
    layer: int | None
    spec: Spec


def read_params(weights: Weights, cfg: models.ModelConfig, mesh: Mesh, param_dtype: str | None) -> dict[str, Any]:
    """The parameters of a Hugging Face directory, on the mesh.

    Args:
      weights: the directory's tensors; every one must be the model's, or on the family's ignore list.
      param_dtype: dtype of all leaves; None: as stored (of a leaf whose layers differ, the wider).

    Raises:
      UserError: a missing or surplus key, a wrong shape or dtype; the line names file and key.
    """
    names = _names_in_file(weights, cfg)
    abstract = models.abstract_params(cfg)
    _check_shapes(weights, names, cfg, abstract)
    targets = _targets(weights, names, cfg, abstract, mesh, param_dtype)
    filled: dict[str, jax.Array] = {}
    with _progress("reading weights", len(names), sum(weights.specs[name].nbytes for name in names.values())) as bar:
        for key in models.key_table(cfg):
            filled |= {path: leaves.allocate(*targets[path]) for path in key.ours}
            for layer, name in _tensors_of(key, cfg):
                stored = weights.open(names[name])
                for path, part in zip(key.ours, key.split(stored.array), strict=True):
                    rows = part if layer is None else part[None]
                    filled[path] = leaves.fill(filled[path], layer or 0, rows, stored.forget)
                bar.update(1)
    return jax.tree_util.tree_map_with_path(lambda path, _: filled[sharding.path_string(path)], abstract)


def write(directory: epath.Path, model: models.Model, dtype: str | None = None) -> None:
    """Writes safetensors files of at most 5 GB, config.json and the model's generation_config.json into a directory.

    Args:
      directory: exists; process 0 writes to it, every process must call.
      model: an adapter that it has is merged into its weights.
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
        for name, part in shards.items():
            arrays = _fetched(part, by_path, bar)
            if first:
                write_file(directory / name, {tensor.name: tensor.spec for tensor in part}, arrays)
            else:
                collections.deque(arrays, maxlen=0)  # takes part in the fetching
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
    """Writes the generation_config.json that the checkpoint came with, as it was; nothing where it had none."""
    if cfg.generation_config:
        storage.write_text(directory / GENERATION, cfg.generation_config)


def parse_dtype(name: Any) -> str:
    """The name of a parameter dtype. Raises UserError where it is none."""
    text = name if isinstance(name, str) else np.dtype(name).name
    if text not in FLOATS:
        raise UserError(f"dtype {text!r}: expected {', '.join(FLOATS)}")
    return text


def _names_in_file(weights: Weights, cfg: models.ModelConfig) -> dict[str, str]:
    """Canonical name → name in the file, complete; checkpoints of the bare model lack a prefix."""
    table = models.key_table(cfg)
    wanted = [name for key in table for _, name in _tensors_of(key, cfg)]
    ignored = [re.compile(pattern) for pattern in models.ignored_keys(cfg)]
    open_names = set(wanted)
    found: dict[str, str] = {}
    surplus = []
    for name in weights.specs:
        current = re.sub(r"\bLayerNorm\.(gamma|beta)$", lambda found: f"LayerNorm.{OLDER_NAMES[found[1]]}", name)
        candidates = (current, models.hf_prefix(cfg) + current)
        canonical = next((text for text in candidates if text in open_names), None)
        if canonical is not None:
            open_names.remove(canonical)
            found[canonical] = name
        elif not any(pattern.fullmatch(text) for pattern in ignored for text in candidates):
            surplus.append(name)
    if cfg.tie_word_embeddings and HEAD in weights.specs:
        embedding = next(key.hf for key in table if key.ours == (EMBEDDING,))
        if found.setdefault(embedding, HEAD) != HEAD:  # some writers keep the head of a tied pair
            _check_tied(weights, found[embedding])
    missing = [name for name in wanted if name not in found]
    if surplus:
        others = f", and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        lacking = f"; {missing[0]!r} is missing" if missing else ""
        raise UserError(
            f"{weights.path(surplus[0])}: key {surplus[0]!r} is none of this {cfg.family} model's{others}{lacking}"
        )
    if missing:
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{weights.listing}: key {missing[0]!r} is missing{others}")
    return found


def _check_tied(weights: Weights, embedding: str) -> None:
    """A tied checkpoint may hold the head as well, if it is the same."""
    left, right = weights.open(embedding), weights.open(HEAD)
    same = left.array.shape == right.array.shape and left.array.dtype == right.array.dtype
    step = max(1, leaves.PIECE_BYTES // max(1, left.array[:1].nbytes))
    for start in range(0, len(left.array) if same else 0, step):
        rows = slice(start, start + step)
        same = same and np.array_equal(left.array[rows], right.array[rows], equal_nan=True)
        left.forget()
        right.forget()
    if not same:
        raise UserError(
            f"{weights.path(HEAD)}: key {HEAD!r} differs from {embedding!r}, but config.json has "
            "tie_word_embeddings true; set it to false to keep both"
        )


def _check_shapes(weights: Weights, names: dict[str, str], cfg: models.ModelConfig, abstract: Any) -> None:
    by_path = _by_path(abstract)
    for key in models.key_table(cfg):
        expected = _hf_shape(key, by_path)
        for _, name in _tensors_of(key, cfg):
            found = weights.specs[names[name]].shape
            if found != expected:
                raise UserError(
                    f"{weights.path(names[name])}: key {names[name]!r} has shape {found}, expected {expected}"
                )


def _targets(weights, names, cfg, abstract, mesh: Mesh, param_dtype: str | None) -> dict[str, Target]:
    """Path → shape, dtype and sharding of every leaf."""
    shardings = _by_path(sharding.param_shardings(abstract, mesh))
    shapes = _by_path(abstract)
    targets: dict[str, Any] = {}
    for key in models.key_table(cfg):
        stored = {weights.specs[names[name]].dtype: names[name] for _, name in _tensors_of(key, cfg)}
        for dtype, name in stored.items():
            if dtype.name not in FLOATS and not (dtype == np.float64 and param_dtype):
                raise UserError(f"{weights.path(name)}: key {name!r} has dtype {dtype}, expected {', '.join(FLOATS)}")
        dtype = np.dtype(param_dtype or jnp.result_type(*stored))
        targets |= {path: Target(shapes[path].shape, dtype, shardings[path]) for path in key.ours}
    if targets.keys() != shapes.keys():
        raise ValueError(f"{cfg.family}: no key fills {sorted(shapes.keys() - targets.keys())}")
    return targets


def _plan(by_path: dict[str, jax.Array], cfg: models.ModelConfig, dtype: str | None) -> list[Tensor]:
    """Every tensor to write, in the order of the model: embeddings, the layers one by one, the end."""
    tensors = []
    for key in models.key_table(cfg):
        stored = np.dtype(dtype or jnp.result_type(*(by_path[path].dtype for path in key.ours)))
        spec = Spec(stored, _hf_shape(key, by_path))
        tensors += [Tensor(name, key, layer, spec) for layer, name in _tensors_of(key, cfg)]

    def position(tensor: Tensor) -> tuple[int, int]:
        part = ("embed", "blocks", "final").index(tensor.key.ours[0].split("/")[0])
        return part, tensor.layer or 0

    return sorted(tensors, key=position)


def _shards(tensors: list[Tensor]) -> dict[str, list[Tensor]]:
    """File name → tensors, in order; a file is closed before it would exceed SHARD_BYTES."""
    groups: list[list[Tensor]] = [[]]
    room = SHARD_BYTES
    for tensor in tensors:
        if groups[-1] and tensor.spec.nbytes > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(tensor)
        room -= tensor.spec.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _fetched(tensors: list[Tensor], by_path: dict[str, jax.Array], bar: Progress) -> Iterator[np.ndarray]:
    for tensor in tensors:
        parts = [by_path[path] for path in tensor.key.ours]
        if tensor.layer is None:
            arrays = [leaves.fetch(leaf, 0, len(leaf)) for leaf in parts]
        else:
            arrays = [leaves.fetch(leaf, tensor.layer, 1)[0] for leaf in parts]
        array = tensor.key.join(*arrays)
        ready = array.flags.c_contiguous and array.dtype == tensor.spec.dtype
        yield array if ready else leaves.copied(array, tensor.spec.dtype)
        bar.update(1)


def _index(shards: dict[str, list[Tensor]]) -> dict[str, Any]:
    every = [tensor for part in shards.values() for tensor in part]
    return {
        "metadata": {
            "total_parameters": sum(int(np.prod(tensor.spec.shape)) for tensor in every),
            "total_size": sum(tensor.spec.nbytes for tensor in every),
        },
        "weight_map": {tensor.name: name for name, part in shards.items() for tensor in part},
    }


def _tensors_of(key: models.Key, cfg: models.ModelConfig) -> list[tuple[int | None, str]]:
    """(layer, name) of each tensor that a key stands for."""
    if "{layer}" not in key.hf:
        return [(None, key.hf)]
    return [(layer, key.hf.format(layer=layer)) for layer in range(cfg.num_layers)]


def _hf_shape(key: models.Key, by_path: dict[str, Any]) -> tuple[int, ...]:
    """The shape that Hugging Face's tensor has: what joining (weightless) leaves gives."""
    skip = "{layer}" in key.hf
    parts = [np.broadcast_to(np.int8(0), by_path[path].shape[skip:]) for path in key.ours]
    return tuple(key.join(*parts).shape)


def _by_path(tree: Any) -> dict[str, Any]:
    is_leaf = lambda node: isinstance(node, NamedSharding)  # noqa: E731
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {sharding.path_string(path): leaf for path, leaf in found}


def _progress(label: str, tensors: int, nbytes: int) -> Progress:
    return Progress(tensors, "tensors", label, disable=nbytes < QUIET_BYTES or jax.process_index() != 0)
