"""Finds the checkpoint a user names: a Hugging Face directory or hub id, a directory that `checkpoint.save` wrote, a
finished stage, or MODEL+ADAPTER."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from unidetox_jax.errors import UserError

MODEL = "model.json"  # marks a directory that `checkpoint.save` wrote
CONFIG = "config.json"
COMPLETE, PARTIAL = "stage.json", "stage.partial.json"  # of a finished and an unfinished stage
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
    """A checkpoint's format ("hf" or "orbax") and directory."""

    kind: str
    directory: epath.Path


def split_adapter(source: epath.PathLike) -> tuple[str, str]:
    """(MODEL, ADAPTER) of MODEL+ADAPTER, where MODEL may be such a pair itself; without an adapter (source, "").

    A plus within the name of an existing path does not split it.
    """
    text = str(source)
    if "+" not in text or epath.Path(text).expanduser().exists():
        return text, ""
    pluses = [i for i, letter in enumerate(text) if letter == "+"]
    before_existing_path = (i for i in pluses if epath.Path(text[i + 1 :]).expanduser().exists())
    plus = next(before_existing_path, pluses[-1])
    return text[:plus], text[plus + 1 :]


def resolve_adapter(source: epath.PathLike) -> epath.Path:
    """The directory of PEFT's files: `source` itself, a finished stage's, or a hub id's.

    Raises:
      UserError: nothing or something else is there, the stage is unfinished, or the download failed.
    """
    directory = _local(source, lambda name: _snapshot(name, (ADAPTER, ADAPTER_WEIGHTS, ADAPTER_TORCH)))
    for candidate in (directory, directory / "adapter"):
        if (candidate / ADAPTER).exists():
            return candidate
    raise UserError(f"{directory}: no adapter; expected {ADAPTER} (PEFT's)")


def resolve(source: epath.PathLike, weights: bool = True) -> Source:
    """The checkpoint's format and directory; a hub id is downloaded first, with `weights` or without.

    Raises:
      UserError: nothing or something else is there, the stage is unfinished, or the download failed.
    """
    directory = _local(source, lambda name: _download(name, weights))
    if not directory.is_dir():
        raise UserError(f"{directory}: found a file, expected the directory of a checkpoint")
    if not (directory / CONFIG).exists() and (directory / "hf" / CONFIG).exists():
        directory = directory / "hf"
    if (directory / ADAPTER).exists():
        raise UserError(_adapter_message(directory / ADAPTER, directory))
    if (directory / MODEL).exists():
        return Source("orbax", directory)
    if (directory / CONFIG).exists():
        return Source("hf", directory)
    if (directory / "adapter" / ADAPTER).exists():
        raise UserError(_adapter_message(directory / "adapter" / ADAPTER, directory))
    raise UserError(f"{directory}: no checkpoint; expected {CONFIG} (Hugging Face's) or {MODEL} (this program's)")


def _local(source: epath.PathLike, download: Callable[[str], epath.Path]) -> epath.Path:
    """The source's path, downloaded if it is a hub id. Raises UserError for a missing path or an unfinished stage."""
    directory = epath.Path(source).expanduser()
    if not directory.exists():
        if not HUB_ID.fullmatch(str(source)):
            raise UserError(f"{source}: no such directory")
        directory = download(str(source))
    if (directory / PARTIAL).exists() and not (directory / COMPLETE).exists():
        raise UserError(f"{directory}: this stage is not finished; run it again to continue it")
    return directory


def _download(name: str, weights: bool) -> epath.Path:
    """A snapshot of the hub's files: safetensors, or .bin where there are none."""
    small = (CONFIG, GENERATION, ADAPTER, *TOKENIZER_FILES)
    directory = _snapshot(name, (*small, *WEIGHT_FILES) if weights else small)
    if weights and not any(directory.glob("model*.safetensors")):
        directory = _snapshot(name, (*small, *TORCH_FILES))
    return directory


def _adapter_message(path: epath.Path, directory: epath.Path) -> str:
    """Why a directory is not a model: transformers, too, takes any directory with this file for an adapter."""
    base = "MODEL"
    try:
        config = json.loads(path.read_text())
        base = config["base_model_name_or_path"] or base
        what = f"a {config['peft_type']} adapter of {base!r}"
    except (ValueError, KeyError, TypeError):
        what = "an adapter"
    return f"{path}: {what}, not a model; give both, as {base}+{directory}"


def read_object(path: epath.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found {type(value).__name__}, expected an object")
    return value


def _snapshot(name: str, patterns: Sequence[str]) -> epath.Path:
    import huggingface_hub

    try:
        return epath.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises its own, its transport's and the operating system's
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{name}: no such directory, and no download from the hub ({type(error).__name__}: {reason})"
        ) from None
