"""Toxicity by a BERT or RoBERTa classifier on the accelerator: unitary/toxic-bert and its kin.

Reads a Hugging Face directory or hub id, or a `.ckpt` as Detoxify releases them. Always in float32 with exact
matrix products: the scorer is the measuring instrument, and it is small. Each host scores the texts that it
is given on its own devices, so that nothing hangs when one host alone scores.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from unidetox_jax import sharding
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.models import bert
from unidetox_jax.progress import Progress

FILES = ("config.json", "*.safetensors", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")
DEFAULT_LABELS = ("toxicity", "toxic")  # the first that the classifier has
BATCH_TOKENS = {"cpu": 4096}  # rows · length of a batch
BATCH_TOKENS_ACCELERATOR = 32_768
SHORTEST = 16  # tokens of the first bucket


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A loaded classifier. params: float32, replicated over `mesh` (the local devices)."""

    params: Any
    cfg: bert.EncoderConfig
    tokenizer: Any
    mesh: jax.sharding.Mesh
    source: str

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Logits, float32 [N, labels]. A text that is too long is cut at the end, and their number is
        logged."""
        distinct = {text: at for at, text in enumerate(dict.fromkeys(texts))}
        encoded = self.tokenizer(list(distinct), add_special_tokens=True, verbose=False)["input_ids"]
        self._report_cut(encoded)
        rows = [_cut(ids, self.cfg.max_length) for ids in encoded]
        found = np.empty((len(rows), len(self.cfg.labels)), np.float32)
        pending = []
        with Progress(len(rows), "texts", "scoring", disable=len(rows) < 2000) as progress:
            for members, tokens in _batches(rows, self.cfg, self.mesh):
                placed = jax.device_put(tokens, sharding.batch_sharding(self.mesh))
                with jax.default_matmul_precision("highest"):
                    pending.append((members, _forward(self.params, placed, self.cfg)))
                if len(pending) > 2:  # the device works while the host prepares; memory stays small
                    progress.update(_store(found, *pending.pop(0)))
            for members, result in pending:
                progress.update(_store(found, members, result))
        return found[[distinct[text] for text in texts]]

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [N, labels]: softmax where the labels exclude each other, else a sigmoid for each."""
        logits = self.logits(texts).astype(np.float64)
        if exclusive(self.cfg):
            shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
            return shifted / shifted.sum(axis=1, keepdims=True)
        return 1 / (1 + np.exp(-logits))

    def _report_cut(self, encoded: Sequence[Sequence[int]]) -> None:
        cut = sum(len(ids) > self.cfg.max_length for ids in encoded)
        if cut:
            logging.warning(
                "%s: %d of %d texts are longer than %d tokens and are scored by their beginning",
                *(self.source, cut, len(encoded), self.cfg.max_length),
            )


def scorer(source: str, label: str = ""):
    """`texts → P(label)`. label "": `toxicity`, else `toxic`, else the only one.

    Raises:
      UserError: nothing to load at `source`, or no such label (those that there are get listed).
    """
    classifier = load(source)
    column = _label_index(classifier.cfg.labels, label, source)
    return lambda texts: classifier.probabilities(texts)[:, column]


def exclusive(cfg: bert.EncoderConfig) -> bool:
    """Whether exactly one label holds: config.json says so, or says nothing and there are two."""
    if cfg.problem_type:
        return cfg.problem_type == "single_label_classification" and len(cfg.labels) > 1
    return len(cfg.labels) == 2


def load(source: str) -> Classifier:
    """A classifier with its tokenizer; see the module's text for what `source` may be."""
    path = epath.Path(source)
    if path.suffix == ".ckpt":
        cfg, tensors, tokenizer_source = _released(path)
    else:
        path = path if path.is_dir() else _download(source)
        cfg, tensors, tokenizer_source = bert.config_from_hf(path), _safetensors(path), str(path)
    mesh = sharding.make_mesh("data:-1", jax.local_devices())
    params = jax.device_put(_params(tensors, cfg, source), sharding.replicated(mesh))
    tokenizer = _tokenizer(tokenizer_source)
    if len(tokenizer) > cfg.vocab_size:
        raise UserError(f"{source}: {len(tokenizer)} tokens, but {cfg.vocab_size} embeddings: not one model's files")
    return Classifier(params, cfg, tokenizer, mesh, source)


def _label_index(labels: Sequence[str], label: str, source: str) -> int:
    wanted = [label] if label else [name for name in DEFAULT_LABELS if name in labels][:1]
    if not wanted and len(labels) == 1:
        wanted = list(labels)
    if not wanted or wanted[0] not in labels:
        missing = f"no label {label!r}" if label else "which label means toxic is not known"
        raise UserError(f"classifier:{source}: {missing}{suggest(label, labels)}; write classifier:{source}#LABEL")
    return labels.index(wanted[0])


# ------------------------------------------------------------------------------------------------- scoring


@functools.partial(jax.jit, static_argnums=2)
def _forward(params: Any, tokens: jax.Array, cfg: bert.EncoderConfig) -> jax.Array:
    return bert.forward(params, tokens, cfg)


def _batches(rows: Sequence[Sequence[int]], cfg: bert.EncoderConfig, mesh: jax.sharding.Mesh):
    """Yields (indices [n], int32 tokens [B,T]), n ≤ B, of rows of like length; few shapes, so few
    compilations."""
    ways = sharding.batch_ways(mesh)
    budget = BATCH_TOKENS.get(mesh.devices.flat[0].platform, BATCH_TOKENS_ACCELERATOR)
    buckets: dict[int, list[int]] = {}
    for at in sorted(range(len(rows)), key=lambda at: len(rows[at])):
        length = min(max(SHORTEST, _power_of_two(len(rows[at]))), cfg.max_length)
        buckets.setdefault(length, []).append(at)
    for length, members in buckets.items():
        size = max(1, min(budget // length, _power_of_two(len(members))))
        size = -(-size // ways) * ways
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            tokens = np.full((size, length), cfg.pad_token_id, np.int32)
            for row, at in enumerate(chosen):
                tokens[row, : len(rows[at])] = rows[at]
            yield chosen, tokens


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _cut(ids: Sequence[int], length: int) -> Sequence[int]:
    """The first tokens and the closing special token."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _store(found: np.ndarray, members: Sequence[int], result: jax.Array) -> int:
    found[members] = np.asarray(result)[: len(members)]
    return len(members)


# ------------------------------------------------------------------------------------------------- loading


def _download(source: str) -> epath.Path:
    import huggingface_hub

    try:
        return epath.Path(huggingface_hub.snapshot_download(source, allow_patterns=list(FILES)))
    except Exception as error:  # its kinds of failure are many and change with its versions
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"classifier:{source}: no such directory, and not to be had from the hub ({reason})") from None


def _safetensors(directory: epath.Path) -> dict[str, np.ndarray]:
    from safetensors import numpy

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: no .safetensors file")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors |= numpy.load(file.read_bytes())
    return tensors


def _released(path: epath.Path) -> tuple[bert.EncoderConfig, dict[str, np.ndarray], str]:
    """Detoxify's file: weights under `state_dict`, label names and the architecture's name under `config`.

    The tokenizer is the one beside the file, else that of the hub model which was fine-tuned.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading a .ckpt needs torch: pip install 'unidetox-jax[torch]'") from None
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
        names = content["config"]["dataset"]["args"]["classes"]
        architecture = content["config"]["arch"]["args"]
        model_name, base = architecture["model_name"], architecture["model_type"]
        tensors = {name: tensor.float().numpy() for name, tensor in content["state_dict"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a Detoxify checkpoint (no field {error})") from None
    except Exception as error:  # pickle's and zip's many kinds; a file that wants to run code among them
        raise UserError(f"{path}: not readable as weights alone ({str(error).strip().split(chr(10))[0]})") from None
    cfg = _infer(tensors, model_name, tuple(names), path)
    beside = any((path.parent / name).exists() for name in ("tokenizer.json", "vocab.txt", "vocab.json"))
    return cfg, tensors, str(path.parent) if beside else base


def _infer(
    tensors: Mapping[str, np.ndarray], model_name: str, labels: tuple[str, ...], path: epath.Path
) -> bert.EncoderConfig:
    """The shape from the tensors; the file does not hold it. Heads of 64 numbers, as in every published
    one."""
    families = {"BertForSequenceClassification": "bert", "RobertaForSequenceClassification": "roberta"}
    if model_name not in families:
        raise UserError(f"{path}: a {model_name}{suggest(model_name, families)}")
    family = families[model_name]
    beside = path.parent / "config.json"
    if beside.exists():
        return dataclasses.replace(bert.config_from_hf(beside), labels=labels, problem_type="")
    embeddings = f"{family}.embeddings."
    words = tensors[embeddings + "word_embeddings.weight"].shape
    layers = {int(found[1]) for name in tensors if (found := re.search(r"encoder\.layer\.(\d+)\.", name))}
    return bert.EncoderConfig(
        family=family,
        vocab_size=words[0],
        hidden_size=words[1],
        num_layers=len(layers),
        num_heads=words[1] // 64,
        intermediate_size=tensors[f"{family}.encoder.layer.0.intermediate.dense.bias"].shape[0],
        max_position_embeddings=tensors[embeddings + "position_embeddings.weight"].shape[0],
        type_vocab_size=tensors[embeddings + "token_type_embeddings.weight"].shape[0],
        norm_epsilon=1e-5 if family == "roberta" else 1e-12,
        pad_token_id=1 if family == "roberta" else 0,
        activation="gelu",
        labels=labels,
        problem_type="multi_label_classification",
    )


def _params(tensors: dict[str, np.ndarray], cfg: bert.EncoderConfig, source: str) -> dict[str, Any]:
    """Our tree from HF's tensors, float32; every tensor is used, or ignored by name."""
    left, params = dict(tensors), {}
    try:
        for key in bert.key_table(cfg):
            stacked = "{layer}" in key.hf
            names = [key.hf.format(layer=i) for i in range(cfg.num_layers)] if stacked else [key.hf]
            values = [np.asarray(key.split(left.pop(name))[0], np.float32) for name in names]
            *path, leaf = key.ours[0].split("/")
            node = functools.reduce(lambda node, part: node.setdefault(part, {}), path, params)
            node[leaf] = np.stack(values) if stacked else np.ascontiguousarray(values[0])
    except KeyError as error:
        raise UserError(f"{source}: no tensor {error}; not a {cfg.family} sequence classifier?") from None
    ignored = bert.ignored_keys(cfg)
    unknown = [name for name in left if not any(re.fullmatch(rule, name) for rule in ignored)]
    if unknown:
        raise UserError(f"{source}: no place in a {cfg.family} classifier for {', '.join(unknown[:5])}")
    _check_shapes(params, cfg, source)
    return params


def _check_shapes(params: Any, cfg: bert.EncoderConfig, source: str) -> None:
    expected = jax.eval_shape(lambda: bert.init(cfg, jax.random.key(0)))
    found = dict(jax.tree_util.tree_leaves_with_path(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        if found[path].shape != leaf.shape:
            name = sharding.path_string(path)
            raise UserError(f"{source}: {name} has shape {found[path].shape}, config.json expects {leaf.shape}")


def _tokenizer(source: str) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{source}: no tokenizer for the classifier ({reason})") from None
