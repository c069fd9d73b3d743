"""What a model is, as frozen values: hashable, so that a jitted function may take one as a static argument.

A family subclasses `ModelConfig` in its own file with what is only its own, and reads and writes Hugging Face's form.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from absl import logging

from unidetox_jax.errors import UserError
from unidetox_jax.models.rotary import Rotary
from unidetox_jax.models.transformers_import import config_class
from unidetox_jax.recipe import Lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every family has.

    `dtype` is the compute dtype; parameters keep theirs. `lora` says what an adapter's leaves among them mean.
    `layer_loop` runs the layers by `lax.scan` ("scan") or one after another ("unroll"); it changes speed and compile
    time, not the result; nor do `decode_kernel`, by which a step's attention is `decode_attention`'s, and
    `wide_heads`, how many of them lie together in a cache.
    """

    family: ClassVar[str]
    architecture: ClassVar[str]  # the transformers class that reads the exported checkpoint

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    max_position_embeddings: int
    activation: str
    norm_epsilon: float
    tie_word_embeddings: bool
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    extra_eos_token_ids: tuple[int, ...] = ()  # Llama 3's instruction models end a text by one of several
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    rotary: Rotary | None = None
    local: tuple[bool, ...] = ()  # which layers see a window only: what the layers repeat, from the first; (): none
    window: int = 0  # of local layers: how many tokens a query sees, itself among them
    local_rotary: Rotary | None = None  # of local layers, where theirs is another
    attention_cap: float | None = None  # attention's scores become cap · tanh(scores / cap), before the mask
    logit_cap: float | None = None  # and the logits
    bare_head: bool = False  # the head reads the last layer's states without the final norm (`early_exit`)
    alibi: bool = False
    position_table: bool = False  # learned absolute positions: nothing beyond max_position_embeddings
    generation_config: str = dataclasses.field(default="", compare=False)  # the checkpoint's file as it was
    lora: Lora = Lora()
    dtype: str = "float32"
    layer_loop: str = "scan"
    decode_kernel: bool = False
    wide_heads: int = 1

    @property
    def embedding_size(self) -> int:
        """Width of the token embedding and of what meets the head; OPT-350m's is not hidden_size."""
        return self.hidden_size

    @property
    def longest(self) -> int | None:
        """The longest sequence that the model can read at all, in tokens; None: no hard end."""
        if self.position_table:
            return self.max_position_embeddings
        if self.rotary is not None and self.rotary.kind in ("dynamic", "longrope"):
            return self.rotary.original_length
        return None

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text: those of config.json, then those of generation_config.json."""
        theirs = json.loads(self.generation_config).get("eos_token_id") if self.generation_config else None
        first = () if self.eos_token_id is None else (self.eos_token_id,)
        return tuple(dict.fromkeys((*first, *self.extra_eos_token_ids, *as_ids(theirs))))

    def is_local(self, layer: int | jax.Array) -> bool | jax.Array:
        """Whether a layer sees a window only: known in Python unless the layers differ and `layer` is traced."""
        if len(set(self.local)) < 2:
            return any(self.local)
        if isinstance(layer, int):
            return self.local[layer % len(self.local)]
        return jnp.asarray(self.local)[layer % len(self.local)]

    def check_length(self, length: int) -> None:
        """Raises UserError where `length` tokens are more than the model can read."""
        if self.longest is not None and length > self.longest:
            reason = "its learned positions end there"
            if self.rotary is not None:
                reason = f"{self.rotary.kind} rope scaling beyond it makes a prefix depend on what follows"
            raise UserError(f"{self.family}: {length} tokens, but the model reads at most {self.longest}: {reason}")


def default_dtype(platform: str = "") -> str:
    """The compute dtype where none is asked for: float32 on CPU, bfloat16 on accelerators. platform: empty: that of
    the devices here."""
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


# Of a config.json, what the transformers class of a family reads in its modelling file to compute a causal model's
# logits (and, in training, their dropout and initial values) is either implemented here (a family's `READ`) or must be
# off (`OFF`, `QUANTIZED`); everything else does not reach the model and is passed over with a line that names it.
# tests/test_hub_configs.py holds these tables against the modelling files that are installed.
READ = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
LOCAL, GLOBAL = "sliding_attention", "full_attention"  # kinds of layers
# Options that a null switches off; any other null is what its absence would be.
OFF_BY_NULL = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
QUANTIZED = ("quantization_config", "compression_config", "quantization")
# What every config says of itself, and nothing about the model: passed over without a word.
BOOKKEEPING = frozenset(
    "_name_or_path architectures auto_map dtype model_type torch_dtype transformers_version use_cache".split()
)


def read_hf(
    config: Mapping[str, Any],
    family: str,
    where: str,
    read: Iterable[str],
    off: Iterable[str] = (),
    older: Mapping[str, str] | None = None,
) -> Any:
    """Transformers' own reading of a config, with its defaults for what the config does not say.

    Args:
      family: the model_type of transformers' class. where: names the config in messages.
      read: options that the family implements, beside READ.
      off: options that change the model and are not implemented.
      older: names that options had in earlier versions → their names now.

    Raises:
      UserError: an option of `off` is on, the weights are quantized, or a value is not of its type.
    """
    cls = config_class(family)
    for name in (*off, *QUANTIZED):
        if config.get(name):
            hint = "; give the unquantized checkpoint" if name in QUANTIZED else ""
            raise UserError(f"{where}: {name} = {_short(config[name])} is not implemented for {family}{hint}")
    read = {*READ, *read}
    older = {"eos_token_ids": "eos_token_id", **cls.attribute_map, **(older or {})}
    kept, passed = {}, []
    for name, value in config.items():
        current = older.get(name, name)
        unsaid = name == "eos_token_ids" and value == 0  # transformers 2.3 wrote so into every config
        if unsaid or current not in read or (current != name and current in config):
            passed += [] if name in BOOKKEEPING or name in off else [name]
        elif value is not None or name.endswith("_token_id") or name in OFF_BY_NULL:
            kept[current] = value
    if passed:
        _say_once(f"{where}: passed over, which {family} does not read: {', '.join(passed)}")
    try:
        return cls(**kept)
    except Exception as error:  # transformers validates with several exception classes of its own
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def head_size(config: Any, where: str) -> int:
    """Of a family whose heads share the width. Raises UserError where they cannot."""
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise UserError(f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return width // heads


def token_ids(config: Any) -> dict[str, Any]:
    """The special tokens' fields, for a family's `from_hf`. A pad token that the vocabulary does not hold is none."""
    eos, pad = as_ids(config.eos_token_id), config.pad_token_id
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if eos else None,
        "extra_eos_token_ids": eos[1:],
        "pad_token_id": pad if pad is not None and 0 <= pad < config.vocab_size else None,
    }


def windows(layer_types: Sequence[str], window: int | None, where: str) -> dict[str, Any]:
    """The fields of local layers from transformers' `layer_types` and `sliding_window`."""
    unknown = set(layer_types) - {LOCAL, GLOBAL}
    if unknown:
        raise UserError(f"{where}: layer_types {sorted(unknown)} are not implemented (known: {LOCAL}, {GLOBAL})")
    local = tuple(kind == LOCAL for kind in layer_types)
    if not window or not any(local):
        return {}
    period = next(p for p in range(1, len(local) + 1) if local[:-p] == local[p:])
    return {"local": local[:period], "window": window}


def layer_types(cfg: ModelConfig) -> list[str]:
    """The inverse of `windows`."""
    return [LOCAL if cfg.is_local(layer) else GLOBAL for layer in range(cfg.num_layers)]


def as_ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    """Token ids of a field that may hold none, one or several."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def token_ids_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `token_ids`."""
    eos = [cfg.eos_token_id, *cfg.extra_eos_token_ids] if cfg.extra_eos_token_ids else cfg.eos_token_id
    return {"bos_token_id": cfg.bos_token_id, "eos_token_id": eos, "pad_token_id": cfg.pad_token_id}


@functools.cache
def _say_once(line: str) -> None:
    """Logs a line; a stage reads one config several times."""
    logging.info("%s", line)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
