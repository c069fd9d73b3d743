"""Loads tokenizers: tokens are those of the tokenizer's file, whichever class its configuration names.

    tokenizer.json              as the `tokenizers` library reads it, including its special tokens
    tokenizer.model             as sentencepiece reads it; adds BOS unless `add_bos_token` is false
    vocab.json and merges.txt   byte-level BPE (GPT-2, OPT); adds BOS if `add_bos_token` is true
    vocab.txt and the others    BERT and its relatives, as transformers reads them

transformers would rebuild a tokenizer from its class, and its LLaMA class replaces the file's normalizer. So the file's
tokenizer is wrapped, unchanged, in transformers' generic class.
"""

import fnmatch
import tempfile
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from unidetox_jax import storage
from unidetox_jax.checkpoint import sentencepiece_file
from unidetox_jax.checkpoint.source import CONFIG, MODEL, TOKENIZER_FILES, read_object, resolve, split_adapter
from unidetox_jax.errors import UserError
from unidetox_jax.models.lazy_transformers import torch_on_demand

FAST, SENTENCEPIECE, BYTE_LEVEL = "tokenizer.json", "tokenizer.model", "vocab.json"
ENCODERS = ("vocab.txt", "sentencepiece.bpe.model")
VOCABULARIES = (FAST, SENTENCEPIECE, BYTE_LEVEL, *ENCODERS)
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
INIT_ARGUMENTS = ("model_max_length", "padding_side", "truncation_side", "chat_template")  # of tokenizer_config.json
GPT2_END = "<|endoftext|>"


def load_tokenizer(source: epath.PathLike) -> Any:
    """The transformers tokenizer of a directory with one of VOCABULARIES, or of any source that `load` takes.

    Raises:
      UserError: no tokenizer there, or files that cannot be read.
    """
    directory = epath.Path(source)
    if not has_tokenizer(directory):
        name, adapter = split_adapter(source)
        if adapter:
            return load_tokenizer(name)
        directory = resolve(name, weights=False).directory
    if not has_tokenizer(directory):
        raise UserError(f"{directory}: no tokenizer; expected {', '.join(VOCABULARIES[:-1])} or {VOCABULARIES[-1]}")
    try:
        if not storage.is_remote(directory):
            return _load(directory, str(directory))
        with tempfile.TemporaryDirectory() as local:
            copy_tokenizer(directory, epath.Path(local))
            return _load(epath.Path(local), str(directory))
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers share no exception class
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{directory}: its tokenizer cannot be read ({type(error).__name__}: {reason})") from None


def has_tokenizer(directory: epath.Path) -> bool:
    """Whether the directory holds a vocabulary file."""
    return any((directory / name).exists() for name in VOCABULARIES)


def copy_tokenizer(source: epath.Path, destination: epath.Path) -> None:
    """Copies a tokenizer's files, and config.json, which may name its special tokens."""
    for path in source.iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in (CONFIG, *TOKENIZER_FILES)) and not path.is_dir():
            (destination / path.name).write_bytes(path.read_bytes())


def _load(directory: epath.Path, name: str) -> Any:
    with torch_on_demand():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = _read_json(directory / CONFIG) or _read_json(directory / MODEL).get("config", {})
    vocabulary = next(name for name in VOCABULARIES if (directory / name).exists())
    if vocabulary in ENCODERS or (vocabulary == BYTE_LEVEL and "roberta" in str(config.get("model_type"))):
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    settings = _read_json(directory / "tokenizer_config.json")
    configured = _configured_tokens(settings, _read_json(directory / "special_tokens_map.json"))
    backend, builtin = _backend(directory, vocabulary, settings, configured)
    backend.no_truncation()
    backend.no_padding()
    special = _special_tokens(backend, configured, builtin, config, name)
    if backend.num_special_tokens_to_add(is_pair=False) == 0:  # otherwise the file itself adds BOS and EOS
        _set_template(backend, settings, configured, special, vocabulary)
    template = directory / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text()
    arguments = {key: settings[key] for key in INIT_ARGUMENTS if settings.get(key) is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **arguments)
    tokenizer.name_or_path = name
    for role, token in special.items():  # as arguments transformers would add them to the file's tokens
        setattr(tokenizer, role, token)
    return tokenizer


def _backend(
    directory: epath.Path, vocabulary: str, settings: Mapping[str, Any], configured: Mapping[str, str]
) -> tuple[Tokenizer, dict[str, str]]:
    """(tokenizer of the vocabulary file, special tokens by role that the file itself implies)."""
    path = directory / vocabulary
    if vocabulary == FAST:
        return Tokenizer.from_buffer(path.read_bytes()), {}
    added = _added_tokens(directory, settings, configured)
    if vocabulary == SENTENCEPIECE:
        return sentencepiece_file.read(path, added)
    backend = _byte_level(path, added, bool(settings.get("add_prefix_space")))
    builtin = {} if backend.token_to_id(GPT2_END) is None else dict.fromkeys(("bos_token", "eos_token"), GPT2_END)
    special = {*configured.values(), *builtin.values()}
    backend.add_special_tokens([token for token in sorted(special) if backend.token_to_id(token) is not None])
    return backend, builtin


def _byte_level(path: epath.Path, added: Mapping[int, AddedToken], add_prefix_space: bool) -> Tokenizer:
    merges = path.parent / "merges.txt"
    if not merges.exists():
        raise UserError(f"{path}: no {merges.name} beside it, which byte-level BPE needs")
    vocabulary, pairs = models.BPE.read_file(str(path), str(merges))
    tokenizer = Tokenizer(models.BPE({**vocabulary, **{token.content: index for index, token in added.items()}}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([added[index] for index in sorted(added)])
    return tokenizer


def _added_tokens(directory: epath.Path, settings: Mapping, configured: Mapping[str, str]) -> dict[int, AddedToken]:
    """Tokens by id that added_tokens.json and tokenizer_config.json add to a vocabulary."""
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or ()
    special = {*configured.values(), *map(_content, extra)}
    added = {
        index: AddedToken(token, normalized=False, special=token in special)
        for token, index in _read_json(directory / "added_tokens.json").items()
    }
    for index, token in settings.get("added_tokens_decoder", {}).items():
        flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "special") if key in token}
        added[int(index)] = AddedToken(token["content"], normalized=False, **flags)
    return added


def _configured_tokens(settings: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role. special_tokens_map.json wins, unless the settings have added_tokens_decoder."""
    order = (settings, special) if "added_tokens_decoder" in settings else (special, settings)
    tokens = {role: next(filter(None, (_content(file.get(role)) for file in order)), None) for role in ROLES}
    return {role: token for role, token in tokens.items() if token}


def _content(token: Any) -> str | None:
    """A special token's text; files write it as a string, an object, "" or null."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) and token else None


def _special_tokens(
    backend: Tokenizer, configured: Mapping[str, str], builtin: Mapping[str, str], config: Mapping[str, Any], where: str
) -> dict[str, str]:
    """Role → token: the configured one, else the vocabulary's built-in one, else that of the model's config."""
    special = {}
    for role in ROLES:
        token, index = configured.get(role), config.get(f"{role}_id")
        if token and backend.token_to_id(token) is None:
            logging.info("%s: ignored %s %r, which is not in the vocabulary", where, role, token)
            token = None
        if not (token or builtin.get(role)) and isinstance(index, int) and 0 <= index < backend.get_vocab_size():
            token = backend.id_to_token(index)
        if token or builtin.get(role):
            special[role] = token or builtin[role]
    return special


def _set_template(
    backend: Tokenizer,
    settings: Mapping[str, Any],
    configured: Mapping[str, str],
    special: Mapping[str, str],
    vocabulary: str,
) -> None:
    """Adds BOS and EOS to texts if the settings say so; if they say nothing, BOS for sentencepiece only."""
    if vocabulary != SENTENCEPIECE:  # no fallback for a configured token that does not exist
        special = {role: token for role, token in special.items() if configured.get(role, token) == token}
    begin = special.get("bos_token") if settings.get("add_bos_token", vocabulary == SENTENCEPIECE) else None
    end = special.get("eos_token") if settings.get("add_eos_token") else None
    if begin or end:
        backend.post_processor = processors.TemplateProcessing(
            single=[token for token in (begin, "$A", end) if token],
            special_tokens=[(token, backend.token_to_id(token)) for token in {begin, end} if token],
        )


def _read_json(path: epath.Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}
