"""Tokenizers: transformers' own, from local files, without anybody's code.

Surprising: for a directory that holds only a sentencepiece `tokenizer.model`, AutoTokenizer makes one that knows
neither the space before the first word nor the beginning-of-sequence token; LLaMA's is meant, and made here.
"""

import fnmatch
import json
import tempfile
from typing import Any

from etils import epath

from unidetox_jax.checkpoint.safetensors_file import is_remote
from unidetox_jax.checkpoint.source import CONFIG, MODEL, TOKENIZER_FILES, find
from unidetox_jax.errors import UserError

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
SPECIAL = ("bos_token", "eos_token", "pad_token")


def load_tokenizer(source: epath.PathLike) -> Any:
    """The transformers tokenizer of what `load` takes, or of a directory with one of VOCABULARIES.

    Raises:
      UserError: no tokenizer there, or one that cannot be read without code of its own.
    """
    directory = epath.Path(source)
    if not has_tokenizer(directory):
        directory = find(source, weights=False).directory
    if not has_tokenizer(directory):
        raise UserError(f"{directory}: no tokenizer; expected {', '.join(VOCABULARIES[:-1])} or {VOCABULARIES[-1]}")
    try:
        if not is_remote(directory):
            return _load(directory)
        with tempfile.TemporaryDirectory() as local:
            copy_tokenizer(directory, epath.Path(local))
            return _load(epath.Path(local))
    except Exception as error:  # transformers and tokenizers have no common one
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{directory}: its tokenizer cannot be read ({type(error).__name__}: {reason})") from None


def has_tokenizer(directory: epath.Path) -> bool:
    """Whether a vocabulary lies in the directory."""
    return any((directory / name).exists() for name in VOCABULARIES)


def copy_tokenizer(source: epath.Path, destination: epath.Path) -> None:
    """Copies a tokenizer's files as they are, with the config that may be needed to know its class."""
    for path in source.iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in (CONFIG, *TOKENIZER_FILES)) and not path.is_dir():
            (destination / path.name).write_bytes(path.read_bytes())


def _load(directory: epath.Path) -> Any:
    from transformers import AutoTokenizer, LlamaTokenizer

    settings = _json(directory / "tokenizer_config.json")
    only_sentencepiece = not any((directory / name).exists() for name in ("tokenizer.json", "vocab.json", "vocab.txt"))
    if only_sentencepiece and "tokenizer_class" not in settings:
        tokenizer = LlamaTokenizer.from_pretrained(str(directory), add_bos_token=True)
    else:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    config = _json(directory / CONFIG) or _json(directory / MODEL).get("config", {})
    for name in SPECIAL:  # a bare tokenizer.json does not say which tokens these are
        token = config.get(f"{name}_id")
        if getattr(tokenizer, name) is None and isinstance(token, int) and 0 <= token < len(tokenizer):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))
    return tokenizer


def _json(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
