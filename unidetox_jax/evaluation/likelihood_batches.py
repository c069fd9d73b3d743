"""Batches likelihood requests: sorted by length, with few shapes and without reading anything twice.

Requests that differ only in their last token (letters of a multiple choice) share one row, and rows that continue the
same context (a prompt's 25 samples, a question's answers) share one pass over it.
"""

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from unidetox_jax import padded_sizes
from unidetox_jax.errors import UserError

FULL_BATCH_LENGTH = 128  # rows of up to this many tokens use the full batch size, longer ones a smaller one
MAX_LAST_TOKENS = 32  # requests that share a row
MIN_SHARING_ROWS = 3  # fewer rows per context, …
MIN_SHARED_TOKENS = 16  # … or shorter contexts, are not worth a separate program


class Row(NamedTuple):
    """One row of a batch. tokens: the input. start: the position that predicts the first scored token. scored: the
    scored tokens without the last. last: the candidates for the last one. owners: the requests they belong to."""

    tokens: np.ndarray
    start: int
    scored: np.ndarray
    last: list[int]
    owners: list[int]


class Family(NamedTuple):
    """Rows that continue the same `prefix`, which is read once; with an empty prefix, a single row."""

    prefix: np.ndarray
    rows: list[Row]


class Sizes(NamedTuple):
    """What a batch is padded to: `families` of `group` rows. context: tokens that a family shares, 0 if none. length:
    tokens of a row after them. scored: of these, before the last. last: candidates for the last token."""

    families: int
    group: int
    context: int
    length: int
    scored: int
    last: int

    @property
    def cost(self) -> int:
        """Padded tokens; a scored position counts as a token, for its logits."""
        return self.families * (self.context + self.group * (self.length + self.scored + self.last))

    def union(self, other: "Sizes") -> "Sizes":
        """The smallest sizes to which batches of both can be padded."""
        return Sizes(*map(max, self, other))


class Batch(NamedTuple):
    """The work of one program call."""

    families: list[Family]
    sizes: Sizes


def make_rows(contexts, continuations, limit: int, vocab_size: int) -> tuple[list[Row], np.ndarray]:
    """Rows of at most `limit` tokens, and how many tokens each request lost from its context: int64 [N]."""
    rows: dict[tuple[bytes, int], list[Row]] = {}
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
        if not shared or len(shared[-1].owners) == MAX_LAST_TOKENS:
            start = len(context) - excess - 1
            shared.append(Row(tokens, start, tokens[start + 1 :], [], []))
        shared[-1].last.append(continuation[-1])
        shared[-1].owners.append(index)
    return [row for shared in rows.values() for row in shared], truncated


def make_families(rows: list[Row]) -> list[Family]:
    """Groups rows by shared context without its last token, which predicts the first scored one."""
    by_prefix: dict[bytes, list[Row]] = {}
    for row in rows:
        by_prefix.setdefault(row.tokens[: row.start].tobytes(), []).append(row)
    families = []
    for members in by_prefix.values():
        length = members[0].start
        if len(members) < MIN_SHARING_ROWS or length < MIN_SHARED_TOKENS:
            families += [Family(np.zeros(0, np.int32), [row]) for row in members]
        else:
            tails = [row._replace(tokens=row.tokens[length:], start=0) for row in members]
            families.append(Family(members[0].tokens[:length], tails))
    return families


def make_batches(families: list[Family], batch_size: int, limit: int, shards: int, spare: float) -> list[Batch]:
    """Batches by family size, from the longest texts to the shortest, so that memory runs out at once or never.

    spare: tokens of padding that are cheaper than compiling a program for other sizes.
    """
    by_size: dict[int, list[Family]] = {}
    for family in families:
        for first in range(0, len(family.rows), batch_size):
            chunk = family._replace(rows=family.rows[first : first + batch_size])
            size = padded_sizes.next_power_of_two(len(chunk.rows)) if len(chunk.prefix) else 0
            by_size.setdefault(size, []).append(chunk)
    batches = []
    for _, bucket in sorted(by_size.items()):
        group = max(len(family.rows) for family in bucket)
        bucket = sorted(bucket, key=lambda family: (-_longest(family), -len(family.rows[0].scored), -_widest(family)))
        start = 0
        while start < len(bucket):
            full = max(1, _batch_rows(padded_sizes.text_length(_longest(bucket[start]), limit), batch_size) // group)
            chosen = bucket[start : start + full]
            count = min(padded_sizes.next_power_of_two(len(chosen)), full)
            batches.append(Batch(chosen, _sizes(chosen, padded_sizes.round_up(count, shards), group, limit)))
            start += full
    replaced = with_fewer_sizes(collections.Counter(batch.sizes for batch in batches), spare)
    return [batch._replace(sizes=replaced[batch.sizes]) for batch in batches]


def _sizes(families: Sequence[Family], count: int, group: int, limit: int) -> Sizes:
    context = max(len(family.prefix) for family in families)
    rows = [row for family in families for row in family.rows]
    longest = max(len(row.tokens) for row in rows)
    widest = max(len(row.last) for row in rows)
    return Sizes(
        count,
        group,
        padded_sizes.text_length(context, limit) if context else 0,
        padded_sizes.tail_length(longest) if context else padded_sizes.text_length(longest, limit),
        padded_sizes.tail_length(max(len(row.scored) for row in rows)),
        1 if widest == 1 else max(4, padded_sizes.next_power_of_two(widest)),
    )


def with_fewer_sizes(counts: Mapping[Sizes, int], spare: float) -> dict[Sizes, Sizes]:
    """For each of the sizes the one to pad to. Those two that are padded to a common size with the fewest tokens are,
    as long as that takes at most `spare` tokens and no batch outgrows the largest.

    counts: batches of each size.
    """
    largest = max((sizes.cost for sizes in counts), default=0)
    batches, replaced = dict(counts), {sizes: sizes for sizes in counts}
    padding: dict[tuple[Sizes, Sizes], int] = {}

    def compare(first: Sizes, second: Sizes) -> None:
        union = first.union(second)
        if (first.context > 0) == (second.context > 0) and union.cost <= largest:
            tokens = sum(batches[sizes] * (union.cost - sizes.cost) for sizes in (first, second))
            if tokens <= spare:
                padding[first, second] = tokens

    for pair in itertools.combinations(sorted(batches), 2):
        compare(*pair)
    while padding:
        merged = min(padding, key=lambda pair: (padding[pair], pair))
        union = merged[0].union(merged[1])
        padding = {pair: tokens for pair, tokens in padding.items() if not {union, *merged} & {*pair}}
        count = sum(batches.pop(sizes, 0) for sizes in {union, *merged})
        replaced = {sizes: union if to in merged else to for sizes, to in replaced.items()}
        batches[union] = count
        for other in sorted(batches):
            if other != union:
                compare(union, other)
    return replaced


def _longest(family: Family) -> int:
    return len(family.prefix) + max(len(row.tokens) for row in family.rows)


def _widest(family: Family) -> int:
    return max(len(row.last) for row in family.rows)


def _batch_rows(length: int, batch_size: int) -> int:
    if length <= FULL_BATCH_LENGTH:
        return batch_size
    return padded_sizes.next_power_of_two(max(1, batch_size * FULL_BATCH_LENGTH // length))
