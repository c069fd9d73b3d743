"""Log-probabilities of continuations given contexts, under a model or an objective over several: used by perplexity,
MMLU and the harness.

Only continuation positions go through the head, in chunks that bound the memory of their logits.

Axes: F contexts of a batch, B batch rows, T input tokens of a row, S scored tokens before the last, K last tokens of a
row, V vocabulary, D width.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unidetox_jax import devices, models, padded_sizes, sharding
from unidetox_jax.decoding.objective import Objective
from unidetox_jax.errors import UserError
from unidetox_jax.evaluation.generator import Generator, as_generator
from unidetox_jax.evaluation.likelihood_batches import Batch, make_batches, make_families, make_rows
from unidetox_jax.models import Model, ModelConfig, costs
from unidetox_jax.progress import Progress

LOGITS_BYTES = 1 << 28  # of float32 logits at a time, per device
COMPILE_SECONDS = 2.0  # a scan over layers takes as long for any number of layers


class LogLikelihood(NamedTuple):
    """For N requests: sums float64 [N] (nats), greedy bool [N] (all tokens had maximal probability), counts int64 [N]
    (scored tokens), truncated int64 [N] (tokens cut off the context's left)."""

    sums: np.ndarray
    greedy: np.ndarray
    counts: np.ndarray
    truncated: np.ndarray


class Inputs(NamedTuple):
    """The program's inputs beside weights. Tuples have one entry, or one per model if the models have prefixes.

    tokens: int32 [B,T+L], where L is the model's prefix unless it is part of a shared context. spans: int32 [B,2],
    start and number of scored tokens before the last. scored: int32 [B,S]. last: int32 [B,K]. contexts: shared
    contexts, int32 [F,P], and their masks, bool; empty if rows share none.
    """

    tokens: tuple[Any, ...]
    spans: Any
    scored: Any
    last: Any
    contexts: tuple[tuple[Any, Any], ...] = ()


class Shape(NamedTuple):
    """The static part of the program."""

    configs: tuple[ModelConfig, ...]
    prefixes: tuple[int, ...]  # lengths of the models' prefixes in a row's tokens
    chunk: int  # scored positions that go through the head at a time
    group: int = 1  # rows that share a context
    vocab_size: int | None = None  # tokens that have probability; None: all


def loglikelihood(
    model: Model | Generator,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int = 256,
    max_length: int | None = None,
    label: str | None = None,
) -> LogLikelihood:
    """Log p(continuation | context), in float32 on the model's mesh. For a generator, under its objective's
    distribution, where excluded tokens have −inf.

    Args:
      contexts, continuations: N token lists each. An empty continuation has sum 0, count 0, and is greedy.
      batch_size: rows per batch of up to 128 tokens; longer rows come in proportionally smaller batches.
      max_length: longest input in tokens; None: the model's context. Longer requests lose context from the left.
      label: title of a progress bar.

    Raises:
      UserError: an empty context (nothing predicts the first token), a continuation longer than `max_length`, a token
        outside the model's vocabulary, or an objective that needs a context.
    """
    generator = as_generator(model)
    if generator.objective.needs_context:
        raise UserError(f"likelihood: {generator.objective.name} needs a context, so it cannot score given text")
    limit = max_length or generator.cfg.max_position_embeddings
    rows, truncated = make_rows(contexts, continuations, limit, generator.cfg.vocab_size)
    mesh = sharding.mesh_of(generator.params) or sharding.single_device_mesh()
    counts = np.array([len(tokens) for tokens in continuations], np.int64)
    sums, greedy = np.zeros(len(counts)), np.ones(len(counts), bool)

    def collect(batch: Batch, result: tuple[jax.Array, jax.Array]) -> int:
        batch_sums, batch_greedy = (np.asarray(array) for array in result)
        for number, family in enumerate(batch.families):
            for index, row in enumerate(family.rows, number * batch.sizes.group):
                sums[row.owners] = batch_sums[index, : len(row.owners)]
                greedy[row.owners] = batch_greedy[index, : len(row.owners)]
        return sum(len(family.rows) for family in batch.families)

    with Progress(len(rows), "rows", label or "", disable=label is None or jax.process_index() > 0) as bar:
        pending = None  # computed on the device while the host prepares the next batch
        spare = tokens_per_compilation([each.cfg for each in generator.models], mesh)
        for batch in make_batches(make_families(rows), batch_size, limit, sharding.batch_shards(mesh), spare):
            result = _score(generator, mesh, batch)
            if pending is not None:
                bar.update(collect(*pending))
            pending = (batch, result)
        if pending is not None:
            bar.update(collect(*pending))
    return LogLikelihood(sums, greedy, counts, truncated)


def tokens_per_compilation(configs: Sequence[ModelConfig], mesh: Mesh) -> float:
    """How many tokens of padding an evaluation may have to save a program: read in all evaluations, they take about as
    long as compiling it. The same on every host."""
    rate, _ = devices.usual_rates(sharding.device_of(mesh).device_kind)
    seconds = COMPILE_SECONDS / padded_sizes.PROGRAM_USES
    return seconds * rate * mesh.size / sum(costs.forward_flops(cfg, 0) for cfg in configs)


def common_prefix_length(*texts: list[int]) -> int:
    """Number of leading tokens that all texts share, but at least 1, as nothing predicts the first token."""
    return max(1, len(os.path.commonprefix(texts)))  # compares sequences of any kind


def _score(generator: Generator, mesh: Mesh, batch: Batch):
    """Dispatches one batch: sums float32 [B, K], greedy bool [B, K], on every host."""
    rows = [row for family in batch.families for row in family.rows]
    sizes = batch.sizes
    size = sizes.families * sizes.group
    configs = tuple(model.cfg for model in generator.models)
    chunk = chunk_length(configs, mesh, size, sizes.scored)

    scored = np.zeros((size, padded_sizes.round_up(sizes.scored, chunk) if chunk else 0), np.int32)
    last = np.zeros((size, sizes.last), np.int32)
    spans = np.zeros((size, 2), np.int32)  # start, number of scored tokens before the last
    indices = [
        number * sizes.group + index
        for number, family in enumerate(batch.families)
        for index in range(len(family.rows))
    ]
    for index, row in zip(indices, rows, strict=True):
        scored[index, : len(row.scored)] = row.scored
        last[index, : len(row.last)] = row.last
        spans[index] = row.start, len(row.scored)

    to_inputs: list[Any] = [functools.partial(generator.model_input, index) for index in range(len(configs))]
    prefixes = [len(prefix) for prefix in generator.prefixes]
    if not any(prefixes):
        to_inputs, prefixes = to_inputs[:1], prefixes[:1]  # all models read the same
    contexts: list[tuple[np.ndarray, np.ndarray]] = []
    if sizes.context:
        starts = [[(i, to_input(family.prefix)) for i, family in enumerate(batch.families)] for to_input in to_inputs]
        contexts = [_right_padded(*pair, sizes.families, sizes.context) for pair in zip(starts, prefixes, strict=True)]
        to_inputs, prefixes = [list], [0]
    texts = [
        [(index, to_input(row.tokens)) for index, row in zip(indices, rows, strict=True)] for to_input in to_inputs
    ]
    tokens = [_right_padded(*pair, size, sizes.length)[0] for pair in zip(texts, prefixes, strict=True)]
    inputs = Inputs(tuple(tokens), spans, scored, last, tuple(contexts))
    placed = sharding.put(inputs, sharding.batch_sharding(mesh))
    shape = Shape(configs, tuple(prefixes), chunk, sizes.group, generator.vocab_size)
    with jax.set_mesh(mesh):
        return program(mesh)(tuple(model.params for model in generator.models), placed, generator.objective, shape)


def _right_padded(
    texts: Iterable[tuple[int, Any]], prefix: int, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, int32 and bool [rows, prefix + length], of texts given with their row indices."""
    tokens, mask = np.zeros((rows, prefix + length), np.int32), np.zeros((rows, prefix + length), bool)
    for row, text in texts:
        tokens[row, : len(text)] = text
        mask[row, : len(text)] = True
    return tokens, mask


def chunk_length(configs: Sequence[ModelConfig], mesh: Mesh, rows: int, scored_length: int) -> int:
    """Scored positions that go through the head at a time, all or a power of two, such that LOGITS_BYTES suffice."""
    per_device = max(1, rows // sharding.batch_shards(mesh)) * sum(cfg.vocab_size for cfg in configs) * 4
    return min(scored_length, padded_sizes.next_power_of_two(max(1, LOGITS_BYTES // per_device) + 1) // 2)


@functools.cache
def program(mesh: Mesh):
    """The compiled (params of each model, Inputs, objective, Shape) -> sums, greedy [B,K]."""
    return jax.jit(_program_body, static_argnames="shape", out_shardings=sharding.replicated(mesh))


def _program_body(params: tuple[Any, ...], inputs: Inputs, objective: Objective, shape: Shape):
    start, count = inputs.spans[:, 0], inputs.spans[:, 1]
    hidden = [_hidden(params[index], inputs, shape, index) for index in range(len(params))]

    def logits(positions):  # [B, n] → [B, n, V]
        positions = jnp.minimum(positions, hidden[0].shape[1] - 1)
        states = [jnp.take_along_axis(each, positions[..., None], axis=1) for each in hidden]
        per_model = [models.logits(*model) for model in zip(params, states, shape.configs, strict=True)]
        return objective(*(each[..., : shape.vocab_size] for each in per_model))

    def score(positions, targets):  # [B, n], [B, n] → log-probabilities, and whether each is maximal, [B, n]
        return _gather(logits(positions), targets)

    final = logits((start + count)[:, None])  # the position that predicts the last token
    sums, greedy = _gather(jnp.broadcast_to(final, (*inputs.last.shape, final.shape[-1])), inputs.last)
    if (scored := inputs.scored).shape[1]:
        offsets = jnp.arange(scored.shape[1])[None]
        positions = start[:, None] + offsets
        chunks = [jnp.moveaxis(x.reshape(x.shape[0], -1, shape.chunk), 1, 0) for x in (positions, scored)]
        values, maximal = jax.lax.map(lambda chunk: score(*chunk), tuple(chunks))
        values, maximal = (jnp.moveaxis(x, 0, 1).reshape(scored.shape) for x in (values, maximal))
        mask = offsets < count[:, None]
        sums += jnp.sum(jnp.where(mask, values, 0.0), axis=1, keepdims=True)
        greedy &= jnp.all(maximal | ~mask, axis=1, keepdims=True)
    return sums, greedy


def _hidden(params: Any, inputs: Inputs, shape: Shape, index: int) -> jax.Array:
    """A model's states at the rows' tokens, without prefix, [B, T, D]."""
    cfg, prefix = shape.configs[index], shape.prefixes[index % len(shape.prefixes)]
    tokens = inputs.tokens[index % len(inputs.tokens)]
    if not inputs.contexts:  # causal attention hides the padding on the right
        return models.hidden_states(params, tokens, cfg)[:, prefix:]
    context, mask = inputs.contexts[index % len(inputs.contexts)]
    cache = models.init_cache(cfg, *context.shape)
    _, cache = models.prefill(params, context, cfg, cache, mask)
    cache = models.branch_cache(cache, cfg, shape.group, tokens.shape[1])
    return models.extend(params, tokens, cfg, cache)[0]


def _gather(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-softmax at the targets, and whether it is maximal. By comparison instead of indexing, as the vocabulary may
    be sharded."""
    chosen = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    values = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return values - jax.nn.logsumexp(logits, axis=-1), values >= jnp.max(logits, axis=-1)
