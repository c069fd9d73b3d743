"""Texts with what is known of each: from data sets and distillation to fine-tuning."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Texts(Sequence):
    """A sequence of strings with metadata.

    rows: a dictionary per text: "text", perhaps "ended" (by itself, before a length limit), perhaps "tokens" (as
      sampled: BOS first, the end token last if it ended), and more.
    made_on: the kinds of hardware that sampled the texts; empty for other text.
    """

    rows: tuple[dict[str, Any], ...]
    made_on: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return [row["text"] for row in self.rows[index]] if isinstance(index, slice) else self.rows[index]["text"]

    @property
    def ended(self) -> list[bool] | None:
        """Whether each text ended by itself; None if that is unknown, which counts as ended."""
        return [row["ended"] for row in self.rows] if self.rows and "ended" in self.rows[0] else None
