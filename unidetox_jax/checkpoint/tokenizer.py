"""Tokenizers: the tokens are those of the tokenizer's own file, whichever class its configuration names.

    tokenizer.json              as the `tokenizers` library reads it, its special tokens included
    tokenizer.model             as sentencepiece reads it; begins with BOS unless `add_bos_token` is false
    vocab.json and merges.txt   byte-level BPE, as GPT-2's and OPT's; begins with BOS where `add_bos_token` is true
    vocab.txt and the others    of BERT's relatives: as transformers reads them

transformers rebuilds a tokenizer from its class instead, and its LLaMA class replaces the file's normaliser; so its
plain class is put around the file's tokenizer, and nothing of the tokenizer is changed.
"""

import fnmatch
import json
import tempfile
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from unidetox_jax import storage
from unidetox_jax.checkpoint import sentencepiece_file
from unidetox_jax.checkpoint.source import CONFIG, MODEL, TOKENIZER_FILES, find, split
from unidetox_jax.errors import UserError
from unidetox_jax.models.transformers_import import torch_on_demand

WHOLE, SENTENCEPIECE, BYTE_LEVEL = "tokenizer.json", "tokenizer.model", "vocab.json"
ENCODERS = ("vocab.txt", "sentencepiece.bpe.model")
VOCABULARIES = (WHOLE, SENTENCEPIECE, BYTE_LEVEL, *ENCODERS)
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
KEPT = ("model_max_length", "padding_side", "truncation_side", "chat_template")  # of tokenizer_config.json
GPT2_END = "<|endoftext|>"


def load_tokenizer(source: epath.PathLike) -> Any:
    """The tokenizer of what `load` takes, or of a directory with one of VOCABULARIES, as one of transformers.

    Raises:
      UserError: no tokenizer there, or files that cannot be read.
    """
    directory = epath.Path(source)
    if not has_tokenizer(directory):
        name, adapter = split(source)
        if adapter:
            return load_tokenizer(name)
        directory = find(name, weights=False).directory
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
    except Exception as error:  # transformers and tokenizers have no common one
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{directory}: its tokenizer cannot be read ({type(error).__name__}: {reason})") from None


def has_tokenizer(directory: epath.Path) -> bool:
    """Whether a vocabulary lies in the directory."""
    return any((directory / name).exists() for name in VOCABULARIES)


def copy_tokenizer(source: epath.Path, destination: epath.Path) -> None:
    """Copies a tokenizer's files as they are, with the config that may be needed to know its special tokens."""
    for path in source.iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in (CONFIG, *TOKENIZER_FILES)) and not path.is_dir():
            (destination / path.name).write_bytes(path.read_bytes())


def _load(directory: epath.Path, name: str) -> Any:
    with torch_on_demand():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = _json(directory / CONFIG) or _json(directory / MODEL).get("config", {})
    form = next(name for name in VOCABULARIES if (directory / name).exists())
    if form in ENCODERS or (form == BYTE_LEVEL and "roberta" in str(config.get("model_type"))):
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    settings = _json(directory / "tokenizer_config.json")
    named = _named(settings, _json(directory / "special_tokens_map.json"))
    backend, own = _backend(directory, form, settings, named)
    backend.no_truncation()
    backend.no_padding()
    special = _special_tokens(backend, named, own, config, name)
    if backend.num_special_tokens_to_add(is_pair=False) == 0:  # else the file says itself what stands around a text
        _surround(backend, settings, named, special, form)
    template = directory / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text()
    kept = {key: settings[key] for key in KEPT if settings.get(key) is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **kept)
    tokenizer.name_or_path = name
    for role, token in special.items():  # set, not given above: transformers would add them to the file's tokens
        setattr(tokenizer, role, token)
    return tokenizer


def _backend(
    directory: epath.Path, form: str, settings: Mapping[str, Any], named: Mapping[str, str]
) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer that the file `form` holds, and the special tokens by role that it has by itself."""
    path = directory / form
    if form == WHOLE:
        return Tokenizer.from_buffer(path.read_bytes()), {}
    added = _added(directory, settings, named)
    if form == SENTENCEPIECE:
        return sentencepiece_file.read(path, added)
    backend = _byte_level(path, added, bool(settings.get("add_prefix_space")))
    own = {} if backend.token_to_id(GPT2_END) is None else dict.fromkeys(("bos_token", "eos_token"), GPT2_END)
    special = {*named.values(), *own.values()}
    backend.add_special_tokens([token for token in sorted(special) if backend.token_to_id(token) is not None])
    return backend, own


def _byte_level(path: epath.Path, added: Mapping[int, AddedToken], add_prefix_space: bool) -> Tokenizer:
    merges = path.parent / "merges.txt"
    if not merges.exists():
        raise UserError(f"{path}: a vocabulary without {merges.name} beside it; a byte-level BPE has both")
    vocabulary, pairs = models.BPE.read_file(str(path), str(merges))
    tokenizer = Tokenizer(models.BPE({**vocabulary, **{token.content: index for index, token in added.items()}}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([added[index] for index in sorted(added)])
    return tokenizer


def _added(directory: epath.Path, settings: Mapping, named: Mapping[str, str]) -> dict[int, AddedToken]:
    """The tokens that are added to a vocabulary, by id, of tokenizer_config.json and added_tokens.json."""
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or ()
    special = {*named.values(), *map(_content, extra)}
    found = {
        index: AddedToken(token, normalized=False, special=token in special)
        for token, index in _json(directory / "added_tokens.json").items()
    }
    for index, token in settings.get("added_tokens_decoder", {}).items():
        flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "special") if key in token}
        found[int(index)] = AddedToken(token["content"], normalized=False, **flags)
    return found


def _named(settings: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role; special_tokens_map.json is the younger of the two, unless added tokens have ids."""
    order = (settings, special) if "added_tokens_decoder" in settings else (special, settings)
    found = {role: next(filter(None, (_content(file.get(role)) for file in order)), None) for role in ROLES}
    return {role: token for role, token in found.items() if token}


def _content(token: Any) -> str | None:
    """A special token's text: it may be written as text, as an object, or as nothing ("" or null)."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) and token else None


def _special_tokens(
    backend: Tokenizer, named: Mapping[str, str], own: Mapping[str, str], config: Mapping[str, Any], where: str
) -> dict[str, str]:
    """Each role's token: the one that is named, else the vocabulary's own, else the one of the model's config."""
    special = {}
    for role in ROLES:
        token, index = named.get(role), config.get(f"{role}_id")
        if token and backend.token_to_id(token) is None:
            logging.info("%s: passed over %s %r, which is not in the vocabulary", where, role, token)
            token = None
        if not (token or own.get(role)) and isinstance(index, int) and 0 <= index < backend.get_vocab_size():
            token = backend.id_to_token(index)
        if token or own.get(role):
            special[role] = token or own[role]
    return special


def _surround(
    backend: Tokenizer, settings: Mapping[str, Any], named: Mapping[str, str], special: Mapping[str, str], form: str
) -> None:
    """BOS in front and EOS behind a text where the settings say so; where they say nothing, sentencepiece's BOS."""
    if form != SENTENCEPIECE:  # one that is named and not there is none
        special = {role: token for role, token in special.items() if named.get(role, token) == token}
    begin = special.get("bos_token") if settings.get("add_bos_token", form == SENTENCEPIECE) else None
    end = special.get("eos_token") if settings.get("add_eos_token") else None
    if begin or end:
        backend.post_processor = processors.TemplateProcessing(
            single=[token for token in (begin, "$A", end) if token],
            special_tokens=[(token, backend.token_to_id(token)) for token in {begin, end} if token],
        )


def _json(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}, expected an object")
    return found
