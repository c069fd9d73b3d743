"""`stream`: `generate` a token at a time, for whoever wants to see a text while it is written.

A step is a program of its own here, called by the host, which reads each token before it asks for the next; the tokens
are those of `generate`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unidetox_jax.decoding import loop
from unidetox_jax.decoding import warpers as warpers_
from unidetox_jax.decoding.generate import check_numbers, make_request
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.decoding.preparation import use
from unidetox_jax.decoding.warpers import Warper
from unidetox_jax.models import Model

_begin = jax.jit(loop.begin, static_argnames="plan")
_step = jax.jit(loop.step, static_argnames="plan", donate_argnames="state")


class Token(NamedTuple):
    """One token of each of B rows; NumPy arrays.

    ids: int32 [B], pad in a row that ended before. live: bool [B], whether a row got one. log_probabilities: float32
    [M,B], the token's under each model alone (untruncated).
    """

    ids: np.ndarray
    live: np.ndarray
    log_probabilities: np.ndarray


def stream(
    models: Sequence[Model],
    prompts: Any,
    *,
    objective: Objective,
    warpers: Sequence[Warper] = (),
    max_new_tokens: int,
    layer_loop: str = "scan",
    **settings: Any,
) -> Iterator[Token]:
    """Yields the next token of every row until all have ended or have `max_new_tokens`.

    Args: those of `generate`, settings as well. layer_loop: a scan compiles in a fifth of the time.

    Raises:
      UserError: as `generate`.
    """
    request = make_request(
        models,
        prompts,
        objective=objective,
        max_new_tokens=max_new_tokens,
        log_probabilities=True,
        layer_loop=layer_loop,
        **settings,
    )
    plan = dataclasses.replace(request.plan, segments=request.plan.segments[-1:])  # one size of caches: one program
    in_order, batch = warpers_.in_order(warpers), request.batch
    with use(request.mesh):
        keys, state = _begin(request.params, request.inputs, objective, plan=plan)
    sums = np.zeros((len(models), batch), np.float32)
    for index in range(max_new_tokens):
        live = ~np.asarray(state.ended)[:batch]
        if not live.any():
            return
        with use(request.mesh):
            state = _step(request.params, keys, state, request.inputs, objective, in_order, plan=plan)
        check_numbers(np.asarray(state.bad)[:, :batch], state.step, objective)
        before, sums = sums, np.asarray(state.log_probabilities)[:, :batch]
        yield Token(np.asarray(state.tokens)[index, :batch], live, sums - before)
