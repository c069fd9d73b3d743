"""Model configurations: frozen and hashable, so that jitted functions can take them as static arguments.

Each family subclasses `ModelConfig` in its own file and converts from and to Hugging Face's config.json.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from unidetox_jax.errors import UserError
from unidetox_jax.models.lazy_transformers import config_class
from unidetox_jax.models.rotary import Rotary
from unidetox_jax.recipe import Lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The settings that all families share.

    `dtype` is the compute dtype; parameters keep their own. `lora` describes the adapter in the parameters, if any.

    Three settings change speed only, not results: `layer_loop` runs the layers by `lax.scan` ("scan") or unrolled
    ("unroll"); `decode_kernel` uses `decode_attention` in decoding steps; `wide_heads` is how many key-value heads a
    cache packs into one (see `wide_heads.py`).
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
    extra_eos_token_ids: tuple[int, ...] = ()  # e.g. Llama 3's instruction models have several
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    rotary: Rotary | None = None
    local: tuple[bool, ...] = ()  # repeating pattern of which layers attend to a sliding window; (): none do
    window: int = 0  # tokens that a query of a local layer attends to, itself included
    local_rotary: Rotary | None = None  # of local layers, if it differs
    attention_cap: float | None = None  # soft cap on attention scores, before the mask: cap · tanh(scores / cap)
    logit_cap: float | None = None  # the same on logits
    skip_final_norm: bool = False  # the head reads the last layer's output directly (`early_exit`)
    alibi: bool = False
    position_table: bool = False  # learned absolute positions, which end at max_position_embeddings
    generation_config: str = dataclasses.field(default="", compare=False)  # content of generation_config.json
    lora: Lora = Lora()
    dtype: str = "float32"
    layer_loop: str = "scan"
    decode_kernel: bool = False
    wide_heads: int = 1

    @property
    def embedding_size(self) -> int:
        """Width of the token embedding and of the head's input; differs from hidden_size in OPT-350m."""
        return self.hidden_size

    @property
    def length_limit(self) -> int | None:
        """The longest sequence that the model can process, in tokens; None: no hard limit."""
        if self.position_table:
            return self.max_position_embeddings
        if self.rotary is not None and self.rotary.kind in ("dynamic", "longrope"):
            return self.rotary.original_max_position_embeddings
        return None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text: those of config.json, then those of generation_config.json."""
        generation = json.loads(self.generation_config or "{}").get("eos_token_id")
        return tuple(dict.fromkeys((*as_ids(self.eos_token_id), *self.extra_eos_token_ids, *as_ids(generation))))

    def is_local(self, layer: int | jax.Array) -> bool | jax.Array:
        """Whether a layer attends to a sliding window: a Python bool unless layers differ and `layer` is traced."""
        if len(set(self.local)) < 2:
            return any(self.local)
        if isinstance(layer, int):
            return self.local[layer % len(self.local)]
        return jnp.asarray(self.local)[layer % len(self.local)]

    def check_length(self, length: int) -> None:
        """Raises UserError if `length` tokens are more than the model can process."""
        if self.length_limit is None or length <= self.length_limit:
            return
        reason = "its learned positions end there"
        if self.rotary is not None:
            reason = f"beyond it, {self.rotary.kind} rope scaling makes a prefix depend on what follows"
        raise UserError(f"{self.family}: {length} tokens, but the model reads at most {self.length_limit}: {reason}")


def default_dtype(platform: str = "") -> str:
    """The default compute dtype: float32 on CPU, bfloat16 on accelerators. An empty platform means JAX's default."""
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


# Every option of a config.json that transformers' modelling file of a family reads (for logits, dropout or initial
# values) is either implemented (a family's `READ`) or must be off (`OFF`, `QUANTIZED`). All other options cannot affect
# the model; they are ignored with one log line. tests/test_hub_configs.py checks these tables against transformers.
COMMON = {"vocab_size": "vocab_size", "tie_word_embeddings": "tie_word_embeddings"}  # option → our field
READ = (*COMMON, "bos_token_id", "eos_token_id", "pad_token_id")
ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
LOCAL, GLOBAL = "sliding_attention", "full_attention"  # transformers' `layer_types`
# Options that null switches off; for all others, null means the default.
OFF_BY_NULL = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
QUANTIZED = ("quantization_config", "compression_config", "quantization")
# Options that say nothing about the model: ignored silently.
BOOKKEEPING = frozenset(
    "_name_or_path architectures auto_map dtype model_type torch_dtype transformers_version use_cache".split()
)


def read_json(source: Mapping[str, Any] | epath.PathLike, where: str = "") -> tuple[Mapping[str, Any], str]:
    """Hugging Face's config and the name that messages give it (`where`, by default its path).

    source: the dictionary, a config.json, or a directory that holds one.

    Raises:
      UserError: the file does not exist or holds no JSON dictionary.
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
    return source, where


def read_hf(
    config: Mapping[str, Any],
    family: str,
    where: str,
    read: Iterable[str],
    off: Iterable[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> Any:
    """The config as transformers' class of the family, which fills in defaults.

    Args:
      family: transformers' model_type. where: names the config in messages.
      read: options that the family implements, beside READ.
      off: options that change the model and are not implemented.
      renamed: option names of earlier versions → current names.

    Raises:
      UserError: an option of `off` is on, the weights are quantized, or a value has the wrong type.
    """
    cls = config_class(family)
    for name in (*off, *QUANTIZED):
        if config.get(name):
            hint = "; give the unquantized checkpoint" if name in QUANTIZED else ""
            raise UserError(f"{where}: {name} = {_short(config[name])} is not implemented for {family}{hint}")
    read = {*READ, *read}
    renamed = {"eos_token_ids": "eos_token_id", **cls.attribute_map, **(renamed or {})}
    options, ignored = {}, []
    for name, value in config.items():
        current = renamed.get(name, name)
        meaningless = name == "eos_token_ids" and value == 0  # transformers 2.3 wrote this into every config
        if meaningless or current not in read or (current != name and current in config):
            ignored += [] if name in BOOKKEEPING or name in off else [name]
        elif value is not None or name.endswith("_token_id") or name in OFF_BY_NULL:
            options[current] = value
    if ignored:
        _log_once(f"{where}: ignored, since {family} does not read them: {', '.join(ignored)}")
    try:
        return cls(**options)
    except Exception as error:  # transformers raises several exception classes of its own
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def from_options(hf: Any, table: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a ModelConfig, by a family's table of transformers' options → our fields beside COMMON's.

    A pad token outside the vocabulary counts as none.
    """
    eos, pad = as_ids(hf.eos_token_id), hf.pad_token_id
    return {
        **{field: getattr(hf, option) for option, field in {**COMMON, **table}.items()},
        "bos_token_id": hf.bos_token_id,
        "eos_token_id": eos[0] if eos else None,
        "extra_eos_token_ids": eos[1:],
        "pad_token_id": pad if pad is not None and 0 <= pad < hf.vocab_size else None,
    }


def to_options(cfg: ModelConfig, table: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `from_options`."""
    eos = [cfg.eos_token_id, *cfg.extra_eos_token_ids] if cfg.extra_eos_token_ids else cfg.eos_token_id
    tokens = {"bos_token_id": cfg.bos_token_id, "eos_token_id": eos, "pad_token_id": cfg.pad_token_id}
    return {**{option: getattr(cfg, field) for option, field in {**COMMON, **table}.items()}, **tokens}


def head_size(config: Any, where: str) -> int:
    """hidden_size / num_attention_heads. Raises UserError if it is not an integer."""
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise UserError(f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return width // heads


def windows(layer_types: Sequence[str], window: int | None, where: str) -> dict[str, Any]:
    """The fields `local` and `window`, from transformers' `layer_types` and `sliding_window`."""
    unknown = set(layer_types) - {LOCAL, GLOBAL}
    if unknown:
        raise UserError(f"{where}: layer_types {sorted(unknown)} are not implemented (known: {LOCAL}, {GLOBAL})")
    local = tuple(kind == LOCAL for kind in layer_types)
    if not window or not any(local):
        return {}
    period = next(p for p in range(1, len(local) + 1) if local[:-p] == local[p:])
    return {"local": local[:period], "window": window}


def windows_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `windows`."""
    layer_types = [LOCAL if cfg.is_local(layer) else GLOBAL for layer in range(cfg.num_layers)]
    return {"sliding_window": cfg.window or None, "layer_types": layer_types}


def as_ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    """Token ids of an option that holds none, one or several."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


@functools.cache
def _log_once(line: str) -> None:
    """Logs a line once per process, since a stage reads the same config several times."""
    logging.info("%s", line)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
