"""What an objective may see beside this step's logits: a function that declares `context` is given one.

    def no_repeats(base, *, context):
        rows = jnp.arange(len(base))[:, None]
        return base.at[rows, jnp.where(context.tokens_mask, context.tokens, base.shape[1])].set(-jnp.inf, mode="drop")

With a state of its own it returns (scores, state) and says what the state is at first:

    @with_state(lambda prompt: jnp.zeros(len(prompt.tokens)))
    def colder(base, *, context):
        return base * (1 + 0.1 * context.state)[:, None], context.state + 1

Letters: B rows, P tokens of the longest prompt but its last, S new tokens that there is room for, M models, V
vocabulary, L layers, K candidates; `width` is that of what meets the head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

STATE = "initial_state"  # the attribute of a function that has a state


class Prompt(NamedTuple):
    """What a first state is made of.

    tokens, mask: the first model's prompt, int32 and bool [B,P+1], padded on the left. hidden: of each model, what met
    the head at every token of its prompt but the last, [B,P,width]; without meaning where the mask is false. room: S.
    """

    tokens: jax.Array
    mask: jax.Array
    hidden: tuple[jax.Array, ...]
    room: int


def _static():
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What is known before a row's next token is drawn. Rows that have ended are still computed, and not looked at.

    Attributes:
      step: int32, how many tokens have been drawn: 0 before the first.
      prompt, prompt_mask: the first model's prompt, int32 and bool [B,P+1], padded on the left.
      tokens, tokens_mask: the new tokens so far, int32 and bool [B,S]; a row's last one may be the end token.
      hidden: of each model, what meets the head now, [B,width] in its compute dtype: the state of the last token so
        far, the prompt's last at step 0.
      layers: of each model, the embedding of that token and what each layer makes of it, [B,L+1,hidden], before any
        final norm; what is not used costs nothing.
      state: what the function returned at the step before, or the state that it declares.
      head: (hidden [B,...,width], model=0, norm=False) → logits float32 [B,...,V] of one model's states; norm: they
        are a layer's, and its final norm goes before.
      look_ahead: (tokens int32 [B,K], model=0) → [B,K,width]: what would meet the head after each of K next tokens. It
        costs a step of B·K rows.
    """

    step: jax.Array
    prompt: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    tokens_mask: jax.Array
    hidden: tuple[jax.Array, ...]
    layers: tuple[jax.Array, ...]
    state: Any
    head: Callable[..., jax.Array] = _static()
    look_ahead: Callable[..., jax.Array] = _static()


def with_state(initial: Callable[[Prompt], Any]) -> Callable[[Callable], Callable]:
    """Declares an objective's state: `initial` makes a pytree of arrays of a `Prompt`, and the function returns its
    next one, of the same shapes and dtypes, beside the scores."""

    def declare(function: Callable) -> Callable:
        setattr(function, STATE, initial)
        return function

    return declare
