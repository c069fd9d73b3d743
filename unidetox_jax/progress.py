"""Terminal output: progress bars (log lines when the output is not a terminal) and plain-text tables."""

import sys
from collections.abc import Sequence

import tqdm

LOG_INTERVAL = 10.0  # seconds between lines where the output is not a terminal


class Progress(tqdm.tqdm):
    """A tqdm bar over `total` units, of which `initial` are already done.

    When stderr is not a terminal it logs a line every ten seconds instead. In a multi-host run only process 0 should
    show one (`disable=True` elsewhere).
    """

    def __init__(self, total: int, unit: str, label: str, initial: int = 0, disable: bool = False):
        terminal = sys.stderr.isatty()
        super().__init__(
            total=total,
            initial=initial,
            unit=f" {unit}",
            desc=label,
            disable=disable,
            dynamic_ncols=terminal,
            mininterval=0.2 if terminal else LOG_INTERVAL,
            maxinterval=LOG_INTERVAL,
            file=sys.stderr if terminal else _LineStream(),
            ascii=not terminal,
        )


class _LineStream:
    """Turns tqdm's carriage returns into newlines."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n")
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def format_table(rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Rows of cells as aligned text: the first `left` columns left-aligned, the rest right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
