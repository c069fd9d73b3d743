"""Batches by step: `batches[step]` depends on the step alone, so the step is the only state to save.

grain's MapDataset gives the order (reshuffled each epoch, without end), `packing` the rows of each batch. Every host
computes the same few kilobytes, and each device receives its own rows. R rows, T tokens a row.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from unidetox_jax.data import packing
from unidetox_jax.data.packing import Rows, Shape
from unidetox_jax.data.tokens import Tokens
from unidetox_jax.errors import UserError, suggest

SAMPLE = 1000  # batches that the shapes are chosen from
LENGTH_MULTIPLE = 32  # of the length of rows
PREFETCHED = 2  # most items prepared ahead

Batch = dict[str, np.ndarray]


class Batches:
    """An endless sequence of training batches with random access.

    `batches[step]` is {"tokens": int32 [R, T], "loss_mask": bool [R, T]} and, for layout "pack", "segment_ids": int32
    [R, T]: 1, 2, 3… per text of a row, 0 for padding. `loss_mask` is true for targets: neither padding nor the first
    `tokens.loss_start` tokens of a text. The step's loss is a mean over `loss_mask.sum()` tokens. Padding is on the
    right, where causal attention ignores it, so layout "pad" needs no attention mask. With `tokens.reproduce_release`
    each text has its own row, padded to the longest text of all, and padding is a target.
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        *,
        seed: int,
        layout: str = packing.PACK,
        row_multiple: int = 1,
        length_multiple: int = LENGTH_MULTIPLE,
        max_shapes: int = 8,
    ):
        """Chooses the shapes.

        Args:
          tokens: what to train on.
          batch_size: texts a step, over all hosts and micro-batches.
          seed: of the order.
          layout: "pack" or "pad".
          row_multiple: R is a multiple of it: the product of the mesh's data axes times the accumulation.
          length_multiple: T is a multiple of it (or the tokens' max_length).
          max_shapes: most shapes; each is a program to compile.

        Raises:
          UserError: an unknown layout or a number out of range.
        """
        if layout not in packing.LAYOUTS:
            raise UserError(f"layout: no {layout!r}{suggest(layout, packing.LAYOUTS)}")
        for name, value in (("batch_size", batch_size), ("max_shapes", max_shapes), ("row_multiple", row_multiple)):
            if value < 1:
                raise UserError(f"{name}: found {value}, expected at least 1")
        if not 0 <= seed < 1 << 32:
            raise UserError(f"seed: found {seed}, expected 0 to {(1 << 32) - 1}")
        self.tokens, self.batch_size = tokens, batch_size
        self.layout = packing.PAD if tokens.reproduce_release else layout
        self._lengths = tokens.lengths
        self._order = _order(len(tokens), batch_size, seed)
        longest = int(self._lengths.max())
        grid = packing.make_grid(self.layout, batch_size, longest, row_multiple, length_multiple, tokens.max_length)
        if tokens.reproduce_release:
            self.shapes: tuple[Shape, ...] = ((grid.max_rows, longest),)
        else:
            steps = min(SAMPLE, 3 * -(-len(tokens) // batch_size))
            sample = [self._lengths[self.indices(step)].tolist() for step in range(steps)]
            self.shapes = packing.choose_shapes(sample, grid, longest, max_shapes)

    @property
    def max_shape(self) -> Shape:
        """(R, T) of the largest possible batch, which determines peak memory."""
        return max(self.shapes, key=packing.cost)

    def indices(self, step: int) -> np.ndarray:
        """int64 [batch_size]: the step's texts, as indices into `tokens`."""
        return np.asarray(self._order[step])

    def plan(self, step: int) -> tuple[Shape, Rows]:
        """The step's shape (R, T), and for each row the indices of its texts, in order."""
        indices = self.indices(step)
        shape, rows = packing.arrange(self._lengths[indices].tolist(), self.shapes, self.layout)
        return shape, _texts_of(rows, indices)

    def __getitem__(self, step: int) -> Batch:
        shape, rows = self.plan(step)
        return collate(self.tokens, shape, rows, segments=self.layout == packing.PACK)

    def __iter__(self) -> Iterator[Batch]:
        raise TypeError("batches have no end: index them by step")


def epoch_plans(
    tokens: Tokens, batch_size: int, *, row_multiple: int = 1, max_shapes: int = 6
) -> list[tuple[Shape, Rows]]:
    """Padded batches that hold every text once, for evaluation, sorted by length: `collate(tokens, *plan)` makes each.

    The last batch may be short: its missing rows have no targets.
    """
    lengths = tokens.lengths
    order = np.argsort(lengths, kind="stable")
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    longest = int(lengths.max())
    grid = packing.make_grid(packing.PAD, batch_size, longest, row_multiple, LENGTH_MULTIPLE, tokens.max_length)
    group_lengths = [lengths[group].tolist() for group in groups]
    shapes = packing.choose_shapes(group_lengths, grid, longest, max_shapes)
    arranged = (packing.arrange(lengths, shapes, packing.PAD) for lengths in group_lengths)
    return [(shape, _texts_of(rows, group)) for group, (shape, rows) in zip(groups, arranged, strict=True)]


def collate(tokens: Tokens, shape: Shape, rows: Rows, segments: bool = False) -> Batch:
    """The arrays of a plan: texts `rows[r]` end to end in row r; with `segments`, segment_ids as well.

    Returns:
      {"tokens": int32 [R, T], "loss_mask": bool [R, T]} and perhaps {"segment_ids": int32 [R, T]}.
    """
    batch = {"tokens": np.full(shape, tokens.pad_id, np.int32), "loss_mask": np.zeros(shape, np.bool_)}
    segment_ids = np.zeros(shape, np.int32)
    for row, texts in enumerate(rows):
        start = 0
        for segment, text in enumerate(texts, 1):
            ids = tokens[text]
            end = start + len(ids)
            batch["tokens"][row, start:end] = ids
            batch["loss_mask"][row, start + tokens.loss_start : end] = True
            segment_ids[row, start:end] = segment
            start = end
        if tokens.reproduce_release and texts:
            batch["loss_mask"][row, 1:] = True
    return {**batch, "segment_ids": segment_ids} if segments else batch


@contextlib.contextmanager
def prefetch(make: Callable[[int], Any], start: int, stop: int) -> Iterator[Iterator[Any]]:
    """make(start), …, make(stop - 1), prepared by a thread while earlier items are used.

    An exception in `make` is raised in place of its item. Leaving the context ends the thread.
    """
    import grain  # takes seconds to import, and only training needs it

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED)
    items = iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options))
    try:
        yield items
    finally:
        items.close()


def _texts_of(rows: Rows, indices: np.ndarray) -> Rows:
    """Positions within a batch as indices into the tokens."""
    return tuple(tuple(int(indices[position]) for position in row) for row in rows)


def _order(size: int, batch_size: int, seed: int):
    """grain's random access to index batches: `[step]` -> int [batch_size]. A batch may span two epochs."""
    import grain  # takes seconds to import, and only training needs it

    return grain.MapDataset.range(size).shuffle(seed=seed).repeat().batch(batch_size)
