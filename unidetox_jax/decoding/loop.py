"""The compiled program of one generation: prompts through M models side by side, then one token a row and step.

B batch, V vocabulary, P slots of a model's prompt but its last token, S new tokens that there is room for.

- The loop is several `while_loop`s in a row, one for each segment of cache slots. Before each, the caches grow to
  what that segment needs, so a step reads the keys and values that are live, rounded up to `SEGMENT`, and not
  those of a text's full length. Each writes its caches in place.
- The prompt's last token is read by the loop's first step, not with the rest of the prompt. So there is one place
  where tokens are sampled, and a prompt of one token (BOS) needs no pass of its own.
"""

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unidetox_jax import buckets, models, sharding
from unidetox_jax.decoding import sampling
from unidetox_jax.decoding.context import Context, Prompt
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.errors import UserError
from unidetox_jax.models import Cache, ModelConfig

SEGMENT = 64  # slots: smaller reads less that is not live, larger compiles fewer loops
MANY_ROWS = 128
ROOM = SEGMENT // 8  # what the last segment is rounded up to, and the least that is worth a loop of its own

Logits = tuple[jax.Array, ...]  # float32 [B,V] of each model
Seen = tuple[Any, ...]  # what a step sees of each model: its logits, or its `models.States`


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a program: models, shapes, and what is computed beside the tokens."""

    configs: tuple[ModelConfig, ...]
    prompt_slots: tuple[int, ...]  # P of each model; 0 for prompts of one token
    segments: tuple[int, ...]  # new tokens after each segment; the last is S
    official_cache: bool = False
    log_probabilities: bool = False
    samples: int = 1  # rows that continue each prompt
    vocab_size: int = 0  # tokens that may be sampled, where models have more; 0: all

    @property
    def size(self) -> int:
        """S: the most tokens that a row may get."""
        return self.segments[-1]

    def cache_lengths(self, segment: int) -> tuple[int, ...]:
        """Slots of each model's cache during one segment; rows that share a prompt have it beside theirs."""
        return tuple((slots if self.samples == 1 else 0) + self.segments[segment] for slots in self.prompt_slots)


class Inputs(NamedTuple):
    """What is traced beside parameters and settings. Arrays of JAX or NumPy, or their shapes or shardings."""

    prompts: Any  # int32 [B/samples,P+1] for each model
    masks: Any  # bool [B/samples,P+1] for each model, padding on the left
    row_ids: Any  # int32 [B]
    live: Any  # bool [B]: false for rows that only fill up the batch
    seed: Any  # uint32
    limit: Any  # int32: new tokens wanted, at most S
    eos_ids: Any  # int32 [E]: tokens that end a row
    pad: Any  # int32: what follows the end


class State(NamedTuple):
    """The loop's carry."""

    step: jax.Array  # int32: tokens sampled so far
    last: jax.Array  # int32 [M,B]: the token that each model reads next
    tokens: jax.Array  # int32 [S,B]
    ended: jax.Array  # bool [B]
    lengths: jax.Array  # int32 [B]
    log_probabilities: jax.Array  # float32 [M,B]: sums over a row's tokens; [0,B] where not asked for
    bad: jax.Array  # bool [M+1,B]: a model's logits (last: the scores) are not finite
    caches: tuple[Cache, ...]  # one for each model, or one that all read, or that holds those of all side by side
    memory: Any = None  # the objective's own state


class Output(NamedTuple):
    """What the program returns; rows as given, finished with `pad`."""

    tokens: jax.Array  # int32 [B,S]
    lengths: jax.Array  # int32 [B]
    ended: jax.Array  # bool [B]
    log_probabilities: jax.Array  # float32 [M,B], means; [0,B] where not asked for
    bad: jax.Array  # bool [M+1,B]
    step: jax.Array  # int32


def plan_segments(prompt_slots: int, new_tokens: int, whole: bool = False) -> tuple[int, ...]:
    """Where the segments end, in new tokens, after P slots of prompt: at multiples of `SEGMENT` slots, the last one as
    soon as there is room.

    A first or a last one of less than `ROOM` is joined to its neighbour: a loop takes seconds to compile. whole: one
    segment, for steps that read live slots only.
    """
    if whole:
        return (buckets.round_up(prompt_slots + new_tokens, SEGMENT) - prompt_slots,)
    slots = -(-(prompt_slots + new_tokens) // ROOM) * ROOM
    inner = [end - prompt_slots for end in range(prompt_slots // SEGMENT * SEGMENT + SEGMENT, slots, SEGMENT)]
    return (*(end for end in inner if ROOM <= end <= new_tokens - ROOM), slots - prompt_slots)


@functools.partial(jax.jit, static_argnames="plan")
def program(params: tuple[Any, ...], inputs: Inputs, objective: Objective, warpers: tuple, *, plan: Plan) -> Output:
    """Prompts in, tokens out. Compiled once for each plan, batch and mesh; all settings but shapes are traced.

    params: the trees of `preparation.Prepared`.
    """
    keys, state = begin(params, inputs, objective, plan)

    def advance(state: State) -> State:
        return step(params, keys, state, inputs, objective, warpers, plan)

    if plan.official_cache:  # each model has its own pass over the whole prompt; from then on there is one cache
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


def begin(params: tuple[Any, ...], inputs: Inputs, objective: Objective, plan: Plan) -> tuple[jax.Array, State]:
    """The rows' keys, and the state before the first step."""
    return sampling.row_keys(inputs.seed, inputs.row_ids), _begin(params, inputs, objective, plan)


def step(
    params: tuple[Any, ...], keys, state: State, inputs: Inputs, objective: Objective, warpers, plan: Plan
) -> State:
    """One token more in each row that has not ended."""
    context = None
    if not objective.needs_context:
        logits, caches = _step(params, state, plan, models.decode_step)
    else:
        seen, caches = _step(params, state, plan, models.decode_states)
        logits = tuple(each.logits for each in seen)
        context = _context(params, seen, caches, state, inputs, plan)
    if plan.vocab_size:
        logits = tuple(each[:, : plan.vocab_size] for each in logits)
    return _append_token(logits, context, state, caches, inputs, objective, warpers, keys)


@functools.cache
def program_for(platform: str, rows: int) -> jax.stages.Wrapped:
    """`program` with the options under which a platform decodes so many rows fastest.

    On CPU, XLA gives matrix products to YNNPACK, which packs the weights anew in every step. Its older way, through
    Eigen, takes three quarters of the time for 8 to 64 rows, as long as no matrix has to be read transposed; from 128
    rows on YNNPACK is as fast for large models, and faster for small ones. On GPUs, XLA merges products of the same
    input by joining their weights, anew in every step; those that pay are joined beforehand (`preparation`).
    """
    if platform == "gpu":
        return _with_options(xla_gpu_dot_merger_threshold_mb="0")
    if platform != "cpu" or rows >= MANY_ROWS:
        return program
    return _with_options(xla_cpu_experimental_ynn_fusion_type="")


def _with_options(**options: str) -> jax.stages.Wrapped:
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # an XLA that does not know the option
        return program
    return jax.jit(inspect.unwrap(program), static_argnames="plan", compiler_options=options)


def _begin(params: tuple[Any, ...], inputs: Inputs, objective: Objective, plan: Plan) -> State:
    """Nothing sampled; the prompts but for their last tokens in the caches."""
    batch, count = inputs.row_ids.shape[0], len(plan.configs)

    def fill(tree, model: int) -> tuple[Cache, jax.Array | None]:
        """The cache, and what an objective with context may see of the prompt."""
        cfg, length = plan.configs[model], plan.cache_lengths(0)[model]
        tokens, mask = inputs.prompts[model], inputs.masks[model]
        rows, slots = tokens.shape[0], tokens.shape[1] - 1
        if not slots:
            empty = jnp.zeros((rows, 0, cfg.embedding_size), cfg.dtype) if objective.needs_context else None
            return models.init_cache(cfg, batch, length), empty
        cache = models.init_cache(cfg, rows, length if plan.samples == 1 else slots)
        read = models.prefill_states if objective.needs_context else models.prefill
        seen, cache = read(tree, tokens[:, :-1], cfg, cache, mask[:, :-1])
        seen = seen if objective.needs_context else None
        return cache if plan.samples == 1 else models.branch_cache(cache, cfg, plan.samples, length), seen

    caches: Any
    hidden: Any
    if len(params) < count:  # side by side
        # One after another: cuDNN's attention over a batch of models loses their masks
        stacked, hidden = jax.lax.map(lambda tree: fill(tree, 0), params[0])
        caches = [models.share_cache_masks(stacked)]
    else:
        filled = [fill(tree, model) for model, tree in enumerate(params)]
        caches, hidden = ([each[part] for each in filled] for part in (0, 1))
    memory = None
    if objective.needs_context:
        hidden = tuple(jnp.repeat(each, plan.samples, axis=0) for each in hidden)
        memory = objective.initial_state(Prompt(*_first_prompt(inputs, plan), hidden, plan.size))
    return State(
        step=jnp.zeros((), jnp.int32),
        last=jnp.stack([jnp.repeat(tokens[:, -1], plan.samples) for tokens in inputs.prompts]),
        tokens=jnp.full((plan.size, batch), inputs.pad, jnp.int32),
        ended=~inputs.live,
        lengths=jnp.zeros((batch,), jnp.int32),
        log_probabilities=jnp.zeros((count if plan.log_probabilities else 0, batch), jnp.float32),
        bad=jnp.zeros((count + 1, batch), bool),
        caches=tuple(caches),
        memory=memory,
    )


def _first_prompt(inputs: Inputs, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The first model's prompt in each row, and its mask: int32 and bool [B,P+1]."""
    return jnp.repeat(inputs.prompts[0], plan.samples, axis=0), jnp.repeat(inputs.masks[0], plan.samples, axis=0)


def _context(params: tuple[Any, ...], seen, caches, state: State, inputs: Inputs, plan: Plan) -> Context:
    """What an objective sees; seen: `models.States` of each model."""
    together = len(params) < len(plan.configs)

    def tree(model: int):
        return jax.tree.map(lambda leaf: leaf[model], params[0]) if together else params[model]

    def head(hidden: jax.Array, model: int = 0, norm: bool = False) -> jax.Array:
        cfg, flat = plan.configs[model], hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
        if norm:
            flat = models.head_input(tree(model), flat, cfg)
        if flat.shape[-1] != cfg.embedding_size:
            raise UserError(
                f"context.head: states of {flat.shape[-1]}, the head's are {cfg.embedding_size}; use norm=True"
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
        hidden=tuple(each.hidden for each in seen),
        layers=tuple(each.layers for each in seen),
        state=state.memory,
        head=head,
        look_ahead=look_ahead,
    )


def _continues(state: State, limit: jax.Array) -> jax.Array:
    return (state.step < limit) & jnp.any(~state.ended) & ~jnp.any(state.bad)


def _step(params: tuple[Any, ...], state: State, plan: Plan, read) -> tuple[Seen, tuple[Cache, ...]]:
    """Every model reads its next token by `read`: models.decode_step or models.decode_states."""
    if len(params) < len(plan.configs):
        return _step_side_by_side(params[0], state, plan, read)
    if len(state.caches) < len(params):
        return _step_on_shared_cache(params, state, plan, read)
    steps = [
        read(tree, token, cfg, cache)
        for tree, token, cfg, cache in zip(params, state.last, plan.configs, state.caches, strict=True)
    ]
    return tuple(seen for seen, _ in steps), tuple(cache for _, cache in steps)


def _step_side_by_side(tree: Any, state: State, plan: Plan, read) -> tuple[Seen, tuple[Cache, ...]]:
    """Models of one configuration, which read the same tokens, as one batched model."""
    (cache,), token, cfg = state.caches, state.last[0], plan.configs[0]
    axes = models.cache_axes(branched=cache.prefix is not None)
    step = jax.vmap(lambda tree, cache: read(tree, token, cfg, cache), in_axes=(0, axes), out_axes=(0, axes))
    seen, cache = step(tree, cache)
    parts, structure = jax.tree.flatten(seen)
    return tuple(jax.tree.unflatten(structure, each) for each in zip(*parts, strict=True)), (cache,)


def _step_on_shared_cache(params: tuple[Any, ...], state: State, plan: Plan, read) -> tuple[Seen, tuple[Cache, ...]]:
    """The released code's step: all models attend over the first one's keys and values, and their own of this token.

    The others go first, each writing its key and value into the slot that the next one overwrites, and the first
    model last: what stays is its own, and no cache is copied.
    """
    (cache,) = state.caches
    seen = []
    for tree, token, cfg in reversed(list(zip(params, state.last, plan.configs, strict=True))):
        out, written = read(tree, token, cfg, cache)
        seen.append(out)
        logits = jax.tree.leaves(out)[0]
        # Nothing else tells the compiler that the slot is read before it is overwritten; it would copy every cache.
        after = jnp.maximum(cache.slot, jnp.isnan(logits[0, 0]).astype(jnp.int32) - 1)  # max(slot, 0 or −1) is the slot
        cache = cache._replace(keys=written.keys, values=written.values, slot=after)
    return tuple(reversed(seen)), (written,)


def _append_token(
    logits: Logits, context: Context | None, state: State, caches, inputs: Inputs, objective: Objective, warpers, keys
) -> State:
    """The state with one more token in each row that has not ended."""
    scores, memory = (objective(*logits), None) if context is None else objective(*logits, context=context)
    sampled = sampling.sample(scores, warpers, sampling.step_keys(keys, state.step))
    live = ~state.ended
    token = jnp.where(live, sampled, inputs.pad)
    # A maximum is NaN where any entry is, and −inf where no token is left.
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
        memory=memory,
    )


def _log_probability(logits: jax.Array, token: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, token[:, None], -1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, -1)
