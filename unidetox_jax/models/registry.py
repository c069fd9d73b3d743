"""The model families by name.

A new family is one file and one line in FAMILIES. Beside the names that `family` lists, the file has PREFIX (of
tensors), READ (options of a config) and CLASSES: how the names of transformers' classes with its modelling code begin
(LlamaMoeForCausalLM, for example, has its own code).
"""

import dataclasses
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
from unidetox_jax.models.config import ModelConfig, default_dtype, read_json
from unidetox_jax.models.key_tables import Key
from unidetox_jax.models.layers import ACTIVATIONS

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

FORMER_TYPES = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon"}
CLASS_PREFIXES = {prefix: name for name, module in FAMILIES.items() for prefix in module.CLASSES}
CLASSES = re.compile(
    rf"(?:TF|Flax)?({'|'.join(CLASS_PREFIXES)})(?:Model|LMHeadModel|DoubleHeadsModel|ForCausalLM|"
    r"ForSequenceClassification|ForTokenClassification|ForQuestionAnswering)"
)
GPT2_OPTIONS = {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon"}
NOT_GPT2 = {"afn", "dff", "rotary_dim"}  # of GPT-1, CTRL and GPT-J, which have the options above too

# Constants in checkpoints of some versions that no family needs
CONSTANTS = (
    r"(.*\.)?(inv_freq|cos_cached|sin_cached)",
    r"(.*\.)?attn\.(bias|masked_bias)",
    r"(.*\.)?version",
)


def family(cfg: ModelConfig) -> ModuleType:
    """The family's module: from_hf, to_hf, Embed, Block, Final, key_table; for a classifier, `encoder`."""
    return encoder if cfg.family in encoder.KINDS else FAMILIES[cfg.family]


def config_from_hf(source: Mapping[str, Any] | epath.PathLike, where: str = "") -> ModelConfig:
    """The ModelConfig of a Hugging Face config.

    source: the dictionary, a config.json, or a directory that holds one; `where` names it in messages.

    Raises:
      UserError: no such file, an unknown model_type, or an option that is not implemented, by name.
    """
    config, where = read_json(source, where)
    name = _family_name(config, where)
    cfg = FAMILIES[name].from_hf({"model_type": name, **config}, where)
    if cfg.activation not in ACTIVATIONS:
        raise UserError(f"{where}: activation {cfg.activation!r} is not implemented (known: {', '.join(ACTIVATIONS)})")
    if cfg.num_heads % cfg.num_kv_heads:
        raise UserError(f"{where}: {cfg.num_heads} heads are not a multiple of {cfg.num_kv_heads} key-value heads")
    return dataclasses.replace(cfg, dtype=default_dtype())


def _family_name(config: Mapping[str, Any], where: str) -> str:
    """The family of a config, checked against the model class that it names.

    Configs of 2019, and some later ones, have no model_type; then the class or GPT-2's own options identify them.
    """
    architectures = config.get("architectures") or ()
    by_class = {name: CLASS_PREFIXES[match[1]] for name in architectures if (match := CLASSES.fullmatch(name))}
    model_type = config.get("model_type")
    if model_type is None:
        is_gpt2 = GPT2_OPTIONS <= config.keys() and not config.keys() & NOT_GPT2
        model_type = next(iter(by_class.values()), "gpt2" if is_gpt2 and not architectures else None)
    family = FORMER_TYPES.get(str(model_type), model_type)
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type {model_type!r} is not implemented (known: {', '.join(FAMILIES)})")
    for name in architectures:
        if by_class.get(name) != family:
            raise UserError(
                f"{where}: architecture {name!r} is other code than transformers' {family}; not implemented"
            )
    return family


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """Hugging Face's config dictionary, with the model class that AutoModelForCausalLM needs."""
    return {
        "model_type": cfg.family,
        "architectures": [cfg.architecture],
        **FAMILIES[cfg.family].to_hf(cfg),
    }


def key_table(cfg: ModelConfig) -> list[Key]:
    """The correspondence of Hugging Face's tensors and our parameters, for conversion in both directions."""
    return family(cfg).key_table(cfg)


def ignored_keys(cfg: ModelConfig) -> list[str]:
    """Regular expressions of tensors that a checkpoint may hold but the model does not need."""
    tied = [r"lm_head\.weight"] if cfg.tie_word_embeddings else []
    return [*CONSTANTS, *getattr(family(cfg), "IGNORED", ()), *tied]


def stored_in_out(cfg: ModelConfig) -> bool:
    """Whether Hugging Face stores the blocks' linear layers as [in, out], not as torch.nn.Linear's [out, in]."""
    return getattr(family(cfg), "IN_OUT", False)


def hf_prefix(cfg: ModelConfig) -> str:
    """The prefix of *ForCausalLM tensor names that a checkpoint of the base model lacks."""
    return family(cfg).PREFIX
