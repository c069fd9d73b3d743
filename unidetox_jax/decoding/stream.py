"""`stream`: `generate` one token at a time, to show a text while it is written.

The host runs one compiled program per step and reads each token before it starts the next step; the tokens equal those
of `generate`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unidetox_jax.decoding import loop
from unidetox_jax.decoding import warpers as warpers_
from unidetox_jax.decoding.generate import check_finite, make_request
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.decoding.preparation import mesh_context
from unidetox_jax.decoding.warpers import Warper
from unidetox_jax.models import Model

_begin = jax.jit(loop.begin, static_argnames="plan")
_step = jax.jit(loop.step, static_argnames="plan", donate_argnames="state")


class Token(NamedTuple):
    """One token of each of B rows, as NumPy arrays.

    ids: int32 [B], pad in finished rows. live: bool [B], whether the row was unfinished. log_probabilities: float32
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
    """Yields every row's next token until all rows have ended or have `max_new_tokens`.

    Arguments and errors are those of `generate`. layer_loop: scan compiles five times faster than unroll.
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
    plan = dataclasses.replace(request.plan, segments=request.plan.segments[-1:])  # one cache size: one program
    in_order, batch = warpers_.in_order(warpers), request.batch
    with mesh_context(request.mesh):
        keys, state = _begin(request.params, request.inputs, objective, plan=plan)
    sums = np.zeros((len(models), batch), np.float32)
    for index in range(max_new_tokens):
        live = ~np.asarray(state.ended)[:batch]
        if not live.any():
            return
        with mesh_context(request.mesh):
            state = _step(request.params, keys, state, request.inputs, objective, in_order, plan=plan)
        check_finite(np.asarray(state.bad)[:, :batch], state.step, objective)
        before, sums = sums, np.asarray(state.log_probabilities)[:, :batch]
        yield Token(np.asarray(state.tokens)[index, :batch], live, sums - before)
