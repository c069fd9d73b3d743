"""What a user may point at: a Hugging Face directory, a hub id, a directory of ours, a finished stage; and, for a model
with an adapter, MODEL+ADAPTER."""

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from etils import epath

from unidetox_jax.errors import UserError

MODEL = "model.json"  # marks a directory that `checkpoint.save` wrote
CONFIG = "config.json"
COMPLETE, PARTIAL = "stage.json", "stage.partial.json"  # of a finished stage, and of one under way
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_TORCH = "adapter_model.bin"
TOKENIZER_FILES = (
    "tokenizer*",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
TORCH_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


class Source(NamedTuple):
    """Where a checkpoint lies and in which form: "hf" or "orbax"."""

    kind: str
    directory: epath.Path


def split(source: epath.PathLike) -> tuple[str, str]:
    """(model, adapter) of MODEL+ADAPTER, where the model may be such a pair too; of all else the adapter is empty.

    A plus that belongs to the name of something that exists divides nothing.
    """
    text = str(source)
    if "+" not in text or epath.Path(text).expanduser().exists():
        return text, ""
    places = [i for i, letter in enumerate(text) if letter == "+"]
    there = (i for i in places if epath.Path(text[i + 1 :]).expanduser().exists())
    place = next(there, places[-1])
    return text[:place], text[place + 1 :]


def find_adapter(source: epath.PathLike) -> epath.Path:
    """The directory of PEFT's files: `source` itself, a finished stage's, or a hub id's.

    Raises:
      UserError: there is nothing, something else, an unfinished stage, or the hub does not give it.
    """
    directory = _here(source, lambda name: _snapshot(name, (ADAPTER, ADAPTER_WEIGHTS, ADAPTER_TORCH)))
    for place in (directory, directory / "adapter"):
        if (place / ADAPTER).exists():
            return place
    raise UserError(f"{directory}: no adapter; expected {ADAPTER} (PEFT's)")


def find(source: epath.PathLike, weights: bool = True) -> Source:
    """Where the checkpoint is; a hub id is downloaded first (safetensors, else .bin; without `weights` none).

    Raises:
      UserError: there is nothing, something else, an unfinished stage, or the hub does not give it.
    """
    directory = _here(source, lambda name: _download(name, weights))
    if not directory.is_dir():
        raise UserError(f"{directory}: a file; expected the directory of a checkpoint")
    if not (directory / CONFIG).exists() and (directory / "hf" / CONFIG).exists():
        directory = directory / "hf"
    if (directory / ADAPTER).exists():
        raise UserError(_adapter(directory / ADAPTER, directory))
    if (directory / MODEL).exists():
        return Source("orbax", directory)
    if (directory / CONFIG).exists():
        return Source("hf", directory)
    if (directory / "adapter" / ADAPTER).exists():
        raise UserError(_adapter(directory / "adapter" / ADAPTER, directory))
    raise UserError(f"{directory}: no checkpoint; expected {CONFIG} (Hugging Face's) or {MODEL} (this program's)")


def _here(source: epath.PathLike, download: Callable[[str], epath.Path]) -> epath.Path:
    """The source on this machine, a hub id's downloaded; UserError for nothing, or an unfinished stage."""
    directory = epath.Path(source).expanduser()
    if not directory.exists():
        if not HUB_ID.fullmatch(str(source)):
            raise UserError(f"{source}: no such directory")
        directory = download(str(source))
    if (directory / PARTIAL).exists() and not (directory / COMPLETE).exists():
        raise UserError(f"{directory}: this stage is not finished; run it again to continue it")
    return directory


def _download(name: str, weights: bool) -> epath.Path:
    """The hub's snapshot on this machine, as far as it is needed."""
    small = (CONFIG, GENERATION, ADAPTER, *TOKENIZER_FILES)
    directory = _snapshot(name, (*small, *WEIGHT_FILES) if weights else small)
    if weights and not any(directory.glob("model*.safetensors")):
        directory = _snapshot(name, (*small, *TORCH_FILES))
    return directory


def _adapter(path: epath.Path, directory: epath.Path) -> str:
    """Why an adapter's directory is no model; transformers too takes one with this file for an adapter."""
    base = "MODEL"
    try:
        found = json.loads(path.read_text())
        base = found["base_model_name_or_path"] or base
        what = f"a {found['peft_type']} adapter of {base!r}"
    except (ValueError, KeyError, TypeError):
        what = "an adapter"
    return f"{path}: {what}, not a model; give both, as {base}+{directory}"


def _snapshot(name: str, patterns: Sequence[str]) -> epath.Path:
    import huggingface_hub

    try:
        return epath.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises its own, its transport's and the operating system's
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{name}: no such directory, and the hub does not give it ({type(error).__name__}: {reason})"
        ) from None
