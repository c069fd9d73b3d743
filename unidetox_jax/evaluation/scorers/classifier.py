"""Toxicity by a BERT, RoBERTa, XLM-R or DistilBERT classifier on the accelerator, such as unitary/toxic-bert.

Reads a Hugging Face directory or hub id, or a Detoxify `.ckpt`. Computes in float32 with exact matrix products whatever
the stored dtype, since the scorer is the measuring instrument, and small. Each host scores its own texts on its local
devices, so a single host can score without the others.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import scipy.special
from absl import logging
from etils import epath

from unidetox_jax import sharding
from unidetox_jax.checkpoint import hf, load_tokenizer
from unidetox_jax.checkpoint.safetensors_file import MappedTensor, Spec
from unidetox_jax.checkpoint.source import CONFIG, TOKENIZER_FILES, TORCH_FILES, WEIGHT_FILES, resolve
from unidetox_jax.checkpoint.tokenizer import has_tokenizer
from unidetox_jax.checkpoint.weights import Weights
from unidetox_jax.data import tokens as data_tokens
from unidetox_jax.errors import UserError, suggest
from unidetox_jax.models import encoder
from unidetox_jax.padded_sizes import next_power_of_two, round_up
from unidetox_jax.progress import Progress

ARGUMENT = "PATH_OR_HUB_ID[#LABEL]"
DEFAULT_LABELS = ("toxicity", "toxic")  # the first one that the classifier has is used
# The implemented ones of Detoxify's model classes, and the labels that it renames for its oldest model
DETOXIFY = {
    "BertForSequenceClassification": "bert",
    "RobertaForSequenceClassification": "roberta",
    "XLMRobertaForSequenceClassification": "xlm-roberta",
}
CLASSES = {"toxic": "toxicity", "identity_hate": "identity_attack", "severe_toxic": "severe_toxicity"}
TABLES = ("word", "position", "token_type")
BATCH_TOKENS = {"cpu": 4096}  # rows · length of a batch
BATCH_TOKENS_ACCELERATOR = 32_768
SHORTEST_BUCKET = 16  # tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A loaded classifier. params: float32, replicated over `mesh` of the local devices."""

    params: Any
    cfg: encoder.EncoderConfig
    tokenizer: Any
    mesh: jax.sharding.Mesh
    source: str

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Logits, float32 [N, labels]. Texts that are too long are truncated, and their number is logged."""
        distinct = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        encoded = data_tokens.encode(self.tokenizer, list(distinct), end=True)
        self._warn_truncated(encoded)
        rows = [_truncated(ids, self.cfg.length_limit) for ids in encoded]
        logits = np.empty((len(rows), len(self.cfg.labels)), np.float32)

        def store(members: Sequence[int], result: jax.Array) -> None:
            logits[members] = np.asarray(result)[: len(members)]
            progress.update(len(members))

        pending = []
        with Progress(len(rows), "texts", "scoring", disable=len(rows) < 2000) as progress:
            for members, tokens, mask in _batches(rows, self.cfg, self.mesh):
                tokens, mask = jax.device_put((tokens, mask), sharding.batch_sharding(self.mesh))
                pending.append((members, _forward(self.params, tokens, self.cfg, mask)))
                if len(pending) > 2:  # the device computes while the host prepares a few batches ahead
                    store(*pending.pop(0))
            for batch in pending:
                store(*batch)
        return logits[[distinct[text] for text in texts]]

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [N, labels]: softmax for mutually exclusive labels, else a sigmoid for each; a regression's logits
        themselves."""
        logits = self.logits(texts).astype(np.float64)
        if self.cfg.problem_type == encoder.REGRESSION:
            return logits
        exclusive = self.cfg.problem_type == encoder.SINGLE and logits.shape[1] > 1
        return scipy.special.softmax(logits, axis=1) if exclusive else scipy.special.expit(logits)

    def _warn_truncated(self, encoded: Sequence[Sequence[int]]) -> None:
        count = sum(len(ids) > self.cfg.length_limit for ids in encoded)
        if count:
            logging.warning(
                "%s: %d of %d texts are longer than %d tokens and are scored by their beginning",
                *(self.source, count, len(encoded), self.cfg.length_limit),
            )


def scorer(source: str, label: str = ""):
    """`texts → P(label)`. label "": `toxicity`, else `toxic`, else the only one.

    Raises:
      UserError: nothing to load at `source`, or no such label (the message lists them).
    """
    classifier = load(source)
    column = _label_index(classifier.cfg.labels, label, source)
    return lambda texts: classifier.probabilities(texts)[:, column]


def make(argument: str):
    """`scorer` of SOURCE#LABEL."""
    source, _, label = argument.partition("#")
    return scorer(source, label)


def files(argument: str) -> list[epath.Path]:
    """The files that a classifier is read from: configuration, tokenizer and weights."""
    source = argument.partition("#")[0]
    if source.endswith(".ckpt"):
        return [epath.Path(source)]
    directory = resolve(source).directory
    patterns = (CONFIG, *TOKENIZER_FILES, *WEIGHT_FILES, *TORCH_FILES)
    return sorted({path for pattern in patterns for path in directory.glob(pattern)})


def load(source: str) -> Classifier:
    """A classifier with its tokenizer; for `source` see the module's docstring."""
    if source.endswith(".ckpt"):
        weights: Weights = (checkpoint := DetoxifyCheckpoint(epath.Path(source)))
        cfg, tokenizer = checkpoint.cfg, load_tokenizer(checkpoint.tokenizer)
    else:
        directory = resolve(source).directory
        cfg, weights, tokenizer = encoder.from_hf(directory), Weights(directory), load_tokenizer(directory)
    mesh = sharding.make_mesh("data:-1", jax.local_devices())
    params = hf.read_params(weights, cfg, mesh, "float32")
    if len(tokenizer) > cfg.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, but the model {cfg.vocab_size} embeddings: they do "
            "not belong together"
        )
    return Classifier(params, cfg, tokenizer, mesh, source)


def _label_index(labels: Sequence[str], label: str, source: str) -> int:
    defaults = [name for name in DEFAULT_LABELS if name in labels] or (labels if len(labels) == 1 else [""])
    name = label or defaults[0]
    if name not in labels:
        problem = f"no label {label!r}" if label else "it is not known which label means toxic"
        raise UserError(f"classifier:{source}: {problem}{suggest(label, labels)}; write classifier:{source}#LABEL")
    return labels.index(name)


# ------------------------------------------------------------------------------------------------- scoring


@functools.partial(jax.jit, static_argnums=2)
def _forward(params: Any, tokens: jax.Array, cfg: encoder.EncoderConfig, mask: jax.Array) -> jax.Array:
    return encoder.forward(params, tokens, cfg, mask)


def _batches(rows: Sequence[Sequence[int]], cfg: encoder.EncoderConfig, mesh: jax.sharding.Mesh):
    """Yields (row indices [n], int32 tokens [B,T], mask [B,T]), n ≤ B, by length bucket, so that few shapes compile."""
    budget = BATCH_TOKENS.get(mesh.devices.flat[0].platform, BATCH_TOKENS_ACCELERATOR)
    buckets: dict[int, list[int]] = {}
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        length = min(max(SHORTEST_BUCKET, next_power_of_two(len(rows[index]))), cfg.length_limit)
        buckets.setdefault(length, []).append(index)
    for length, members in buckets.items():
        size = max(1, min(budget // length, next_power_of_two(len(members))))
        size = round_up(size, sharding.batch_shards(mesh))
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            tokens, mask = np.full((size, length), max(cfg.pad_token_id, 0), np.int32), np.zeros((size, length), bool)
            for row, index in enumerate(chosen):
                tokens[row, : len(rows[index])], mask[row, : len(rows[index])] = rows[index], True
            yield chosen, tokens, mask


def _truncated(ids: Sequence[int], length: int) -> Sequence[int]:
    """The first tokens and the closing special token."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


# ------------------------------------------------------------------------------------------------- loading


class DetoxifyCheckpoint(Weights):
    """A Detoxify `.ckpt`: its tensors as `Weights`, its configuration `cfg`, and the location of its tokenizer.

    `state_dict` holds the weights, `config` the names of labels and architecture. A head wider than the classes also
    predicts identities mentioned in the text. The tokenizer is the one beside the file, else that of the hub model that
    was fine-tuned.
    """

    def __init__(self, path: epath.Path):
        try:
            import torch
        except ImportError:
            raise UserError(f"{path}: reading a .ckpt needs torch: pip install 'unidetox-jax[torch]'") from None
        if not path.exists():
            raise UserError(f"{path}: no such file")
        try:
            with path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
            data, architecture = content["config"]["dataset"]["args"], content["config"]["arch"]["args"]
            names = [*data["classes"], *data.get("identity_classes", ())]
            model_name, base = architecture["model_name"], architecture["model_type"]
            self._arrays = {name: tensor.float().numpy() for name, tensor in content["state_dict"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a Detoxify checkpoint (no field {error})") from None
        except Exception as error:  # of many types, from pickle and zip; also for files that would execute code
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{path}: not readable as weights alone ({reason})") from None
        self.listing = path
        self.specs = {name: Spec(array.dtype, array.shape) for name, array in self._arrays.items()}
        self.cfg = self._config(model_name, [CLASSES.get(name, name) for name in names])
        self.tokenizer = str(path.parent) if has_tokenizer(path.parent) else base

    def open(self, name: str) -> MappedTensor:
        return MappedTensor(self._arrays[name], lambda: None)

    def path(self, name: str) -> epath.Path:
        return self.listing

    def _config(self, model_name: str, names: Sequence[str]) -> encoder.EncoderConfig:
        """From the config.json beside the file, else from the tensors, with attention heads of size 64."""
        if model_name not in DETOXIFY:
            raise UserError(f"{self.listing}: a {model_name}{suggest(model_name, DETOXIFY)}")
        kind = DETOXIFY[model_name]
        prefix, head = encoder.KINDS[kind].prefix, encoder.KINDS[kind].head[1]
        config_file = self.listing.parent / "config.json"
        try:
            labels = self.specs[f"{head}.bias"].shape[0]
            tables = [self.specs[f"{prefix}.embeddings.{name}_embeddings.weight"].shape for name in TABLES]
            up = self.specs[f"{prefix}.encoder.layer.0.intermediate.dense.bias"].shape
        except KeyError as error:
            raise UserError(f"{self.listing}: key {error} is missing") from None
        (words, width), (positions, _), (types, _) = tables
        layers = [int(match[1]) for name in self.specs if (match := re.search(r"encoder\.layer\.(\d+)\.", name))]
        inferred = {
            "vocab_size": words,
            "hidden_size": width,
            "num_hidden_layers": max(layers) + 1,
            "num_attention_heads": width // 64,
            "intermediate_size": up[0],
            "max_position_embeddings": positions,
            "type_vocab_size": types,
            "layer_norm_eps": 1e-12 if kind == "bert" else 1e-5,
        }
        return encoder.from_hf(
            {
                **(json.loads(config_file.read_text()) if config_file.exists() else inferred),
                "model_type": kind,
                "num_labels": labels,
                "id2label": {i: names[i] if i < len(names) else f"LABEL_{i}" for i in range(labels)},
                "problem_type": encoder.MULTI,
            }
        )
