"""What a model has inside while it decodes: the states of its layers, those of a prompt, those after each of several
next tokens; and the model of its first layers.

Letters: B batch, P tokens of a prompt, L layers, K candidates, V vocabulary. `width` is what meets the head, `hidden`
what the layers pass on; they differ in OPT-350m alone.
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
    """Of one token a row. logits: float32 [B,V]. hidden: [B,width], what meets the head. layers: [B,L+1,hidden], the
    embedding and what each layer passes on, before any final norm."""

    logits: jax.Array
    hidden: jax.Array
    layers: jax.Array


@functools.partial(jax.jit, static_argnames="cfg")
def decode_states(params: Params, token: jax.Array, cfg: ModelConfig, cache: Cache) -> tuple[States, Cache]:
    """`decode_step` with the states that its logits come from: one token int32 [B] more in every row."""
    x, layers, cache = transformer.read(params, token[:, None], cfg, cache, keep=True)
    hidden = transformer.final(params, x, cfg)
    logits = transformer.logits(params, hidden, cfg)
    return States(logits[:, 0], hidden[:, 0], layers[:, :, 0].swapaxes(0, 1)), cache


@functools.partial(jax.jit, static_argnames="cfg")
def prefill_states(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, attention_mask: jax.Array
) -> tuple[jax.Array, Cache]:
    """`prefill` of prompts int32 [B,P] that are padded on the left: what meets the head at every token, [B,P,width]."""
    x, cache = transformer.read_prompt(params, tokens, cfg, cache, attention_mask, last=False)
    return transformer.final(params, x, cfg), cache


@functools.partial(jax.jit, static_argnames="cfg")
def look_ahead(params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache) -> jax.Array:
    """What would meet the head after each of K next tokens, int32 [B,K] → [B,K,width]; the cache stays as it is.

    All K are one batched step, each with a copy of the cache.
    """
    cache = kv.grow_cache(cache, cfg, cache.length + 1)
    cfg = dataclasses.replace(cfg, decode_kernel=False)

    def read(token):
        return transformer.extend(params, token[:, None], cfg, cache)[0][:, 0]

    return jax.vmap(read, in_axes=1, out_axes=1)(tokens)


def early_exit(model: Model, layer: int, norm: bool = False) -> Model:
    """The model of the first `layer` layers with the same head: DoLa's premature layer.

    norm: whether the final norm, which was trained for the last layer, stands before the head. DoLa's authors leave it
    out (Chuang et al., ICLR 2024: their code hands a layer's states to the head as they are).

    Raises:
      ValueError: a layer that the model does not have, or states that do not fit its head without the projection
        between them.
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
