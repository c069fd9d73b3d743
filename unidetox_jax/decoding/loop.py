"""The compiled program of a generation: prefill of M models side by side, then one token per row and step.

B batch, V vocabulary, P cache slots for a model's prompt without its last token, S capacity for new tokens.

- The loop is a sequence of `while_loop`s, one per segment of cache slots. Before each, the caches grow to the size that
  the segment needs, so a step reads only live keys and values, rounded up to `SEGMENT`. Caches are updated in place.
- The prompt's last token is read by the loop's first step, not in the prefill. Tokens are thus sampled in one place,
  and a prompt of one token (BOS) needs no prefill.
"""

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unidetox_jax import models, padded_sizes, sharding
from unidetox_jax.decoding import sampling
from unidetox_jax.decoding.context import Context, Prompt
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.errors import UserError
from unidetox_jax.models import Cache, ModelConfig

SEGMENT = 64  # slots: smaller segments read fewer dead slots, larger ones compile fewer loops
ROOM = SEGMENT // 8  # granularity of the last segment's end, and the shortest segment worth a loop

Logits = tuple[jax.Array, ...]  # float32 [B,V] of each model
ModelOutputs = tuple[Any, ...]  # of each model: its logits, or its `models.hidden_states.States`


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a program: models, shapes, and what is computed beside the tokens."""

    configs: tuple[ModelConfig, ...]
    prompt_slots: tuple[int, ...]  # P of each model; 0 for prompts of one token
    segments: tuple[int, ...]  # new tokens at the end of each segment; the last is S
    official_cache: bool = False
    same_weights: bool = False  # one tree for all models, which are read as one with as many rows
    log_probabilities: bool = False
    samples: int = 1  # rows that continue each prompt
    vocab_size: int = 0  # token ids that may be sampled; 0: all

    @property
    def size(self) -> int:
        """S: the most new tokens of a row."""
        return self.segments[-1]

    def cache_lengths(self, segment: int) -> tuple[int, ...]:
        """Slots of each model's cache in a segment; rows that share a prompt keep it in a prefix of its own."""
        return tuple((slots if self.samples == 1 else 0) + self.segments[segment] for slots in self.prompt_slots)


class Inputs(NamedTuple):
    """Traced inputs beside parameters and settings: JAX or NumPy arrays, or their shapes or shardings."""

    prompts: Any  # int32 [B/samples,P+1] for each model
    masks: Any  # bool [B/samples,P+1] for each model, padding on the left
    row_ids: Any  # int32 [B]
    live: Any  # bool [B]: false for padding rows
    seed: Any  # uint32
    limit: Any  # int32: max_new_tokens, at most S
    eos_ids: Any  # int32 [E]: end tokens
    pad: Any  # int32: the token after the end


class State(NamedTuple):
    """The loop's carry."""

    step: jax.Array  # int32: tokens sampled so far
    last: jax.Array  # int32 [M,B]: each model's next input token
    tokens: jax.Array  # int32 [S,B]
    ended: jax.Array  # bool [B]
    lengths: jax.Array  # int32 [B]
    log_probabilities: jax.Array  # float32 [M,B]: sums over a row's tokens; [0,B] unless requested
    bad: jax.Array  # bool [M+1,B]: non-finite logits of each model, and scores (last)
    caches: tuple[Cache, ...]  # one per model, or one: shared, stacked (side by side), or with the rows of all
    objective_state: Any = None


class Output(NamedTuple):
    """The program's result."""

    tokens: jax.Array  # int32 [B,S]
    lengths: jax.Array  # int32 [B]
    ended: jax.Array  # bool [B]
    log_probabilities: jax.Array  # float32 [M,B], means; [0,B] unless requested
    bad: jax.Array  # bool [M+1,B]
    step: jax.Array  # int32


def plan_segments(prompt_slots: int, new_tokens: int, single: bool = False) -> tuple[int, ...]:
    """Ends of the segments, in new tokens after P prompt slots: multiples of `SEGMENT` slots, then the first multiple
    of `ROOM` that fits all tokens.

    A first or last segment shorter than `ROOM` joins its neighbour, as each loop takes seconds to compile. single: only
    one segment, for attention kernels that skip dead slots.
    """
    if single:
        return (padded_sizes.round_up(prompt_slots + new_tokens, SEGMENT) - prompt_slots,)
    slots = -(-(prompt_slots + new_tokens) // ROOM) * ROOM
    inner = [end - prompt_slots for end in range(prompt_slots // SEGMENT * SEGMENT + SEGMENT, slots, SEGMENT)]
    return (*(end for end in inner if ROOM <= end <= new_tokens - ROOM), slots - prompt_slots)


@functools.partial(jax.jit, static_argnames="plan")
def program(params: tuple[Any, ...], inputs: Inputs, objective: Objective, warpers: tuple, *, plan: Plan) -> Output:
    """Prompts in, tokens out. Compiled once per plan, batch size and mesh; numeric settings are traced.

    params: the trees of `preparation.Prepared`.
    """
    keys, state = begin(params, inputs, objective, plan)

    def advance(state: State) -> State:
        return step(params, keys, state, inputs, objective, warpers, plan)

    if plan.official_cache:  # each model prefills the whole prompt; afterwards all use the first one's cache
        state = advance(state)
        state = state._replace(caches=state.caches[:1])
    for segment, end in enumerate(plan.segments):
        lengths = plan.cache_lengths(segment)
        grown = tuple(
            models.grow_cache(cache, cfg, length)
            for cache, cfg, length in zip(state.caches, plan.configs, lengths, strict=False)
        )
        limit = jnp.minimum(inputs.limit, end)
        state = jax.lax.while_loop(functools.partial(_continues, limit=limit), advance, state._replace(caches=grown))
    means = state.log_probabilities / jnp.maximum(state.lengths, 1).astype(jnp.float32)[None]
    output = Output(state.tokens.T, state.lengths, state.ended, means, state.bad, state.step)
    return jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), output)


def step(
    params: tuple[Any, ...], keys, state: State, inputs: Inputs, objective: Objective, warpers, plan: Plan
) -> State:
    """Appends one token to each unfinished row."""
    context = None
    if not objective.needs_context:
        logits, caches = _step(params, state, plan, models.decode_step)
    else:
        states, caches = _step(params, state, plan, models.decode_states)
        logits = tuple(each.logits for each in states)
        context = _context(params, states, caches, state, inputs, plan)
    if plan.vocab_size:
        logits = tuple(each[:, : plan.vocab_size] for each in logits)
    return _append_token(logits, context, state, caches, inputs, objective, warpers, keys)


@functools.cache
def program_for(platform: str) -> jax.stages.Wrapped:
    """`program` with the compiler options that decode fastest on a platform.

    On GPUs, XLA merges products that share an input by concatenating their weights in every step; the merges that pay
    off are done in advance (`preparation`).
    """
    if platform != "gpu":
        return program
    options = {"xla_gpu_dot_merger_threshold_mb": "0"}
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # this XLA does not know the option
        return program
    return jax.jit(inspect.unwrap(program), static_argnames="plan", compiler_options=options)


def begin(params: tuple[Any, ...], inputs: Inputs, objective: Objective, plan: Plan) -> tuple[jax.Array, State]:
    """The rows' random keys, and the state before the first step: prompts without their last tokens in the caches."""
    keys = sampling.row_keys(inputs.seed, inputs.row_ids)
    batch, count = inputs.row_ids.shape[0], len(plan.configs)

    def prefill(tree, model: int, tokens: jax.Array, mask: jax.Array) -> tuple[Cache, jax.Array | None]:
        """The cache, and the prompt's hidden states if the objective needs them."""
        cfg, length = plan.configs[model], plan.cache_lengths(0)[model]
        rows, slots = tokens.shape[0], tokens.shape[1] - 1
        if not slots:
            empty = jnp.zeros((rows, 0, cfg.embedding_size), cfg.dtype) if objective.needs_context else None
            return models.init_cache(cfg, rows * plan.samples, length), empty
        cache = models.init_cache(cfg, rows, length if plan.samples == 1 else slots)
        read = models.prefill_states if objective.needs_context else models.prefill
        output, cache = read(tree, tokens[:, :-1], cfg, cache, mask[:, :-1])
        hidden = output if objective.needs_context else None
        return cache if plan.samples == 1 else models.branch_cache(cache, cfg, plan.samples, length), hidden

    caches: Any
    hidden: Any
    if plan.same_weights:
        cache, hidden = prefill(params[0], 0, _join_rows(inputs.prompts), _join_rows(inputs.masks))
        caches = [cache]
    elif len(params) < count:  # side by side
        # One model after another: cuDNN's attention over a batch of models loses their masks.
        stacked, hidden = jax.lax.map(lambda tree: prefill(tree, 0, inputs.prompts[0], inputs.masks[0]), params[0])
        caches = [models.share_cache_masks(stacked)]
    else:
        each = enumerate(zip(params, inputs.prompts, inputs.masks, strict=True))
        caches, hidden = zip(*(prefill(tree, model, *prompt) for model, (tree, *prompt) in each), strict=True)
    objective_state = None
    if objective.needs_context:
        hidden = tuple(jnp.repeat(each, plan.samples, axis=0) for each in hidden)
        objective_state = objective.initial_state(Prompt(*_first_prompt(inputs, plan), hidden, plan.size))
    state = State(
        step=jnp.zeros((), jnp.int32),
        last=jnp.stack([jnp.repeat(tokens[:, -1], plan.samples) for tokens in inputs.prompts]),
        tokens=jnp.full((plan.size, batch), inputs.pad, jnp.int32),
        ended=~inputs.live,
        lengths=jnp.zeros((batch,), jnp.int32),
        log_probabilities=jnp.zeros((count if plan.log_probabilities else 0, batch), jnp.float32),
        bad=jnp.zeros((count + 1, batch), bool),
        caches=tuple(caches),
        objective_state=objective_state,
    )
    return keys, state


def _first_prompt(inputs: Inputs, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The first model's prompt of each row, and its mask: int32 and bool [B,P+1]."""
    return jnp.repeat(inputs.prompts[0], plan.samples, axis=0), jnp.repeat(inputs.masks[0], plan.samples, axis=0)


def _context(params: tuple[Any, ...], states, caches, state: State, inputs: Inputs, plan: Plan) -> Context:
    """The objective's context; states: `models.hidden_states.States` of each model."""
    together = len(params) < len(plan.configs)

    def tree(model: int):
        return jax.tree.map(lambda leaf: leaf[model], params[0]) if together else params[model]

    def head(hidden: jax.Array, model: int = 0, norm: bool = False) -> jax.Array:
        cfg, flat = plan.configs[model], hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
        if norm:
            flat = models.head_input(tree(model), flat, cfg)
        if flat.shape[-1] != cfg.embedding_size:
            raise UserError(
                f"context.head: found states of width {flat.shape[-1]}, expected {cfg.embedding_size}; use norm=True"
            )
        logits = models.logits(tree(model), flat, cfg)[..., : plan.vocab_size or None]
        return logits.reshape(*hidden.shape[:-1], -1)

    def look_ahead(tokens: jax.Array, model: int = 0) -> jax.Array:
        cache = models.cache_of(caches[0], model) if together else caches[0 if plan.official_cache else model]
        return models.look_ahead(tree(model), tokens, plan.configs[model], cache)

    prompt, prompt_mask = _first_prompt(inputs, plan)
    return Context(
        step=state.step,
        prompt=prompt,
        prompt_mask=prompt_mask,
        tokens=state.tokens.T,
        tokens_mask=jnp.arange(plan.size)[None] < state.lengths[:, None],
        hidden=tuple(each.hidden for each in states),
        layers=tuple(each.layers for each in states),
        state=state.objective_state,
        head=head,
        look_ahead=look_ahead,
    )


def _continues(state: State, limit: jax.Array) -> jax.Array:
    return (state.step < limit) & jnp.any(~state.ended) & ~jnp.any(state.bad)


def _step(params: tuple[Any, ...], state: State, plan: Plan, read) -> tuple[ModelOutputs, tuple[Cache, ...]]:
    """Every model reads its next token with `read`: models.decode_step or models.decode_states."""
    if plan.same_weights:
        tokens = _join_rows(state.last, plan.samples)
        logits, cache = read(params[0], tokens, plan.configs[0], state.caches[0])
        return _split_rows(logits, len(plan.configs), plan.samples), (cache,)
    if len(params) < len(plan.configs):
        return _step_side_by_side(params[0], state, plan, read)
    if len(state.caches) < len(params):
        return _step_on_shared_cache(params, state, plan, read)
    steps = [
        read(tree, token, cfg, cache)
        for tree, token, cfg, cache in zip(params, state.last, plan.configs, state.caches, strict=True)
    ]
    return tuple(output for output, _ in steps), tuple(cache for _, cache in steps)


def _join_rows(rows: Sequence[jax.Array] | jax.Array, samples: int = 1) -> jax.Array:
    """The rows [R·samples,…] of M models as [R·M·samples,…]: a prompt's stay together, so on their device."""
    by_prompt = jnp.stack([x.reshape(-1, samples, *x.shape[1:]) for x in rows], axis=1)
    return by_prompt.reshape(-1, *by_prompt.shape[3:])


def _split_rows(joined: jax.Array, count: int, samples: int) -> tuple[jax.Array, ...]:
    """The rows of each of `count` models: inverse of `_join_rows`."""
    by_prompt = joined.reshape(-1, count, samples, *joined.shape[1:])
    return tuple(by_prompt[:, model].reshape(-1, *joined.shape[1:]) for model in range(count))


def _step_side_by_side(tree: Any, state: State, plan: Plan, read) -> tuple[ModelOutputs, tuple[Cache, ...]]:
    """Models of one configuration that read the same tokens, as one batched model."""
    (cache,), token, cfg = state.caches, state.last[0], plan.configs[0]
    axes = models.cache_axes(branched=cache.prefix is not None)
    step = jax.vmap(lambda tree, cache: read(tree, token, cfg, cache), in_axes=(0, axes), out_axes=(0, axes))
    outputs, cache = step(tree, cache)
    leaves, structure = jax.tree.flatten(outputs)
    return tuple(jax.tree.unflatten(structure, each) for each in zip(*leaves, strict=True)), (cache,)


def _step_on_shared_cache(
    params: tuple[Any, ...], state: State, plan: Plan, read
) -> tuple[ModelOutputs, tuple[Cache, ...]]:
    """The released code's step: all models attend to the first one's keys and values, and to their own of this token.

    The other models go first, each writing its key and value into the slot that the next overwrites, and the first
    model last: its entries remain, and no cache is copied.
    """
    (cache,) = state.caches
    outputs = []
    for tree, token, cfg in reversed(list(zip(params, state.last, plan.configs, strict=True))):
        out, written = read(tree, token, cfg, cache)
        outputs.append(out)
        logits = jax.tree.leaves(out)[0]
        # A data dependency, so that the compiler sees the slot read before it is overwritten; it would copy each cache.
        after = jnp.maximum(cache.slot, jnp.isnan(logits[0, 0]).astype(jnp.int32) - 1)  # max(slot, 0 or −1) = slot
        cache = cache._replace(keys=written.keys, values=written.values, slot=after)
    return tuple(reversed(outputs)), (written,)


def _append_token(
    logits: Logits, context: Context | None, state: State, caches, inputs: Inputs, objective: Objective, warpers, keys
) -> State:
    scores, objective_state = (objective(*logits), None) if context is None else objective(*logits, context=context)
    sampled = sampling.sample(scores, warpers, sampling.step_keys(keys, state.step))
    live = ~state.ended
    token = jnp.where(live, sampled, inputs.pad)
    # The maximum is NaN if any entry is, and −inf if no token is left.
    bad = jnp.stack([~jnp.isfinite(z.max(-1)) for z in (*logits, scores)])
    sums = state.log_probabilities
    if len(sums):
        sums += jnp.where(live[None], jnp.stack([_log_probability(z, sampled) for z in logits]), 0.0)
    return State(
        step=state.step + 1,
        last=jnp.broadcast_to(token, state.last.shape),
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[None], (state.step, jnp.zeros_like(state.step))),
        ended=state.ended | jnp.any(token[:, None] == inputs.eos_ids[None], -1),
        lengths=state.lengths + live.astype(jnp.int32),
        log_probabilities=sums,
        bad=bad & live[None],
        caches=caches,
        objective_state=objective_state,
    )


def _log_probability(logits: jax.Array, token: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, token[:, None], -1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, -1)
