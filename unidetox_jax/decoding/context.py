"""What an objective can see beyond the current logits: a function that declares a `context` argument receives one.

    def no_repeats(base, *, context):
        rows = jnp.arange(len(base))[:, None]
        return base.at[rows, jnp.where(context.tokens_mask, context.tokens, base.shape[1])].set(-jnp.inf, mode="drop")

A stateful objective declares its initial state and returns (scores, state):

    @with_state(lambda prompt: jnp.zeros(len(prompt.tokens)))
    def colder(base, *, context):
        return base * (1 + 0.1 * context.state)[:, None], context.state + 1

Axes: B rows, P longest prompt without its last token, S capacity for new tokens, M models, V vocabulary, L layers,
K candidates; `width` is the size of the states that enter the output head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

INITIAL_STATE = "initial_state"  # attribute of a stateful function
STATIC = {"static": True}  # metadata of dataclass fields that belong to the pytree's structure


class Prompt(NamedTuple):
    """What an initial state is computed from.

    tokens, mask: the first model's prompt, int32 and bool [B,P+1], left-padded. hidden: for each model, the states that
    enter the head for all prompt tokens but the last, [B,P,width]; undefined where the mask is false. room: S.
    """

    tokens: jax.Array
    mask: jax.Array
    hidden: tuple[jax.Array, ...]
    room: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What is known before the next token is sampled. Finished rows are still computed; their scores are ignored.

    Attributes:
      step: int32, number of tokens sampled so far: 0 before the first.
      prompt, prompt_mask: the first model's prompt, int32 and bool [B,P+1], left-padded.
      tokens, tokens_mask: the new tokens so far, int32 and bool [B,S]; the last one may be an end token.
      hidden: for each model, the last token's state that enters the head, [B,width] in its compute dtype; at step 0
        that of the prompt's last token.
      layers: for each model, that token's embedding and every layer's output, [B,L+1,hidden], before any final norm;
        free of cost unless used.
      state: the state returned at the previous step, or the initial one.
      head: (hidden [B,...,width], model=0, norm=False) → one model's logits, float32 [B,...,V]. norm=True applies the
        final norm first, as the outputs of a layer need.
      look_ahead: (tokens int32 [B,K], model=0) → [B,K,width]: the states that would enter the head after each of K
        candidate tokens, at the cost of a step with B·K rows.
    """

    step: jax.Array
    prompt: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    tokens_mask: jax.Array
    hidden: tuple[jax.Array, ...]
    layers: tuple[jax.Array, ...]
    state: Any
    head: Callable[..., jax.Array] = dataclasses.field(metadata=STATIC)
    look_ahead: Callable[..., jax.Array] = dataclasses.field(metadata=STATIC)


def with_state(initial: Callable[[Prompt], Any]) -> Callable[[Callable], Callable]:
    """Declares a stateful objective. `initial` computes a pytree of arrays from a `Prompt`; the function returns the
    next state, of the same shapes and dtypes, beside the scores."""

    def declare(function: Callable) -> Callable:
        setattr(function, INITIAL_STATE, initial)
        return function

    return declare
