"""Sequence classifiers that score text: BERT, RoBERTa, XLM-R and DistilBERT, encoders with a first-token head.

Bidirectional attention, post-norm, and no dropout, since nothing is trained here. `KINDS` lists how the four differ:
names of options and tensors, the head's activation, and positions. RoBERTa counts these from `pad_token_id + 1`,
skipping padding, so that 514 of them serve 512 tokens.

Axes: B batch, T time, D hidden, N labels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from unidetox_jax.errors import UserError, suggest
from unidetox_jax.models.attention import attention
from unidetox_jax.models.config import ModelConfig, head_size, read_json
from unidetox_jax.models.key_tables import Key, heads_in, heads_out, linear, norm, reshaped, same
from unidetox_jax.models.layers import ACTIVATIONS, Attention, FeedForward, dense, embedding, layer_norm, precision
from unidetox_jax.models.lazy_transformers import config_class

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


class Kind(NamedTuple):
    """A published encoder's names: of a layer's `MODULES`, of the head's two linear layers, of options."""

    prefix: str
    layers: str
    modules: tuple[str, ...]
    head: tuple[str, str]
    head_activation: str = "tanh"
    mlp_options: tuple[str, str] = ("intermediate_size", "hidden_act")  # the feed-forward's width and activation
    positions_skip_padding: bool = False  # and count from pad_token_id + 1


MODULES = ("query", "key", "value", "output", "attention_norm", "up", "down", "mlp_norm")
_BERT = (
    *(f"attention.self.{name}" for name in MODULES[:3]),
    *("attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
)
_DISTILBERT = (
    *(f"attention.{name}_lin" for name in ("q", "k", "v", "out")),
    *("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
)
_ROBERTA = Kind(
    "roberta", "encoder.layer", _BERT, ("classifier.dense", "classifier.out_proj"), positions_skip_padding=True
)
KINDS = {
    "bert": Kind("bert", "encoder.layer", _BERT, ("bert.pooler.dense", "classifier")),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Kind(
        *("distilbert", "transformer.layer", _DISTILBERT, ("pre_classifier", "classifier"), "relu"),
        ("hidden_dim", "activation"),
    ),
}
PREFIX = ""
# Buffers, the pooler of a RoBERTa base model, and heads for other tasks
IGNORED = (
    r".*embeddings\.(position|token_type)_ids",
    r"roberta\.pooler\..*",
    r"(cls|lm_head|vocab_\w+|qa_outputs)\..*",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """A sequence classifier. `labels`: names in the order of the logits. `problem_type`: SINGLE, MULTI, REGRESSION."""

    family: str  # type: ignore[misc]  # one of KINDS; other families have a class each
    pad_token_id: int = 0
    token_types: int  # 0: none
    labels: tuple[str, ...]
    problem_type: str

    @property
    def length_limit(self) -> int:
        """The longest text in tokens, including special tokens."""
        offset = self.pad_token_id + 1 if KINDS[self.family].positions_skip_padding else 0
        return self.max_position_embeddings - offset


def from_hf(source: Mapping[str, Any] | epath.PathLike) -> EncoderConfig:
    """The configuration from Hugging Face's `config.json`: its dictionary, the file, or its directory.

    Without a problem_type, two labels are taken as mutually exclusive and more as independent (which is logged).

    Raises:
      UserError: none of KINDS, or an option that is not implemented.
    """
    config, where = read_json(source)
    name = config.get("model_type")
    if name not in KINDS:
        raise UserError(f"{where}: a classifier of model_type {name!r} is not implemented (known: {', '.join(KINDS)})")
    for option, expected in (
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
        ("quantization_config", {}),
    ):
        if config.get(option) not in (None, expected):
            raise UserError(f"{where}: {option} is {config[option]!r}, expected {expected!r}")
    try:
        hf = config_class(name).from_dict(config)
    except Exception as error:  # transformers raises several exception classes of its own
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    width, activation = (getattr(hf, option) for option in KINDS[name].mlp_options)
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}: activation {activation!r} is not implemented{suggest(str(activation), ACTIVATIONS)}")
    if hf.problem_type not in (None, SINGLE, MULTI, REGRESSION):
        raise UserError(f"{where}: problem_type is {hf.problem_type!r}, expected {SINGLE}, {MULTI} or {REGRESSION}")
    if not hf.problem_type and hf.num_labels > 2:
        logging.warning("%s: no problem_type; its %d labels are taken not to exclude each other", where, hf.num_labels)
    pad = config_class(name)().pad_token_id if hf.pad_token_id is None else hf.pad_token_id
    if pad >= hf.vocab_size:
        raise UserError(f"{where}: pad_token_id is {pad}, expected a token below vocab_size {hf.vocab_size}")
    return EncoderConfig(
        family=name,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_attention_heads,
        head_size=head_size(hf, where),
        intermediate_size=width,
        max_position_embeddings=hf.max_position_embeddings,
        activation=activation,
        norm_epsilon=getattr(hf, "layer_norm_eps", 1e-12),
        tie_word_embeddings=False,
        pad_token_id=pad,
        token_types=getattr(hf, "type_vocab_size", 0),
        labels=tuple(str(hf.id2label[index]) for index in sorted(hf.id2label)),
        problem_type=hf.problem_type or (SINGLE if hf.num_labels == 2 else MULTI),
    )


class Embed(nn.Module):
    """The normalised sum of token, segment (all 0) and position embeddings: int32 [B,T] → [B,T,D]."""

    cfg: EncoderConfig

    @nn.compact
    def __call__(self, tokens, positions, deterministic: bool):
        cfg = self.cfg
        x = embedding(cfg, cfg.vocab_size, cfg.hidden_size, "tokens")(tokens)
        if cfg.token_types:
            x += embedding(cfg, cfg.token_types, cfg.hidden_size, "segments")(jnp.zeros_like(tokens))
        x += embedding(cfg, cfg.max_position_embeddings, cfg.hidden_size, "positions")(positions)
        return layer_norm(cfg, "norm")(x)


class Block(nn.Module):
    """One layer: [B,T,D] → ([B,T,D], state of attend)."""

    cfg: EncoderConfig

    @nn.compact
    def __call__(self, x, attend, rotary, layer, deterministic: bool):
        cfg = self.cfg
        out, state = Attention(cfg, True, True, name="attention")(x, attend, None, cfg.head_size**-0.5, True)
        x = layer_norm(cfg, "attention_norm")(x + out)
        return layer_norm(cfg, "mlp_norm")(x + FeedForward(cfg, bias=True, name="mlp")(x)), state


class Final(nn.Module):
    """The head: the first token's state [B,…,D] → logits [B,…,N]."""

    cfg: EncoderConfig

    @nn.compact
    def __call__(self, x):
        x = dense(self.cfg, self.cfg.hidden_size, "dense", bias=True)(x)
        return dense(self.cfg, len(self.cfg.labels), "labels", bias=True)(
            ACTIVATIONS[KINDS[self.cfg.family].head_activation](x)
        )


def forward(params: Any, tokens: jax.Array, cfg: EncoderConfig, mask: jax.Array) -> jax.Array:
    """Logits of every label, float32 [B,N].

    Args:
      params: as from `models.init`.
      tokens: int32 [B,T], padded on the right; T at most `cfg.length_limit`.
      cfg: static under jit.
      mask: [B,T], nonzero where a token is real.
    """
    cfg.check_length(tokens.shape[1])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if KINDS[cfg.family].positions_skip_padding:
        real = (tokens != cfg.pad_token_id).astype(jnp.int32)
        positions = jnp.cumsum(real, axis=1) * real + cfg.pad_token_id
    visible = jnp.broadcast_to(mask.astype(bool)[:, None], (*tokens.shape, tokens.shape[1]))

    def attend(query, key, value, dropout):
        return attention(query, key, value, visible, precision=precision(cfg.dtype)), None

    def layer(x, block):
        return Block(cfg).apply({"params": block}, x, attend, None, 0, True)

    x: Any = Embed(cfg).apply({"params": params["embed"]}, tokens, positions, True)
    x, _ = jax.lax.scan(layer, x, params["blocks"])
    logits: Any = Final(cfg).apply({"params": params["final"]}, x[:, 0])
    return logits.astype(jnp.float32)


def key_table(cfg: EncoderConfig) -> list[Key]:
    """Hugging Face's tensors and ours."""
    kind, heads, size = KINDS[cfg.family], cfg.num_heads, cfg.head_size
    embeddings = f"{kind.prefix}.embeddings"
    names = {
        ours: f"{kind.prefix}.{kind.layers}.{{layer}}.{theirs}"
        for ours, theirs in zip(MODULES, kind.modules, strict=True)
    }
    table = [
        same(f"{embeddings}.word_embeddings.weight", "embed/tokens/embedding"),
        same(f"{embeddings}.position_embeddings.weight", "embed/positions/embedding"),
        *norm(f"{embeddings}.LayerNorm", "embed/norm"),
    ]
    if cfg.token_types:
        table.append(same(f"{embeddings}.token_type_embeddings.weight", "embed/segments/embedding"))
    for module in ("query", "key", "value"):
        table.append(heads_in(f"{names[module]}.weight", f"blocks/attention/{module}/kernel", heads, size))
        table.append(reshaped(f"{names[module]}.bias", f"blocks/attention/{module}/bias", (-1,), (heads, size)))
    table.append(heads_out(f"{names['output']}.weight", "blocks/attention/output/kernel", heads, size))
    table.append(same(f"{names['output']}.bias", "blocks/attention/output/bias"))
    for module in ("attention_norm", "mlp_norm"):
        table += norm(names[module], f"blocks/{module}")
    feed_forward = {names["up"]: "blocks/mlp/up", names["down"]: "blocks/mlp/down"}
    for theirs, ours in {**feed_forward, kind.head[0]: "final/dense", kind.head[1]: "final/labels"}.items():
        table += [linear(f"{theirs}.weight", f"{ours}/kernel"), same(f"{theirs}.bias", f"{ours}/bias")]
    return table
