"""Hidden states during decoding, look-ahead over candidate tokens, and early exit.

Axes: B batch, P prompt tokens, L layers, K candidates, V vocabulary. `width` is of the head's input and `hidden` of the
layers' outputs; they differ only in OPT-350m.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax

from unidetox_jax.models import cache as kv
from unidetox_jax.models import transformer
from unidetox_jax.models.cache import Cache
from unidetox_jax.models.config import ModelConfig
from unidetox_jax.models.parameters import Model, Params


class States(NamedTuple):
    """One token's states in every row. logits: float32 [B,V]. hidden: [B,width], the head's input. layers:
    [B,L+1,hidden], the embedding and each layer's output, before the final norm."""

    logits: jax.Array
    hidden: jax.Array
    layers: jax.Array


@functools.partial(jax.jit, static_argnames="cfg")
def decode_states(params: Params, token: jax.Array, cfg: ModelConfig, cache: Cache) -> tuple[States, Cache]:
    """`decode_step`, with all hidden states of the token int32 [B]."""
    x, layers, cache = transformer.extend_layers(params, token[:, None], cfg, cache, all_layers=True)
    hidden = transformer.head_input(params, x, cfg)
    logits = transformer.logits(params, hidden, cfg)
    return States(logits[:, 0], hidden[:, 0], layers[:, :, 0].swapaxes(0, 1)), cache


@functools.partial(jax.jit, static_argnames="cfg")
def prefill_states(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, attention_mask: jax.Array
) -> tuple[jax.Array, Cache]:
    """`prefill` of left-padded prompts int32 [B,P] that returns the head's input at every token, [B,P,width]."""
    x, cache = transformer.prefill_layers(params, tokens, cfg, cache, attention_mask, last=False)
    return transformer.head_input(params, x, cfg), cache


@functools.partial(jax.jit, static_argnames="cfg")
def look_ahead(params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache) -> jax.Array:
    """The head's input after each of K candidate tokens, int32 [B,K] → [B,K,width]; the cache is not changed.

    All K run as one batched step, each with a copy of the cache.
    """
    cache = kv.grow_cache(cache, cfg, cache.length + 1)
    cfg = dataclasses.replace(cfg, decode_kernel=False)

    def step(token):
        return transformer.extend(params, token[:, None], cfg, cache)[0][:, 0]

    return jax.vmap(step, in_axes=1, out_axes=1)(tokens)


def early_exit(model: Model, layer: int, norm: bool = False) -> Model:
    """The first `layer` layers with the model's head: DoLa's premature layer.

    norm: apply the final norm, which was trained for the last layer. DoLa's code does not (Chuang et al., ICLR 2024).

    Raises:
      ValueError: a layer that the model does not have, or, without `norm`, a hidden size that the head does not take.
    """
    params, cfg = model
    if not 1 <= layer <= cfg.num_layers:
        raise ValueError(f"layer {layer}: expected 1 to {cfg.num_layers}")
    if not norm and cfg.embedding_size != cfg.hidden_size:
        raise ValueError(
            f"layer {layer}: its states of {cfg.hidden_size} do not fit a head of {cfg.embedding_size}; expected norm"
        )
    blocks = jax.tree.map(lambda leaf: leaf[:layer], params["blocks"])
    return Model({**params, "blocks": blocks}, dataclasses.replace(cfg, num_layers=layer, skip_final_norm=not norm))
