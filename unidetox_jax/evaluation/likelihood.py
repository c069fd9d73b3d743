"""Log-probabilities of continuations given contexts, under any model, or any objective over several: the one scorer
behind perplexity, MMLU, harness.

Only continuation positions meet the head, in slices that bound the logits' memory.

Axes: F contexts of a batch, B batch rows, T input tokens of a row, S scored tokens before the last, K last tokens of a
row, V vocabulary, D width.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unidetox_jax import buckets, models, sharding
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.generator import Generator, as_generator
from unidetox_jax.evaluation.likelihood_batches import Batch, batches_of, families_of, rows_of
from unidetox_jax.models import Model, ModelConfig
from unidetox_jax.progress import Progress

LOGITS_BYTES = 1 << 28  # float32 logits held at once, per device


class LogLikelihood(NamedTuple):
    """For N requests: sums float64 [N] (nats), greedy bool [N] (every token was a most probable one), counts int64
    [N] (tokens scored), truncated int64 [N] (tokens cut off the context's left)."""

    sums: np.ndarray
    greedy: np.ndarray
    counts: np.ndarray
    truncated: np.ndarray


class Inputs(NamedTuple):
    """What the program reads beside weights, a tuple with an array for each model where their prefixes differ.

    tokens: int32 [B,T+L], L the model's prefix where the row is read whole. spans: int32 [B,2], start and number of
    scored tokens before the last. scored: int32 [B,S]. last: int32 [B,K]. contexts: what rows share, int32 and bool
    (which are real) [F,P]; empty: nothing.
    """

    tokens: tuple[Any, ...]
    spans: Any
    scored: Any
    last: Any
    contexts: tuple[tuple[Any, Any], ...] = ()


class Shape(NamedTuple):
    """What is static in the program: the models; positions in front of a row's own in each; scored positions that
    meet the head at once; rows that share a context; tokens that have probability (None: all)."""

    configs: tuple[ModelConfig, ...]
    prefixes: tuple[int, ...]
    piece: int
    group: int = 1
    vocab_size: int | None = None


def loglikelihood(
    model: Model | Generator,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int = 256,
    max_length: int | None = None,
    label: str | None = None,
) -> LogLikelihood:
    """Log p(continuation | context), in float32 on the model's own mesh; of a generator, under its objective's
    distribution, by which a token that it excludes has −inf.

    Args:
      contexts, continuations: N token lists each. An empty continuation scores 0, over 0 tokens, greedy.
      batch_size: rows of up to 128 tokens at a time; longer rows come in proportionally smaller batches.
      max_length: the longest input in tokens, None for the model's context. A longer request loses tokens of its
        context, from the left.
      label: shows progress under this name.

    Raises:
      UserError: an empty context (nothing predicts the first token), a continuation longer than `max_length`, a token
        that is not in the model's vocabulary, or an objective that needs more than logits.
    """
    generator = as_generator(model)
    if generator.objective.needs_context:
        raise UserError(f"likelihood: given text has none under {generator.objective.name}, which needs a context")
    limit = max_length or generator.cfg.max_position_embeddings
    rows, truncated = rows_of(contexts, continuations, limit, generator.cfg.vocab_size)
    mesh = sharding.mesh_of(generator.params) or sharding.single_device_mesh()
    counts = np.array([len(tokens) for tokens in continuations], np.int64)
    sums, greedy = np.zeros(len(counts)), np.ones(len(counts), bool)

    def collect(batch: Batch, result: tuple[jax.Array, jax.Array]) -> int:
        found_sums, found_greedy = (np.asarray(array) for array in result)
        for family, members in enumerate(batch.families):
            for index, row in enumerate(members.rows, family * batch.group):
                sums[row.owners] = found_sums[index, : len(row.owners)]
                greedy[row.owners] = found_greedy[index, : len(row.owners)]
        return sum(len(members.rows) for members in batch.families)

    with Progress(len(rows), "rows", label or "", disable=label is None or jax.process_index() > 0) as bar:
        pending = None  # the batch that the device works on while the host makes the next one
        for batch in batches_of(families_of(rows), batch_size, limit, sharding.batch_shards(mesh)):
            result = _score(generator, mesh, batch, limit)
            if pending is not None:
                bar.update(collect(*pending))
            pending = (batch, result)
        if pending is not None:
            bar.update(collect(*pending))
    return LogLikelihood(sums, greedy, counts, truncated)


def shared_beginning(*texts: Sequence[int]) -> int:
    """How many tokens all the texts begin with, but at least 1: nothing predicts the first."""
    shared = 0
    for first, *others in zip(*texts, strict=False):
        if any(token != first for token in others):
            break
        shared += 1
    return max(1, shared)


def _score(generator: Generator, mesh: Mesh, batch: Batch, limit: int):
    """Dispatches one batch: sums float32 [B, K], greedy bool [B, K], on every host."""
    rows = [row for family in batch.families for row in family.rows]
    shared = bool(len(batch.families[0].prefix))
    longest = max(len(row.tokens) for row in rows)
    length = buckets.tail_length(longest) if shared else buckets.text_length(longest, limit)
    most = max(len(row.scored) for row in rows)
    scored_length = buckets.tail_length(most)
    widest = max(len(row.last) for row in rows)
    width = 1 if widest == 1 else max(4, buckets.next_power_of_two(widest))
    size = batch.size * batch.group
    configs = tuple(model.cfg for model in generator.models)
    piece = piece_length(configs, mesh, size, scored_length)
    scored_length = buckets.round_up(scored_length, piece) if piece else 0

    scored = np.zeros((size, scored_length), np.int32)
    last = np.zeros((size, width), np.int32)
    spans = np.zeros((size, 2), np.int32)  # start, number of scored tokens before the last
    places = [
        number * batch.group + index
        for number, family in enumerate(batch.families)
        for index in range(len(family.rows))
    ]
    for place, row in zip(places, rows, strict=True):
        scored[place, : len(row.scored)] = row.scored
        last[place, : len(row.last)] = row.last
        spans[place] = row.start, len(row.scored)

    reads: list[Any] = [functools.partial(generator.model_input, index) for index in range(len(configs))]
    ahead = [len(prefix) for prefix in generator.prefixes]
    if not any(ahead):
        reads, ahead = reads[:1], ahead[:1]  # all models read the same
    contexts: list[tuple[np.ndarray, np.ndarray]] = []
    if shared:
        families = batch.families
        extent = buckets.text_length(max(len(family.prefix) for family in families), limit)
        beginnings = [[(i, read(family.prefix)) for i, family in enumerate(families)] for read in reads]
        contexts = [_filled(some, batch.size, extent + own) for some, own in zip(beginnings, ahead, strict=True)]
        reads, ahead = [list], [0]
    texts = [[(place, read(row.tokens)) for place, row in zip(places, rows, strict=True)] for read in reads]
    tokens = [_filled(some, size, length + own)[0] for some, own in zip(texts, ahead, strict=True)]
    inputs = Inputs(tuple(tokens), spans, scored, last, tuple(contexts))
    placed = sharding.put(inputs, sharding.batch_sharding(mesh))
    shape = Shape(configs, tuple(ahead), piece, batch.group, generator.vocab_size)
    with jax.set_mesh(mesh):
        return program(mesh)(tuple(model.params for model in generator.models), placed, generator.objective, shape)


def _filled(texts: Iterable[tuple[int, Any]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts, each with its row, and which of their tokens are real: int32, bool [rows, length]; padding right."""
    tokens, real = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row, text in texts:
        tokens[row, : len(text)] = text
        real[row, : len(text)] = True
    return tokens, real


def piece_length(configs: Sequence[ModelConfig], mesh: Mesh, rows: int, scored_length: int) -> int:
    """Scored positions that meet the head at once, all or a power of two: LOGITS_BYTES bound their logits."""
    per_device = max(1, rows // sharding.batch_shards(mesh)) * sum(cfg.vocab_size for cfg in configs) * 4
    return min(scored_length, buckets.next_power_of_two(max(1, LOGITS_BYTES // per_device) + 1) // 2)


@functools.cache
def program(mesh: Mesh):
    """The compiled (params of each model, Inputs, objective, Shape) -> sums, greedy [B,K]."""
    return jax.jit(_program_body, static_argnames="shape", out_shardings=sharding.replicated(mesh))


def _program_body(params: tuple[Any, ...], inputs: Inputs, objective: Objective, shape: Shape):
    start, count = inputs.spans[:, 0], inputs.spans[:, 1]
    each = range(len(params))
    hidden = [_hidden(params[index], inputs, shape, index) for index in each]

    def logits(positions):  # [B, n] → [B, n, V]
        positions = jnp.minimum(positions, hidden[0].shape[1] - 1)
        taken = [jnp.take_along_axis(states, positions[..., None], axis=1) for states in hidden]
        found = [models.logits(params[index], taken[index], shape.configs[index]) for index in each]
        return objective(*(one[..., : shape.vocab_size] for one in found))

    def score(positions, targets):  # [B, n], [B, n] → log-probabilities and whether each is the highest, [B, n]
        return _gather(logits(positions), targets)

    final = logits((start + count)[:, None])  # the position that predicts the last token
    sums, greedy = _gather(jnp.broadcast_to(final, (*inputs.last.shape, final.shape[-1])), inputs.last)
    if (scored := inputs.scored).shape[1]:
        offsets = jnp.arange(scored.shape[1])[None]
        positions = start[:, None] + offsets
        pieces = [jnp.moveaxis(x.reshape(x.shape[0], -1, shape.piece), 1, 0) for x in (positions, scored)]
        values, highest = jax.lax.map(lambda piece: score(*piece), tuple(pieces))
        values, highest = (jnp.moveaxis(x, 0, 1).reshape(scored.shape) for x in (values, highest))
        real = offsets < count[:, None]
        sums += jnp.sum(jnp.where(real, values, 0.0), axis=1, keepdims=True)
        greedy &= jnp.all(highest | ~real, axis=1, keepdims=True)
    return sums, greedy


def _hidden(params: Any, inputs: Inputs, shape: Shape, index: int) -> jax.Array:
    """A model's states at the rows' own tokens, [B, T, D]."""
    cfg, ahead = shape.configs[index], shape.prefixes[index % len(shape.prefixes)]
    tokens = inputs.tokens[index % len(inputs.tokens)]
    if not inputs.contexts:  # padding stands right, where causality hides it
        return models.hidden_states(params, tokens, cfg)[:, ahead:]
    context, real = inputs.contexts[index % len(inputs.contexts)]
    cache = models.init_cache(cfg, *context.shape)
    _, cache = models.prefill(params, context, cfg, cache, real)
    cache = models.branch_cache(cache, cfg, shape.group, tokens.shape[1])
    return models.extend(params, tokens, cfg, cache)[0]


def _gather(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-softmax at the targets, and whether no logit is above it. By comparison, not by indexing: the vocabulary may
    be split over devices."""
    chosen = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    values = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return values - jax.nn.logsumexp(logits, axis=-1), values >= jnp.max(logits, axis=-1)
