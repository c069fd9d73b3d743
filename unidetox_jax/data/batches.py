"""Batches by step: `batches[step]` is a function of the step alone, so the step is the only state to save.

grain's MapDataset gives the order (shuffled anew each epoch, without end); `layout` says who lies where. Every host
computes the same few kilobytes, and `place` puts on each device the rows that are its own.
Axes: R rows, T tokens a row.
"""

from collections.abc import Iterator

import numpy as np

from unidetox_jax.data import layout as layouts
from unidetox_jax.data.layout import Rows, Shape
from unidetox_jax.data.tokens import Tokens
from unidetox_jax.errors import UserError, suggest

SAMPLE = 1000  # batches that the shapes are chosen from

Batch = dict[str, np.ndarray]


class Batches:
    """An endless sequence of training batches with random access.

    `batches[step]` is {"tokens": int32 [R, T], "loss_mask": bool [R, T]} and, for layout "pack", "segment_ids": int32
    [R, T], 1, 2, 3… per text in its row and 0 for padding. `loss_mask` is true for targets: not for padding, nor
    for the `tokens.given` first tokens of a text. So the step's loss is a mean over `loss_mask.sum()` tokens. Padding
    stands on the right: causal attention alone keeps it from what is before it, and layout "pad" needs no other mask.
    With `tokens.reproduce_release` each text has a row, padded to the longest text of all, with padding as targets.
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        *,
        seed: int,
        layout: str = layouts.PACK,
        row_multiple: int = 1,
        length_multiple: int = 32,
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
          max_shapes: most shapes, each of which is a program to compile.

        Raises:
          UserError: an unknown layout or a number out of range.
        """
        if layout not in layouts.LAYOUTS:
            raise UserError(f"layout: no {layout!r}{suggest(layout, layouts.LAYOUTS)}")
        for name, value in (("batch_size", batch_size), ("max_shapes", max_shapes), ("row_multiple", row_multiple)):
            if value < 1:
                raise UserError(f"{name}: found {value}, expected at least 1")
        if not 0 <= seed < 1 << 32:
            raise UserError(f"seed: found {seed}, expected 0 to {(1 << 32) - 1}")
        self.tokens, self.batch_size = tokens, batch_size
        self.layout = layouts.PAD if tokens.reproduce_release else layout
        self._lengths = tokens.lengths
        self._order = _order(len(tokens), batch_size, seed)
        longest = int(self._lengths.max())
        grid = layouts.make_grid(self.layout, batch_size, longest, row_multiple, length_multiple, tokens.max_length)
        if tokens.reproduce_release:
            self.shapes: tuple[Shape, ...] = ((grid.max_rows, longest),)
        else:
            steps = min(SAMPLE, 3 * -(-len(tokens) // batch_size))
            sample = [self._lengths[self.indices(step)].tolist() for step in range(steps)]
            self.shapes = layouts.choose_shapes(sample, grid, longest, max_shapes)

    @property
    def max_shape(self) -> Shape:
        """(R, T) of the largest batch that can come: what memory must be planned for."""
        return max(self.shapes, key=layouts.cost)

    def indices(self, step: int) -> np.ndarray:
        """int64 [batch_size]: the step's texts, as indices into `tokens`; `tokens.rows[…]` gives the input's rows."""
        return np.asarray(self._order[step])

    def plan(self, step: int) -> tuple[Shape, Rows]:
        """The step's shape (R, T), and for each row the indices of its texts, in order."""
        indices = self.indices(step)
        shape, rows = layouts.arrange(self._lengths[indices].tolist(), self.shapes, self.layout)
        return shape, _texts_of(rows, indices)

    def __getitem__(self, step: int) -> Batch:
        shape, rows = self.plan(step)
        return fill(self.tokens, shape, rows, segments=self.layout == layouts.PACK)

    def __iter__(self) -> Iterator[Batch]:
        raise TypeError("batches have no end: index them by step")


def one_pass(
    tokens: Tokens,
    batch_size: int,
    *,
    row_multiple: int = 1,
    length_multiple: int = 32,
    max_shapes: int = 6,
) -> list[tuple[Shape, Rows]]:
    """Every text once, for evaluation: plans of padded batches, texts sorted by length; `fill(tokens, *plan)` makes
    the arrays.

    The last batch may be short: what is missing are rows without targets.
    """
    lengths = tokens.lengths
    order = np.argsort(lengths, kind="stable")
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    longest = int(lengths.max())
    grid = layouts.make_grid(layouts.PAD, batch_size, longest, row_multiple, length_multiple, tokens.max_length)
    sample = [lengths[group].tolist() for group in groups]
    shapes = layouts.choose_shapes(sample, grid, longest, max_shapes)
    arranged = (layouts.arrange(lengths, shapes, layouts.PAD) for lengths in sample)
    return [(shape, _texts_of(rows, group)) for group, (shape, rows) in zip(groups, arranged, strict=True)]


def fill(tokens: Tokens, shape: Shape, rows: Rows, segments: bool = False) -> Batch:
    """The arrays of a plan: texts `rows[r]` end to end in row r; with `segments`, segment_ids as well.

    Returns:
      {"tokens": int32 [R, T], "loss_mask": bool [R, T]} and perhaps {"segment_ids": int32 [R, T]}.
    """
    batch = {"tokens": np.full(shape, tokens.pad_id, np.int32), "loss_mask": np.zeros(shape, np.bool_)}
    segment_ids = np.zeros(shape, np.int32)
    for row, texts in enumerate(rows):
        start = 0
        for segment, text in enumerate(texts, 1):
            piece = tokens[text]
            end = start + len(piece)
            batch["tokens"][row, start:end] = piece
            batch["loss_mask"][row, start + tokens.given : end] = True
            segment_ids[row, start:end] = segment
            start = end
        if tokens.reproduce_release and texts:
            batch["loss_mask"][row, 1:] = True
    return {**batch, "segment_ids": segment_ids} if segments else batch


def _texts_of(rows: Rows, indices: np.ndarray) -> Rows:
    """Positions within a batch as indices into the tokens."""
    return tuple(tuple(int(indices[position]) for position in row) for row in rows)


def _order(size: int, batch_size: int, seed: int):
    """grain's random access to index batches: `[step]` -> int [batch_size]. A batch may span two epochs."""
    import grain  # seconds of imports, and only training needs it

    return grain.MapDataset.range(size).shuffle(seed=seed).repeat().batch(batch_size)
