"""What a model is, as frozen values: hashable, so that a jitted function may take one as a static argument.

A family subclasses `ModelConfig` in its own file with what is only its own, and reads and writes Hugging Face's form.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unidetox_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021) and how a checkpoint stretches it.

    kind: "default", "linear", "llama3" or "dynamic" (exact up to `original_length`, refused beyond).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 0

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any] | None, length: int, where: str) -> "Rotary":
        """From transformers 5's `rope_parameters`; `length`: the config's max_position_embeddings."""
        parameters = dict(parameters or {})
        kind = parameters.pop("rope_type", parameters.pop("type", None)) or "default"
        known = {
            "default": (),
            "linear": ("factor",),
            "dynamic": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        if kind not in known:
            raise UserError(f"{where}: rope_type {kind!r} is not implemented (known: {', '.join(known)})")
        missing = [name for name in known[kind] if name not in parameters]
        if missing:
            raise UserError(f"{where}: rope_type {kind!r} needs {', '.join(missing)}")
        inert = {"type", "rope_theta", "original_max_position_embeddings", *known[kind]}
        surplus = [name for name, value in parameters.items() if name not in inert and value is not None]
        if surplus and not (surplus == ["partial_rotary_factor"] and parameters["partial_rotary_factor"] == 1.0):
            raise UserError(f"{where}: rope option {surplus[0]!r} is not implemented for rope_type {kind!r}")
        return cls(
            theta=float(parameters.get("rope_theta") or 10000.0),
            kind=kind,
            factor=float(parameters.get("factor", 1.0)),
            low_frequency_factor=float(parameters.get("low_freq_factor", 1.0)),
            high_frequency_factor=float(parameters.get("high_freq_factor", 4.0)),
            original_length=int(parameters.get("original_max_position_embeddings") or length),
        )

    def to_hf(self) -> dict[str, Any]:
        """`rope_theta` and `rope_scaling`: the form that transformers 4 and 5 both read."""
        scaling: dict[str, Any] | None = None
        if self.kind != "default":
            scaling = {"rope_type": self.kind, "factor": self.factor}
        if self.kind == "llama3":
            scaling["low_freq_factor"] = self.low_frequency_factor
            scaling["high_freq_factor"] = self.high_frequency_factor
            scaling["original_max_position_embeddings"] = self.original_length
        return {"rope_theta": self.theta, "rope_scaling": scaling}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every family has.

    `dtype` is the compute dtype; parameters keep theirs. `layer_loop` runs the layers by `lax.scan` ("scan") or one
    after another ("unroll"); it changes speed and compile time, not the result.
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
    alibi: bool = False
    position_table: bool = False  # learned absolute positions: nothing beyond max_position_embeddings
    dtype: str = "float32"
    layer_loop: str = "scan"

    @property
    def embedding_size(self) -> int:
        """Width of the token embedding and of what meets the head; OPT-350m's is not hidden_size."""
        return self.hidden_size

    @property
    def longest(self) -> int | None:
        """The longest sequence that the model can read at all, in tokens; None: no hard end."""
        if self.position_table:
            return self.max_position_embeddings
        if self.rotary is not None and self.rotary.kind == "dynamic":
            return self.rotary.original_length
        return None

    def check_length(self, length: int) -> None:
        """Raises UserError where `length` tokens are more than the model can read."""
        if self.longest is not None and length > self.longest:
            reason = "its learned positions end there"
            if not self.position_table:
                reason = "dynamic rope scaling beyond it makes a prefix depend on what follows"
            raise UserError(f"{self.family}: {length} tokens, but the model reads at most {self.longest}: {reason}")


def default_dtype() -> str:
    """The compute dtype where none is asked for: float32 on CPU, bfloat16 on accelerators."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


SHARED = frozenset("tie_word_embeddings bos_token_id eos_token_id pad_token_id architectures".split())
# Keys of a hub's config.json that do not change what the model computes, or that the family reads elsewhere.
INERT = frozenset(
    "_name_or_path auto_map dtype gradient_checkpointing model_type n_ctx prefix pretraining_tp quantization "
    "task_specific_params torch_dtype transformers_version use_cache attn_implementation _attn_implementation "
    "rope_theta rope_scaling rope_parameters layerdrop activation_dropout".split()
)


def read_hf(config: Mapping[str, Any], known: Iterable[str], where: str) -> PreTrainedConfig:
    """Transformers' own reading of a config (defaults and older names filled in), after a check of its options.

    `known`: options that the family implements. An option that is neither known nor inert is refused by name unless
    it is off (false, null, zero, empty), which is what its absence would mean.
    """
    kind = config["model_type"]
    cls = CONFIG_MAPPING[kind]
    names = {**{name: name for name in known}, **getattr(cls, "attribute_map", {})}
    shared = set(PreTrainedConfig().to_dict()) | SHARED | INERT
    accepted = shared | set(names) | set(names.values())
    for name, value in config.items():
        if name == "quantization_config" and value:
            raise UserError(f"{where}: quantization_config is not implemented; give the unquantized checkpoint")
        if name not in accepted and value not in (None, False, 0, 0.0, "", [], {}):
            raise UserError(f"{where}: option {name!r} = {value!r} is not implemented for {kind}")
    try:
        return cls.from_dict({key: value for key, value in config.items() if key != "quantization_config"})
    except Exception as error:  # transformers validates with several exception classes of its own
        raise UserError(f"{where}: {error}") from error


def token_ids(config: PreTrainedConfig) -> dict[str, Any]:
    """The special tokens' fields, for a family's `from_hf`."""
    eos = config.eos_token_id
    several = list(eos) if isinstance(eos, list | tuple) else [eos]
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": several[0],
        "extra_eos_token_ids": tuple(several[1:]),
        "pad_token_id": config.pad_token_id,
    }


def token_ids_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `token_ids`."""
    eos = [cfg.eos_token_id, *cfg.extra_eos_token_ids] if cfg.extra_eos_token_ids else cfg.eos_token_id
    return {"bos_token_id": cfg.bos_token_id, "eos_token_id": eos, "pad_token_id": cfg.pad_token_id}
