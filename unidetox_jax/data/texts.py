"""Texts with what is known of each: what data sets hold, what distillation makes, what fine-tuning takes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Texts(Sequence):
    """A sequence of strings that knows how each was made.

    rows: a dictionary a text: "text", perhaps "ended" (by itself, before a length limit), perhaps "tokens" (as they
      were sampled: BOS first, the end last if it ended), and more.
    made_on: the hardware that sampled them, one entry for each kind; empty for text from elsewhere.
    """

    rows: tuple[dict[str, Any], ...]
    made_on: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return [row["text"] for row in self.rows[index]] if isinstance(index, slice) else self.rows[index]["text"]

    def __iter__(self) -> Iterator[str]:
        return (row["text"] for row in self.rows)

    @property
    def ended(self) -> list[bool] | None:
        """Whether each text ended by itself; None where nobody noted it: take it that all did."""
        return [row["ended"] for row in self.rows] if self.rows and "ended" in self.rows[0] else None
