"""Arranges a step's texts in rows: padded, one text a row, or packed, several a row, first fit decreasing.

The layout never moves texts between steps, and the loss is a mean over a step's targets, so the layout changes only
the speed. Every (rows, length) pair is a program to compile: a few shapes are chosen from the data itself, greedily,
each the one that saves the most padding. R rows, T tokens a row.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from unidetox_jax import padded_sizes

PAD, PACK = "pad", "pack"
LAYOUTS = (PAD, PACK)
# Attention's work grows with T: a token in a row of 512 costs about an eighth more than its matmuls at GPT-2's width
ATTENTION_LENGTH = 4096
MIN_GAIN = 0.005  # share of the work that a shape must save to be worth its compilation

Shape = tuple[int, int]
Rows = tuple[tuple[int, ...], ...]  # for each row, positions of its texts within the step's batch


@dataclasses.dataclass(frozen=True)
class Grid:
    """The candidate shapes: R a multiple of row_multiple up to max_rows, T one of lengths."""

    layout: str
    row_multiple: int
    max_rows: int
    lengths: tuple[int, ...]

    def shapes(self) -> list[Shape]:
        min_rows = self.row_multiple if self.layout == PACK else self.max_rows
        rows = range(min_rows, self.max_rows + 1, self.row_multiple)
        return [(count, length) for count in rows for length in self.lengths]


def make_grid(layout: str, batch_size: int, longest: int, row_multiple: int, length_multiple: int, limit: int) -> Grid:
    """Candidate shapes for batches of `batch_size` texts of at most `longest` tokens.

    Packed rows may be longer than the longest text, up to `limit` tokens.
    """
    max_rows = padded_sizes.round_up(batch_size, row_multiple)
    max_length = limit if layout == PACK else longest
    lengths = {min(length, limit) for length in range(length_multiple, max_length + length_multiple, length_multiple)}
    return Grid(layout, row_multiple, max_rows, tuple(sorted(lengths)))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit decreasing: positions of the texts in each row of at most `capacity` tokens; ties keep their order."""
    rows: list[list[int]] = []
    free: list[int] = []  # tokens left in each row
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        length = lengths[position]
        row = next((row for row, left in enumerate(free) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(position)
        free[row] -= length
    return rows


def arrange(lengths: Sequence[int], shapes: Sequence[Shape], layout: str) -> tuple[Shape, Rows]:
    """The cheapest of `shapes` that holds texts of these lengths, and the texts in each of its rows."""
    for shape in sorted(shapes, key=cost):
        rows = _rows(lengths, shape[1], layout)
        if rows is not None and len(rows) <= shape[0]:
            return shape, tuple(tuple(sorted(row)) for row in rows) + ((),) * (shape[0] - len(rows))
    raise ValueError(f"texts of lengths {list(lengths)} fit none of {list(shapes)}")


def _rows(lengths: Sequence[int], capacity: int, layout: str) -> list[list[int]] | None:
    """Positions of the texts in each row, in as few rows as the layout needs; None if a text exceeds `capacity`."""
    if max(lengths) > capacity:
        return None
    return pack(lengths, capacity) if layout == PACK else [[position] for position in range(len(lengths))]


def cost(shape: Shape) -> float:
    """Work of a step of this shape, in tokens of matmul."""
    rows, length = shape
    return rows * length * (1 + length / ATTENTION_LENGTH)


def choose_shapes(batches: Sequence[Sequence[int]], grid: Grid, longest: int, max_shapes: int) -> tuple[Shape, ...]:
    """At most `max_shapes` shapes of the grid for batches like these (lengths of their texts), chosen greedily.

    The first one holds any batch of `max_rows` texts of at most `longest` tokens, so that every batch fits.
    """
    largest = (grid.max_rows, min(length for length in grid.lengths if length >= longest))
    candidates = [shape for shape in grid.shapes() if cost(shape) < cost(largest)]
    if not candidates or max_shapes < 2:
        return (largest,)
    needed_rows = {
        T: np.array([len(_rows(batch, T, grid.layout) or range(grid.max_rows + 1)) for batch in batches])
        for T in grid.lengths
    }
    work = np.stack([np.where(needed_rows[T] <= R, cost((R, T)), np.inf) for R, T in candidates])  # [shapes, batches]
    chosen, best = [largest], np.full(len(batches), cost(largest))
    while len(chosen) < max_shapes:
        totals = np.minimum(work, best).sum(1)
        pick = int(totals.argmin())
        if totals[pick] > best.sum() * (1 - MIN_GAIN):
            break
        chosen.append(candidates[pick])
        best = np.minimum(best, work[pick])
    return tuple(chosen)
