"""The families by name. A new family is one file with this module's six names and one line here."""

import dataclasses
import json
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from etils import epath

from unidetox_jax.errors import UserError
from unidetox_jax.models import (
    encoder,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    olmo2,
    olmo3,
    opt,
    phi3,
    qwen2,
    qwen3,
)
from unidetox_jax.models.config import ModelConfig, default_dtype
from unidetox_jax.models.layers import ACTIVATIONS
from unidetox_jax.models.weight_map import Key

FAMILIES: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "opt": opt,
    "falcon": falcon,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "phi3": phi3,
    "gpt_neox": gpt_neox,
}

OLDER_TYPES = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon"}
# The classes that share a family's modelling code; LlamaMoeForCausalLM, say, has another's.
CLASS_PREFIXES = {
    "GPT2": "gpt2", "OPT": "opt", "Falcon": "falcon", "RW": "falcon", "Llama": "llama", "LLaMA": "llama",
    "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma": "gemma", "Gemma2": "gemma2",
    "Gemma3": "gemma3_text", "Olmo2": "olmo2", "Olmo3": "olmo3", "Phi3": "phi3", "GPTNeoX": "gpt_neox",
}  # fmt: skip
CLASSES = re.compile(
    rf"(?:TF|Flax)?({'|'.join(CLASS_PREFIXES)})(?:Model|LMHeadModel|DoubleHeadsModel|ForCausalLM|"
    r"ForSequenceClassification|ForTokenClassification|ForQuestionAnswering)"
)
GPT2_OPTIONS = {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon"}
NOT_GPT2 = {"afn", "dff", "rotary_dim"}  # GPT-1's, CTRL's and GPT-J's, which have the options above as well

# Constants that checkpoints of one version or another hold, of no use in any family.
CONSTANTS = (
    r"(.*\.)?(inv_freq|cos_cached|sin_cached)",
    r"(.*\.)?attn\.(bias|masked_bias)",
    r"(.*\.)?version",
)


def family(cfg: ModelConfig) -> ModuleType:
    """The family's file: from_hf, to_hf, Embed, Block, Final, key_table; of a classifier, the encoder's."""
    return encoder if cfg.family in encoder.KINDS else FAMILIES[cfg.family]


def config_from_hf(source: Mapping[str, Any] | epath.PathLike, where: str = "") -> ModelConfig:
    """A frozen ModelConfig of Hugging Face's config.

    source: the dictionary, a config.json, or the directory that holds one; `where` names it in messages.

    Raises:
      UserError: no such file, an unknown model_type, or an option that is not implemented, by name.
    """
    if not isinstance(source, Mapping):
        path = epath.Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise UserError(f"{path}: no such file; expected Hugging Face's config.json")
        where = where or str(path)
        try:
            source = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error})") from None
    where = where or "config.json"
    if not isinstance(source, Mapping):
        raise UserError(f"{where}: found a {type(source).__name__}, expected Hugging Face's dictionary of options")
    kind = _family_name(source, where)
    cfg = FAMILIES[kind].from_hf({"model_type": kind, **source}, where)
    if cfg.activation not in ACTIVATIONS:
        raise UserError(f"{where}: activation {cfg.activation!r} is not implemented (known: {', '.join(ACTIVATIONS)})")
    if cfg.num_heads % cfg.num_kv_heads:
        raise UserError(f"{where}: {cfg.num_heads} heads are not a multiple of {cfg.num_kv_heads} key-value heads")
    return dataclasses.replace(cfg, dtype=default_dtype())


def _family_name(config: Mapping[str, Any], where: str) -> str:
    """The family of a config, checked against the model class that it names.

    Configs of 2019, and some later ones, have no model_type: their class says it, or GPT-2's own options do.
    """
    named = config.get("architectures") or ()
    of_class = {name: CLASS_PREFIXES[match[1]] for name in named if (match := CLASSES.fullmatch(name))}
    kind = config.get("model_type")
    if kind is None:
        is_gpt2 = GPT2_OPTIONS <= config.keys() and not config.keys() & NOT_GPT2
        kind = next(iter(of_class.values()), "gpt2" if is_gpt2 and not named else None)
    family = OLDER_TYPES.get(str(kind), kind)
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type {kind!r} is not implemented (known: {', '.join(FAMILIES)})")
    for name in named:
        if of_class.get(name) != family:
            raise UserError(
                f"{where}: architecture {name!r} is other code than transformers' {family}; not implemented"
            )
    return family


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """Hugging Face's config dictionary, with what AutoModelForCausalLM needs to know the class."""
    return {
        "model_type": cfg.family,
        "architectures": [cfg.architecture],
        **FAMILIES[cfg.family].to_hf(cfg),
    }


def key_table(cfg: ModelConfig) -> list[Key]:
    """Which Hugging Face tensor is which of our leaves, for both directions of conversion."""
    return family(cfg).key_table(cfg)


def ignored_keys(cfg: ModelConfig) -> list[str]:
    """Regular expressions of tensors that a checkpoint may hold and the model does not need."""
    tied = [r"lm_head\.weight"] if cfg.tie_word_embeddings else []
    return [*CONSTANTS, *getattr(family(cfg), "IGNORED", ()), *tied]


def stored_in_out(cfg: ModelConfig) -> bool:
    """Whether Hugging Face stores the linear layers of blocks [in, out], where torch.nn.Linear's are [out, in]."""
    return getattr(family(cfg), "IN_OUT", False)


def hf_prefix(cfg: ModelConfig) -> str:
    """The prefix of the *ForCausalLM names that a checkpoint of the bare model lacks."""
    return family(cfg).PREFIX
