"""BERT and RoBERTa sequence classifiers, for scoring text: an encoder, a first-token head, a logit per label.

Self-contained: an encoder shares next to nothing with the decoders beside it. Layer norms come after the
residual sums. The surprising thing is RoBERTa's positions: they count from `pad_token_id + 1` and skip padding,
so that a table of 514 positions serves 512 tokens. There is no dropout: nothing is trained here.

Axes: B batch, T time, S time looked at, D hidden, H heads, K head size, N labels.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath

from unidetox_jax.errors import UserError
from unidetox_jax.models import keys

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of a sequence classifier. `labels`: names in the order of the logits."""

    family: str  # "bert" or "roberta"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    norm_epsilon: float
    pad_token_id: int
    activation: str
    labels: tuple[str, ...]
    problem_type: str  # as in config.json; "" where it does not say
    dtype: str = "float32"

    @property
    def max_length(self) -> int:
        """The longest text in tokens, special tokens included."""
        offset = self.pad_token_id + 1 if self.family == "roberta" else 0
        return self.max_position_embeddings - offset


def config_from_hf(source: Mapping[str, Any] | epath.PathLike) -> EncoderConfig:
    """The configuration from HF's `config.json`: its dict, the file, or its directory.

    Raises:
      UserError: not a BERT or RoBERTa, or an option that this encoder does not have.
    """
    if isinstance(source, Mapping):
        hf, where = dict(source), "config.json"
    else:
        path = epath.Path(source)
        path = path / "config.json" if path.is_dir() else path
        hf, where = json.loads(path.read_text()), str(path)
    family = hf.get("model_type")
    if family not in ("bert", "roberta"):
        raise UserError(f"{where}: model_type is {family!r}, expected 'bert' or 'roberta'")
    positions = hf.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise UserError(f"{where}: position_embedding_type is {positions!r}, expected 'absolute'")
    if hf.get("is_decoder"):
        raise UserError(f"{where}: is_decoder is true, expected an encoder")
    activation = hf.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    try:
        return EncoderConfig(
            family=family,
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            intermediate_size=hf["intermediate_size"],
            max_position_embeddings=hf["max_position_embeddings"],
            type_vocab_size=hf["type_vocab_size"],
            norm_epsilon=hf.get("layer_norm_eps", 1e-12),
            pad_token_id=hf.get("pad_token_id", 1 if family == "roberta" else 0),
            activation=activation,
            labels=_labels(hf),
            problem_type=hf.get("problem_type") or "",
        )
    except KeyError as error:
        raise UserError(f"{where}: no field {error}") from None


def _labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    names = hf.get("id2label")
    if not names:
        return tuple(f"LABEL_{index}" for index in range(hf.get("num_labels", 2)))
    return tuple(str(names[key]) for key in sorted(names, key=int))


class Embeddings(nn.Module):
    """Token, position and segment embeddings, summed and normalised: int32 [B,T] → [B,T,D]."""

    cfg: EncoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        cfg, D = self.cfg, self.cfg.hidden_size
        if cfg.family == "roberta":
            real = (tokens != cfg.pad_token_id).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + cfg.pad_token_id
        else:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = nn.Embed(cfg.vocab_size, D, dtype=cfg.dtype, name="tokens")(tokens)
        x += nn.Embed(cfg.type_vocab_size, D, dtype=cfg.dtype, name="segments")(jnp.zeros_like(tokens))
        x += nn.Embed(cfg.max_position_embeddings, D, dtype=cfg.dtype, name="positions")(positions)
        return _norm(cfg, "norm")(x)


class Block(nn.Module):
    """One encoder layer: x [B,T,D], mask bool [B,S] of the tokens to look at → [B,T,D]."""

    cfg: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        cfg = self.cfg
        B, T, D = x.shape
        H, K = cfg.num_heads, cfg.hidden_size // cfg.num_heads
        query, key, value = (
            nn.Dense(D, dtype=cfg.dtype, name=name)(x).reshape(B, T, H, K) for name in ("query", "key", "value")
        )
        scores = jnp.einsum("BTHK,BSHK->BHTS", query, key).astype(jnp.float32) / K**0.5
        # finite: a row of padding alone must give numbers, which nobody reads, and not NaN
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("BHTS,BSHK->BTHK", weights, value).reshape(B, T, D)
        x = _norm(cfg, "attention_norm")(x + nn.Dense(D, dtype=cfg.dtype, name="output")(mixed))
        hidden = ACTIVATIONS[cfg.activation](nn.Dense(cfg.intermediate_size, dtype=cfg.dtype, name="up")(x))
        return _norm(cfg, "mlp_norm")(x + nn.Dense(D, dtype=cfg.dtype, name="down")(hidden))


class Head(nn.Module):
    """The first token's state [B,D] → logits [B,N]: dense, tanh, dense in both families."""

    cfg: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Dense(self.cfg.hidden_size, dtype=self.cfg.dtype, name="dense")(x))
        return nn.Dense(len(self.cfg.labels), dtype=self.cfg.dtype, name="labels")(x)


def _norm(cfg: EncoderConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=cfg.norm_epsilon, dtype=cfg.dtype, use_fast_variance=False, name=name)


def init(cfg: EncoderConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters, float32: {"embed", "blocks" (leaves stacked on axis 0), "head"}."""
    embed, blocks, head = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, cfg.hidden_size))

    def one_block(key: jax.Array) -> dict[str, Any]:
        return Block(cfg).init(key, x, jnp.ones((1, 1), bool))["params"]

    return {
        "embed": Embeddings(cfg).init(embed, jnp.zeros((1, 1), jnp.int32))["params"],
        "blocks": jax.vmap(one_block)(jax.random.split(blocks, cfg.num_layers)),
        "head": Head(cfg).init(head, x[:, 0])["params"],
    }


def forward(params: Any, tokens: jax.Array, cfg: EncoderConfig, attention_mask: jax.Array | None = None) -> jax.Array:
    """Logits of every label.

    Args:
      params: as `init` gives it.
      tokens: int32 [B,T], padded on the right with `cfg.pad_token_id`; T at most `cfg.max_length`.
      cfg: static under jit.
      attention_mask: [B,T], nonzero where a token is real; None = every token that is not padding.

    Returns:
      float32 [B,N].
    """
    mask = tokens != cfg.pad_token_id if attention_mask is None else attention_mask.astype(bool)
    x = Embeddings(cfg).apply({"params": params["embed"]}, tokens)
    block = Block(cfg)
    x, _ = jax.lax.scan(lambda x, layer: (block.apply({"params": layer}, x, mask), None), x, params["blocks"])
    return Head(cfg).apply({"params": params["head"]}, x[:, 0]).astype(jnp.float32)


def key_table(cfg: EncoderConfig) -> list[keys.Key]:
    """HF's tensors against our leaves."""
    embeddings, layer = f"{cfg.family}.embeddings.", f"{cfg.family}.encoder.layer.{{layer}}."
    tables = {"word_embeddings": "tokens", "position_embeddings": "positions", "token_type_embeddings": "segments"}
    norms = {
        embeddings + "LayerNorm": "embed/norm",
        layer + "attention.output.LayerNorm": "blocks/attention_norm",
        layer + "output.LayerNorm": "blocks/mlp_norm",
    }
    dense = {
        layer + "attention.self.query": "blocks/query",
        layer + "attention.self.key": "blocks/key",
        layer + "attention.self.value": "blocks/value",
        layer + "attention.output.dense": "blocks/output",
        layer + "intermediate.dense": "blocks/up",
        layer + "output.dense": "blocks/down",
    }
    if cfg.family == "bert":
        dense |= {"bert.pooler.dense": "head/dense", "classifier": "head/labels"}
    else:
        dense |= {"classifier.dense": "head/dense", "classifier.out_proj": "head/labels"}
    table = [keys.same(f"{embeddings}{hf}.weight", f"embed/{ours}/embedding") for hf, ours in tables.items()]
    for hf, ours in norms.items():
        table += keys.norm(hf, ours)
    for hf, ours in dense.items():
        table += [keys.linear(f"{hf}.weight", f"{ours}/kernel"), keys.same(f"{hf}.bias", f"{ours}/bias")]
    return table


def ignored_keys(cfg: EncoderConfig) -> list[str]:
    """Regular expressions of what checkpoints hold beside the parameters: a buffer, heads for other tasks."""
    heads = [r"cls\..*", r"lm_head\..*"] + ([r"roberta\.pooler\..*"] if cfg.family == "roberta" else [])
    return [rf"{cfg.family}\.embeddings\.position_ids", *heads]
