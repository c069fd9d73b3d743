"""Log-probabilities of continuations given contexts, under any model: the one scorer behind perplexity, MMLU, harness.

Requests are sorted by length and cut into batches of few shapes; only continuation positions meet the head, in
slices that bound the logits' memory. Nothing is read twice: requests that differ in their last token alone (the
letters of a multiple choice) share one row of the batch, and rows that go on from one context (a prompt's 25 samples,
a question's answers) share one pass over it.

Axes: F contexts of a batch, B batch rows, T input tokens of a row, S scored tokens before the last, K last tokens of a
row, V vocabulary, D width.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unidetox_jax import buckets, models, sharding
from unidetox_jax.errors import UserError
from unidetox_jax.models import Model, ModelConfig
from unidetox_jax.progress import Progress

LOGITS_BYTES = 1 << 28  # float32 logits held at once, per device
FULL_BATCH_LENGTH = 128  # rows of up to this many tokens come in batches of batch_size; longer ones in smaller ones
MOST_LAST_TOKENS = 32  # requests that share a row
FEWEST_SHARING = 3  # rows that share a context's pass: fewer, or …
SHORTEST_SHARED = 16  # … shorter contexts are not worth a program of their own


class LogLikelihood(NamedTuple):
    """For N requests: sums float64 [N] (nats), greedy bool [N] (every token was a most probable one), counts int64
    [N] (tokens scored), truncated int64 [N] (tokens cut off the context's left)."""

    sums: np.ndarray
    greedy: np.ndarray
    counts: np.ndarray
    truncated: np.ndarray


class _Row(NamedTuple):
    """One row of a batch: `tokens` is the input, `start` the position that predicts the first scored token, `scored`
    the scored tokens but the last, `last` the candidates for the last, `owners` the requests they belong to."""

    tokens: np.ndarray
    start: int
    scored: np.ndarray
    last: list[int]
    owners: list[int]


class _Family(NamedTuple):
    """Rows that go on from one `prefix`, read once; an empty prefix: one row, read whole."""

    prefix: np.ndarray
    rows: list[_Row]


class _Batch(NamedTuple):
    """What one program computes: families of up to `group` rows, filled up to `size` families."""

    families: list[_Family]
    group: int
    size: int


def loglikelihood(
    model: Model,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int = 256,
    max_length: int | None = None,
    label: str | None = None,
) -> LogLikelihood:
    """Log p(continuation | context), in float32 on the model's own mesh.

    Args:
      contexts, continuations: N token lists each. An empty continuation scores 0, over 0 tokens, greedy.
      batch_size: rows of up to 128 tokens at a time; longer rows come in proportionally smaller batches.
      max_length: the longest input in tokens, None for the model's context. A longer request loses tokens of its
        context, from the left.
      label: shows progress under this name.

    Raises:
      UserError: an empty context (nothing predicts the first token), a continuation longer than `max_length`, or a
        token that is not in the model's vocabulary.
    """
    limit = max_length or model.cfg.max_position_embeddings
    rows, truncated = _rows(contexts, continuations, limit, model.cfg.vocab_size)
    mesh = sharding.mesh_of(model.params) or sharding.single_device_mesh()
    counts = np.array([len(tokens) for tokens in continuations], np.int64)
    sums, greedy = np.zeros(len(counts)), np.ones(len(counts), bool)

    def collect(batch: _Batch, result: tuple[jax.Array, jax.Array]) -> int:
        found_sums, found_greedy = (np.asarray(array) for array in result)
        for family, members in enumerate(batch.families):
            for index, row in enumerate(members.rows, family * batch.group):
                sums[row.owners] = found_sums[index, : len(row.owners)]
                greedy[row.owners] = found_greedy[index, : len(row.owners)]
        return sum(len(members.rows) for members in batch.families)

    with Progress(len(rows), "rows", label or "", disable=label is None or jax.process_index() > 0) as bar:
        pending = None  # the batch that the device works on while the host makes the next one
        for batch in _batches(_families(rows), batch_size, limit, sharding.batch_shards(mesh)):
            result = _score(model, mesh, batch, limit)
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


def _rows(contexts, continuations, limit: int, vocab_size: int) -> tuple[list[_Row], np.ndarray]:
    rows: dict[tuple[bytes, int], list[_Row]] = {}
    truncated = np.zeros(len(continuations), np.int64)
    for index, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        if not len(continuation):
            continue
        if not len(context):
            raise UserError(f"likelihood: request {index} has an empty context, so nothing predicts its first token")
        excess = max(0, len(context) + len(continuation) - 1 - limit)
        if excess >= len(context):
            raise UserError(
                f"likelihood: request {index} has a continuation of {len(continuation)} tokens, the model reads {limit}"
            )
        truncated[index] = excess
        tokens = np.array([*context[excess:], *continuation[:-1]], np.int32)
        if (largest := max(int(tokens.max()), int(continuation[-1]))) >= vocab_size:
            raise UserError(
                f"likelihood: request {index} has token {largest}, but the model's vocabulary has {vocab_size} tokens"
            )
        shared = rows.setdefault((tokens.tobytes(), len(continuation)), [])
        if not shared or len(shared[-1].owners) == MOST_LAST_TOKENS:
            start = len(context) - excess - 1
            shared.append(_Row(tokens, start, tokens[start + 1 :], [], []))
        shared[-1].last.append(continuation[-1])
        shared[-1].owners.append(index)
    return [row for shared in rows.values() for row in shared], truncated


def _families(rows: list[_Row]) -> list[_Family]:
    """Rows by the context that they share, but for its last token, which predicts the first one scored."""
    by_prefix: dict[bytes, list[_Row]] = {}
    for row in rows:
        by_prefix.setdefault(row.tokens[: row.start].tobytes(), []).append(row)
    families = []
    for members in by_prefix.values():
        at = members[0].start
        if len(members) < FEWEST_SHARING or at < SHORTEST_SHARED:
            families += [_Family(np.zeros(0, np.int32), [row]) for row in members]
        else:
            own = [row._replace(tokens=row.tokens[at:], start=0) for row in members]
            families.append(_Family(members[0].tokens[:at], own))
    return families


def _batches(families: list[_Family], batch_size: int, limit: int, ways: int):
    """Families by size, and each size from the longest to the shortest: memory runs out at once or never."""
    sizes: dict[int, list[_Family]] = {}
    for family in families:
        for first in range(0, len(family.rows), batch_size):
            part = family._replace(rows=family.rows[first : first + batch_size])
            sizes.setdefault(buckets.power_of_two(len(part.rows)) if len(part.prefix) else 0, []).append(part)
    for _, same in sorted(sizes.items()):
        group = max(len(family.rows) for family in same)
        same = sorted(same, key=lambda family: (-_longest(family), -len(family.rows[0].scored), -_widest(family)))
        at = 0
        while at < len(same):
            full = max(1, _batch_rows(buckets.text_length(_longest(same[at]), limit), batch_size) // group)
            chosen = same[at : at + full]
            size = min(buckets.power_of_two(len(chosen)), full)
            yield _Batch(chosen, group, buckets.multiple(size, ways))
            at += full


def _longest(family: _Family) -> int:
    return len(family.prefix) + max(len(row.tokens) for row in family.rows)


def _widest(family: _Family) -> int:
    return max(len(row.last) for row in family.rows)


def _batch_rows(length: int, batch_size: int) -> int:
    return (
        batch_size
        if length <= FULL_BATCH_LENGTH
        else buckets.power_of_two(max(1, batch_size * FULL_BATCH_LENGTH // length))
    )


def _score(model: Model, mesh: Mesh, batch: _Batch, limit: int):
    """Dispatches one batch: sums float32 [B, K], greedy bool [B, K], on every host."""
    rows = [row for family in batch.families for row in family.rows]
    shared = bool(len(batch.families[0].prefix))
    longest = max(len(row.tokens) for row in rows)
    length = buckets.tail_length(longest) if shared else buckets.text_length(longest, limit)
    most = max(len(row.scored) for row in rows)
    scored_length = buckets.tail_length(most)
    widest = max(len(row.last) for row in rows)
    width = 1 if widest == 1 else max(4, buckets.power_of_two(widest))
    size = batch.size * batch.group
    piece = piece_length(model.cfg, mesh, size, scored_length)
    scored_length = buckets.multiple(scored_length, piece) if piece else 0

    tokens = np.zeros((size, length), np.int32)
    scored = np.zeros((size, scored_length), np.int32)
    last = np.zeros((size, width), np.int32)
    spans = np.zeros((size, 2), np.int32)  # start, number of scored tokens before the last
    for number, family in enumerate(batch.families):
        for index, row in enumerate(family.rows, number * batch.group):
            tokens[index, : len(row.tokens)] = row.tokens
            scored[index, : len(row.scored)] = row.scored
            last[index, : len(row.last)] = row.last
            spans[index] = row.start, len(row.scored)

    arrays = (tokens, spans, scored, last, *(_prefixes(batch, limit) if shared else ()))
    placed = sharding.put(list(arrays), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return program(mesh)(model.params, placed, model.cfg, piece, batch.group)


def _prefixes(batch: _Batch, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The families' contexts and which of their tokens are real, [F, a bucket]."""
    longest = max(len(family.prefix) for family in batch.families)
    length = buckets.text_length(longest, limit)
    tokens, real = np.zeros((batch.size, length), np.int32), np.zeros((batch.size, length), bool)
    for index, family in enumerate(batch.families):
        tokens[index, : len(family.prefix)] = family.prefix
        real[index, : len(family.prefix)] = True
    return tokens, real


def piece_length(cfg: ModelConfig, mesh: Mesh, rows: int, scored_length: int) -> int:
    """Scored positions that meet the head at once, all or a power of two: LOGITS_BYTES bound their logits."""
    per_device = max(1, rows // sharding.batch_shards(mesh)) * cfg.vocab_size * 4
    return min(scored_length, buckets.power_of_two(max(1, LOGITS_BYTES // per_device) + 1) // 2)


@functools.cache
def program(mesh: Mesh):
    """The compiled (params, [tokens [B,T], spans [B,2], scored [B,S], last [B,K]], cfg, piece, group) -> sums, greedy
    [B,K]; contexts that rows share may follow in the list."""
    return jax.jit(_program_body, static_argnums=(2, 3, 4), out_shardings=sharding.replicated(mesh))


def _program_body(params, arrays, cfg: ModelConfig, piece: int, group: int):
    tokens, spans, scored, last, *prefix = arrays
    start, count = spans[:, 0], spans[:, 1]
    if prefix:
        cache = models.init_cache(cfg, *prefix[0].shape)
        _, cache = models.prefill(params, prefix[0], cfg, cache, prefix[1])
        cache = models.branch_cache(cache, cfg, group, tokens.shape[1])
        hidden, _ = models.extend(params, tokens, cfg, cache)
    else:
        hidden = models.hidden_states(params, tokens, cfg)  # [B, T, D]; padding stands right, where causality hides it

    def at(positions):  # [B, n] → [B, n, D]
        positions = jnp.minimum(positions, tokens.shape[1] - 1)
        return jnp.take_along_axis(hidden, positions[..., None], axis=1)

    def score(positions, targets):  # [B, n], [B, n] → log-probabilities and whether each is the highest, [B, n]
        logits = models.logits(params, at(positions), cfg)
        return _gather(logits, targets)

    logits = models.logits(params, at((start + count)[:, None]), cfg)  # the position that predicts the last token
    sums, greedy = _gather(jnp.broadcast_to(logits, (*last.shape, logits.shape[-1])), last)
    if scored.shape[1]:
        offsets = jnp.arange(scored.shape[1])[None]
        positions = start[:, None] + offsets
        pieces = [jnp.moveaxis(x.reshape(x.shape[0], -1, piece), 1, 0) for x in (positions, scored)]
        values, highest = jax.lax.map(lambda piece: score(*piece), tuple(pieces))
        values, highest = (jnp.moveaxis(x, 0, 1).reshape(scored.shape) for x in (values, highest))
        real = offsets < count[:, None]
        sums += jnp.sum(jnp.where(real, values, 0.0), axis=1, keepdims=True)
        greedy &= jnp.all(highest | ~real, axis=1, keepdims=True)
    return sums, greedy


def _gather(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-softmax at the targets, and whether no logit is above it. By comparison, not by indexing: the vocabulary may
    be split over devices."""
    chosen = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    values = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return values - jax.nn.logsumexp(logits, axis=-1), values >= jnp.max(logits, axis=-1)
