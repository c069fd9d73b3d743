"""How requests for likelihoods become batches: sorted by length, few shapes, and nothing read twice.

Requests that differ in their last token alone (the letters of a multiple choice) share one row, and rows that go on
from one context (a prompt's 25 samples, a question's answers) share one pass over it.
"""

from typing import NamedTuple

import numpy as np

from unidetox_jax import buckets
from unidetox_jax.errors import UserError

FULL_BATCH_LENGTH = 128  # rows of up to this many tokens come in batches of batch_size; longer ones in smaller ones
MOST_LAST_TOKENS = 32  # requests that share a row
FEWEST_SHARING = 3  # rows that share a context's pass: fewer, or …
SHORTEST_SHARED = 16  # … shorter contexts are not worth a program of their own


class Row(NamedTuple):
    """One row of a batch: `tokens` is the input, `start` the position that predicts the first scored token, `scored`
    the scored tokens but the last, `last` the candidates for the last, `owners` the requests they belong to."""

    tokens: np.ndarray
    start: int
    scored: np.ndarray
    last: list[int]
    owners: list[int]


class Family(NamedTuple):
    """Rows that go on from one `prefix`, read once; an empty prefix: one row, read whole."""

    prefix: np.ndarray
    rows: list[Row]


class Batch(NamedTuple):
    """What one program computes: families of up to `group` rows, filled up to `size` families."""

    families: list[Family]
    group: int
    size: int


def rows_of(contexts, continuations, limit: int, vocab_size: int) -> tuple[list[Row], np.ndarray]:
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
        if not shared or len(shared[-1].owners) == MOST_LAST_TOKENS:
            start = len(context) - excess - 1
            shared.append(Row(tokens, start, tokens[start + 1 :], [], []))
        shared[-1].last.append(continuation[-1])
        shared[-1].owners.append(index)
    return [row for shared in rows.values() for row in shared], truncated


def families_of(rows: list[Row]) -> list[Family]:
    """Rows by the context that they share, but for its last token, which predicts the first one scored."""
    by_prefix: dict[bytes, list[Row]] = {}
    for row in rows:
        by_prefix.setdefault(row.tokens[: row.start].tobytes(), []).append(row)
    families = []
    for members in by_prefix.values():
        at = members[0].start
        if len(members) < FEWEST_SHARING or at < SHORTEST_SHARED:
            families += [Family(np.zeros(0, np.int32), [row]) for row in members]
        else:
            own = [row._replace(tokens=row.tokens[at:], start=0) for row in members]
            families.append(Family(members[0].tokens[:at], own))
    return families


def batches_of(families: list[Family], batch_size: int, limit: int, ways: int):
    """Families by size, and each size from the longest to the shortest: memory runs out at once or never."""
    sizes: dict[int, list[Family]] = {}
    for family in families:
        for first in range(0, len(family.rows), batch_size):
            part = family._replace(rows=family.rows[first : first + batch_size])
            sizes.setdefault(buckets.next_power_of_two(len(part.rows)) if len(part.prefix) else 0, []).append(part)
    for _, same in sorted(sizes.items()):
        group = max(len(family.rows) for family in same)
        same = sorted(same, key=lambda family: (-_longest(family), -len(family.rows[0].scored), -_widest(family)))
        at = 0
        while at < len(same):
            full = max(1, _batch_rows(buckets.text_length(_longest(same[at]), limit), batch_size) // group)
            chosen = same[at : at + full]
            size = min(buckets.next_power_of_two(len(chosen)), full)
            yield Batch(chosen, group, buckets.round_up(size, ways))
            at += full


def _longest(family: Family) -> int:
    return len(family.prefix) + max(len(row.tokens) for row in family.rows)


def _widest(family: Family) -> int:
    return max(len(row.last) for row in family.rows)


def _batch_rows(length: int, batch_size: int) -> int:
    return (
        batch_size
        if length <= FULL_BATCH_LENGTH
        else buckets.next_power_of_two(max(1, batch_size * FULL_BATCH_LENGTH // length))
    )
